"""Nothing is lost: whatever op of a step fails, the held state stays valid and goes on to the same output."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from engine import finish_all, prompt

import folo
from folo import ops


class FaultError(Exception):
    """What the tests raise inside a step."""


@contextmanager
def failing_op(at: int) -> Iterator[list[str]]:
    """The `at`-th call of any op raises; yields the list of the ops called so far."""
    called: list[str] = []

    def failing(name: str, op: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            called.append(name)
            if len(called) == at + 1:
                raise FaultError(name)
            return op(*args, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ops.__all__:
            patch.setattr(ops, name, failing(name, getattr(ops, name)))
        yield called


def sampling(seed: int, **options: Any) -> folo.SamplingParams:
    return folo.SamplingParams(seed=seed, max_tokens=14, ignore_eos=True, logprobs=1, **options)


def steps(params: folo.Params, state: folo.EngineState, count: int) -> folo.EngineState:
    for _ in range(count):
        batch = folo.schedule(state)
        assert batch is not None
        state, _ = folo.step(params, state, batch)
    return state


def before_prefill(params: folo.Params) -> folo.EngineState:
    """The next step computes and scores prompts, one of them in part, with penalties and truncation."""
    scheduler = folo.SchedulerConfig(max_num_batched_tokens=40)
    state = folo.init(params, folo.CacheConfig(num_blocks=24, reserve_blocks=24), scheduler)
    state = folo.submit(state, folo.Request(prompt(21), sampling(0, prompt_logprobs=2, top_k=7), "a"))
    state = folo.submit(state, folo.Request(prompt(9), sampling(1, repetition_penalty=1.2), "b"))
    return folo.submit(state, folo.Request(prompt(30), sampling(2, top_p=0.9), "c"))


def before_decode(params: folo.Params) -> folo.EngineState:
    return steps(params, before_prefill(params), 5)


def before_copy_and_preemption(params: folo.Params) -> folo.EngineState:
    """The next step has histories that part within blocks, and lacks a block that it needs."""
    cache = folo.CacheConfig(block_size=8, num_blocks=8, reserve_blocks=16)
    state = folo.init(params, cache, folo.SchedulerConfig(max_model_len=64))
    for n, length in enumerate((13, 14, 15)):
        state = folo.submit(state, folo.Request(prompt(length, n), sampling(n), str(n)))
    state = steps(params, state, 2)
    state = folo.fork(state, "0", ["fork"], seeds=[9])
    batch = folo.schedule(state)
    while batch is not None and not batch.preempted:
        state, _ = folo.step(params, state, batch)
        batch = folo.schedule(state)
    assert batch is not None
    folo.step(params, state, batch)  # this history was there first: another one has to copy
    return state


@pytest.mark.no_cover
@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("prepare", [before_prefill, before_decode, before_copy_and_preemption])
def test_a_failing_op_leaves_the_state_valid_and_its_future_unchanged(
    prepare: Callable[[folo.Params], folo.EngineState], pack: bool, tiny_dir: Path
) -> None:
    """With plain weights every op is called by itself, with packed ones all layers at once."""
    tiny = folo.load(tiny_dir, pack=pack, use_tqdm=False)
    state = prepare(tiny)
    expected = folo.outputs(finish_all(tiny, state))
    shown, numbers = folo.outputs(state), folo.stats(state)
    batch = folo.schedule(state)
    assert batch is not None
    with failing_op(at=-1) as called:
        folo.step(tiny, state, batch)
    num_calls = len(called)
    assert num_calls > (6 if pack else 20)
    assert {"decoder_layers" if pack else "paged_attention", "linear", "draw"} <= set(called)
    for at in range(num_calls):
        gc.collect()
        free = state.heap.num_free
        with failing_op(at), pytest.raises(FaultError):
            folo.step(tiny, state, batch)
        assert state.heap.num_free == free, "what the step took goes back"
        folo.check(state)
        assert folo.stats(state) == numbers
        assert folo.outputs(state) == shown
        again, _ = folo.step(tiny, state, batch)
        folo.check(again)
        if at % 10 == 0:
            assert folo.outputs(finish_all(tiny, again)) == expected
    assert folo.outputs(finish_all(tiny, state)) == expected


def test_the_copying_step_copies_and_preempts(tiny: folo.Params) -> None:
    """What the test above relies on."""
    state = before_copy_and_preemption(tiny)
    with failing_op(at=-1) as called:
        after = steps(tiny, state, 1)
    assert "copy_blocks" in called
    assert folo.stats(after).preemptions > folo.stats(state).preemptions


@pytest.mark.parametrize("error", [FaultError, StopIteration])  # as `next` raises it
def test_a_failing_logits_processor_leaves_the_state_valid(tiny: folo.Params, error: type[Exception]) -> None:
    broken = True

    def processor(logits: Any, context: folo.sampling.Context) -> Any:
        if broken and context.position == 12:
            raise error
        return logits

    state = folo.init(tiny, folo.CacheConfig(num_blocks=16))
    state = folo.submit(state, folo.Request(prompt(9), sampling(0, logits_processors=[processor]), "a"))
    state = folo.submit(state, folo.Request(prompt(7), sampling(1), "b"))
    state = steps(tiny, state, 3)
    batch = folo.schedule(state)
    assert batch is not None
    for _ in range(3):
        with pytest.raises(error):
            folo.step(tiny, state, batch)
        folo.check(state)
    broken = False
    outputs = folo.outputs(finish_all(tiny, state))
    assert [len(output.outputs[0].token_ids) for output in outputs.values()] == [14, 14]


@pytest.mark.parametrize("logprobs", [None, 0, 2])
@pytest.mark.parametrize("mode", ["raw", "processed"])
def test_logits_that_allow_no_token_are_an_error_that_names_the_request(
    tiny: folo.Params, logprobs: int | None, mode: Any
) -> None:
    def nothing(logits: Any, context: folo.sampling.Context) -> Any:
        return logits - float("inf")

    options: dict[str, Any] = {"logprobs": logprobs, "logprobs_mode": mode}
    bad = folo.SamplingParams(logits_processors=[nothing], **options)
    state = folo.init(tiny, folo.CacheConfig(num_blocks=16))
    state = folo.submit(state, folo.Request(prompt(9), folo.SamplingParams(max_tokens=5, **options), "good"))
    alone = folo.outputs(finish_all(tiny, state))["good"]
    state = folo.submit(state, folo.Request(prompt(7), bad, "bad"))
    with pytest.raises(folo.RequestError, match=r"'bad': no token can be sampled at position 7.*abort it"):
        steps(tiny, state, 1)
    folo.check(state)
    outputs = folo.outputs(finish_all(tiny, folo.abort(state, "bad")))
    assert outputs["good"] == alone


def test_a_failing_tokenizer_leaves_the_state_valid(tiny: folo.Params, tiny_dir: Any) -> None:
    tokenizer = folo.load_tokenizer(str(tiny_dir))
    state = folo.init(tiny, folo.CacheConfig(num_blocks=16), tokenizer=tokenizer)
    state = folo.submit(state, folo.Request(prompt(9), sampling(0, stop=["never there"]), "a"))
    state = steps(tiny, state, 3)
    expected = folo.outputs(finish_all(tiny, state))
    batch = folo.schedule(state)
    assert batch is not None
    with pytest.MonkeyPatch.context() as patch:

        def broken(*_: Any, **__: Any) -> str:
            raise FaultError

        patch.setattr(type(tokenizer), "decode", broken)
        with pytest.raises(FaultError):
            folo.step(tiny, state, batch)
    folo.check(state)
    assert folo.outputs(finish_all(tiny, state)) == expected


def test_states_that_pin_the_heap_are_counted_in_the_error(tiny: folo.Params) -> None:
    cache = folo.CacheConfig(block_size=8, num_blocks=8)
    scheduler = folo.SchedulerConfig(max_num_seqs=1, max_num_batched_tokens=8)
    state = folo.init(tiny, cache, scheduler)
    once = folo.SamplingParams(max_tokens=1)
    held = []
    while state.heap.num_free > 1:
        held.append(state)
        state = folo.submit(state, folo.Request(prompt(9, len(held)), once, str(len(held))))
        state = finish_all(tiny, state)
    state = folo.submit(state, folo.Request(prompt(9), once, "last"))
    with pytest.raises(folo.OutOfBlocksError, match=r"reserve_blocks") as caught:
        steps(tiny, state, 2)
    message = str(caught.value)
    assert f"all {state.heap.num_blocks} blocks" in message
    mine = {block.index for _, block in state.pool.index.items()}
    pinned = [{block.index for _, block in other.pool.index.items()} - mine for other in held]
    count, pinning = len(set[int]().union(*pinned)), sum(map(bool, pinned))
    assert count > 0
    assert f"{count} pinned by {pinning} older states" in message
    folo.check(state)
    del caught
    held.clear()
    assert not folo.has_unfinished(finish_all(tiny, state))
