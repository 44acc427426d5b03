"""The promises of a step: invariance, persistence, no hidden state, nothing lost."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engine import finish_all, prompt, run
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils import _pytree as pytree

import folo

ROUGH = folo.SamplingParams(temperature=1.0, max_tokens=12, logprobs=3, seed=5, ignore_eos=True)


def requests(count: int, sampling: folo.SamplingParams = ROUGH) -> list[folo.Request]:
    lengths = (1, 5, 16, 17, 40, 63)
    return [folo.Request(prompt(lengths[n % 6], n), sampling, id=str(n)) for n in range(count)]


def started(params: folo.Params, count: int = 3, steps: int = 3, **cache: Any) -> folo.EngineState:
    state = folo.init(params, folo.CacheConfig(**{"num_blocks": 64, **cache}))
    for request in requests(count):
        state = folo.submit(state, request)
    for _ in range(steps):
        state, _ = next_step(params, state)
    return state


def next_step(params: folo.Params, state: folo.EngineState) -> tuple[folo.EngineState, folo.Tokens]:
    batch = folo.schedule(state)
    assert batch is not None
    return folo.step(params, state, batch)


@settings(max_examples=25, deadline=None)
@given(
    order=st.permutations(range(6)),
    budget=st.sampled_from([1, 7, 64, 2048]),
    block_size=st.sampled_from([8, 16, 64]),
    num_blocks=st.sampled_from([10, 100]),
    caching=st.booleans(),
    threads=st.sampled_from([1, 2]),
    max_num_seqs=st.sampled_from([1, 3, 16]),
)
def test_outputs_are_the_same_whatever_ran_beside_and_however_it_was_scheduled(
    tiny: folo.Params,
    order: list[int],
    budget: int,
    block_size: int,
    num_blocks: int,
    caching: bool,
    threads: int,
    max_num_seqs: int,
) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        everyone = requests(6)
        alone = [run(tiny, [request])[request.id] for request in everyone]
        together = run(
            tiny,
            [everyone[n] for n in order],
            folo.CacheConfig(block_size, num_blocks, enable_prefix_caching=caching),
            folo.SchedulerConfig(max_num_seqs=max_num_seqs, max_num_batched_tokens=budget, max_model_len=80),
        )
    finally:
        torch.set_num_threads(before)
    for output in alone:
        assert replace(together[output.request_id], num_cached_tokens=0) == output


def test_one_state_stepped_twice_gives_the_same_and_stays_as_it_was(tiny: folo.Params) -> None:
    state = started(tiny)
    shown, leaves = folo.outputs(state), pytree.tree_leaves(state)
    first, tokens = next_step(tiny, state)
    second, again = next_step(tiny, state)
    assert torch.equal(tokens.ids, again.ids)
    assert tokens.logprobs is not None
    assert again.logprobs is not None
    assert torch.equal(tokens.logprobs, again.logprobs)
    assert (tokens.request_ids, tokens.sample_indices) == (again.request_ids, again.sample_indices)
    assert folo.outputs(first) == folo.outputs(second)
    assert folo.outputs(state) == shown
    assert all(a is b for a, b in zip(pytree.tree_leaves(state), leaves, strict=True))


def test_an_older_state_steps_to_the_same_tokens_after_newer_ones_ran(tiny: folo.Params) -> None:
    held = [started(tiny, steps=1)]
    steps = []
    for _ in range(8):
        state, tokens = next_step(tiny, held[-1])
        held.append(state)
        steps.append(tokens)
    finish_all(tiny, held[-1])
    for state, tokens in zip(held, steps, strict=False):
        _, again = next_step(tiny, state)
        assert torch.equal(again.ids, tokens.ids)


def test_a_dropped_batch_leaves_no_trace(tiny: folo.Params) -> None:
    state = started(tiny, steps=2)
    free, leaves = state.heap.num_free, pytree.tree_leaves(state)
    for _ in range(3):
        folo.schedule(state)
    assert state.heap.num_free == free
    assert all(a is b for a, b in zip(pytree.tree_leaves(state), leaves, strict=True))
    assert folo.outputs(finish_all(tiny, state)) == folo.outputs(finish_all(tiny, started(tiny, steps=2)))


def test_a_batch_of_another_state_is_refused(tiny: folo.Params) -> None:
    state = started(tiny)
    batch = folo.schedule(state)
    assert batch is not None
    later, _ = folo.step(tiny, state, batch)
    with pytest.raises(folo.StaleBatchError, match="another state"):
        folo.step(tiny, later, batch)
    with pytest.raises(folo.StaleBatchError, match="nothing left"):
        folo.step(tiny, later, None)  # pyright: ignore[reportArgumentType]


def test_other_parameters_are_refused(tiny: folo.Params) -> None:
    state = started(tiny)
    batch = folo.schedule(state)
    assert batch is not None
    with pytest.raises(folo.ParamsMismatchError, match="other parameters"):
        folo.step(replace(tiny), state, batch)


@pytest.mark.parametrize("op", ["linear", "paged_attention", "qk_norm_rope_write", "decoder_layers", "draw"])
def test_a_step_that_fails_leaves_the_state_to_go_on_from(
    tiny_dir: Path, monkeypatch: pytest.MonkeyPatch, op: str
) -> None:
    from folo import ops

    tiny = folo.load(tiny_dir, pack=op == "decoder_layers", use_tqdm=False)
    state = started(tiny, block_size=8)
    expected = folo.outputs(finish_all(tiny, state))
    real, calls = getattr(ops, op), 0

    def failing(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > 1 or op in ("decoder_layers", "draw"):
            raise RuntimeError("injected")
        return real(*args)

    free = state.heap.num_free
    with monkeypatch.context() as patch:
        patch.setattr(ops, op, failing)
        for _ in range(3):
            with pytest.raises(RuntimeError, match="injected"):
                next_step(tiny, state)
            calls = 0
    assert state.heap.num_free == free
    folo.check(state)
    assert folo.outputs(finish_all(tiny, state)) == expected


def test_a_state_is_a_pytree_that_round_trips(tiny: folo.Params) -> None:
    state = started(tiny)
    leaves, spec = pytree.tree_flatten(state)
    again = pytree.tree_unflatten(leaves, spec)
    folo.check(again)
    assert pytree.tree_structure(again) == spec
    assert folo.outputs(finish_all(tiny, again)) == folo.outputs(finish_all(tiny, state))


def test_tokens_say_whose_they_are(tiny: folo.Params) -> None:
    quiet = folo.SamplingParams(temperature=1.0, max_tokens=4, n=2, ignore_eos=True)
    state = folo.init(tiny, folo.CacheConfig(num_blocks=16))
    state = folo.submit(state, folo.Request(prompt(5), quiet, "quiet"))
    state, tokens = next_step(tiny, state)
    assert tokens.logprobs is None
    state = folo.submit(state, folo.Request(prompt(6), ROUGH, "scored"))
    history: dict[tuple[str, int], list[int]] = {}
    while folo.has_unfinished(state):
        for id, sample, token in zip(
            tokens.request_ids, tokens.sample_indices, tokens.ids.tolist(), strict=True
        ):
            history.setdefault((id, sample), []).append(token)
        state, tokens = next_step(tiny, state)
        if tokens.logprobs is not None:
            asked = torch.tensor([id == "scored" for id in tokens.request_ids])
            assert torch.equal(asked, ~tokens.logprobs.isnan())
    for id, sample, token in zip(tokens.request_ids, tokens.sample_indices, tokens.ids.tolist(), strict=True):
        history.setdefault((id, sample), []).append(token)
    for id, output in folo.outputs(state).items():
        for completion in output.outputs:
            assert history[id, completion.index] == completion.token_ids


def test_tokens_are_compared_without_looking_at_the_device(tiny: folo.Params) -> None:
    state = started(tiny)
    (_, first), (_, second) = next_step(tiny, state), next_step(tiny, state)
    assert torch.equal(first.ids, second.ids)
    assert first == first
    assert first != second
    assert len({first, second}) == 2


def test_values_that_hold_much_are_written_in_a_line(tiny: folo.Params) -> None:
    """As messages do with an argument that is the wrong one."""
    state = started(tiny, 2, steps=1)
    batch = folo.schedule(state)
    assert repr(state) == "EngineState(running=2, waiting=0, finished=0, steps=1)"
    assert repr(batch) == "Batch([('0', 0, 1, 2), ('1', 0, 5, 6)], preempted=[])"
    assert repr(tiny) == f"Params(config={tiny.config!r})"
    swapped: Any = (tiny, batch, state)
    with pytest.raises(
        folo.StaleBatchError, match=r"the batch is EngineState\(running=2, .*\), not one that"
    ):
        folo.step(*swapped)
