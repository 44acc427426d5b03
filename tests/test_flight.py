"""What a loop over steps in flight costs, and what is left of it when a step finds no token.

That its outputs are those of eager steps is tested in test_graph.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engine import finish_all, prompt
from torch import Tensor

import folo
from folo.model.forward import layer_in_heap
from folo.sampling import Context
from folo.state.engine import margin
from folo.step import launched

STEP = launched(layer_in_heap)


def one_step(state: folo.EngineState) -> folo.EngineState:
    batch = folo.schedule(state)
    assert batch is not None
    return STEP(state.params, state, batch)[0]


def run(state: folo.EngineState) -> folo.EngineState:
    while (batch := folo.schedule(state)) is not None:
        state, _ = STEP(state.params, state, batch)
    return state


def as_on_cuda(cache: folo.CacheConfig, scheduler: folo.SchedulerConfig) -> folo.CacheConfig:
    """With as many blocks for steps in flight as a GPU's heap has."""
    more = margin(cache, scheduler, torch.device("cuda")) - margin(cache, scheduler, torch.device("cpu"))
    return folo.CacheConfig(block_size=cache.block_size, num_blocks=cache.num_blocks, reserve_blocks=more)


@pytest.mark.parametrize(("seqs", "budget", "count"), [(2, 128, 20), (3, 200, 30), (8, 64, 30)])
def test_a_linear_loop_never_runs_out_of_blocks(
    tiny: folo.Params, seqs: int, budget: int, count: int
) -> None:
    """Prefills behind prefills, whose sources are held until they have landed."""
    scheduler = folo.SchedulerConfig(max_num_seqs=seqs, max_num_batched_tokens=budget)
    cache = as_on_cuda(folo.CacheConfig(block_size=8, num_blocks=32), scheduler)
    state = folo.init(tiny, cache, scheduler)
    for n in range(count):
        sampling = folo.SamplingParams(max_tokens=1 + n % 3, temperature=1, seed=n)
        state = folo.submit(state, folo.Request(prompt(20 + 37 * n % 90, n), sampling, f"r{n}"))
    outputs = folo.outputs(run(state))
    assert all(output.finished for output in outputs.values())


def test_sequences_that_preempt_one_another_come_to_the_tokens_of_eager_steps(tiny: folo.Params) -> None:
    scheduler = folo.SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=32)
    cache = as_on_cuda(folo.CacheConfig(block_size=8, num_blocks=8), scheduler)
    state = folo.init(tiny, cache, scheduler)
    for n in range(4):
        sampling = folo.SamplingParams(max_tokens=20, seed=n, ignore_eos=True)
        state = folo.submit(state, folo.Request(prompt(9, n), sampling, f"r{n}"))
    expected, behind = folo.outputs(finish_all(tiny, state)), 0
    while (batch := folo.schedule(state)) is not None:
        behind += batch.behind is not None
        state, _ = STEP(tiny, state, batch)
        folo.check(state)
    assert behind
    assert folo.stats(state).preemptions
    outputs = folo.outputs(state)
    assert {id: output.outputs for id, output in outputs.items()} == {
        id: output.outputs for id, output in expected.items()
    }


def test_an_exhausted_heap_counts_blocks_of_a_step_in_flight_with_the_state_that_holds_it(
    tiny: folo.Params,
) -> None:
    cache = folo.CacheConfig(block_size=8, num_blocks=8)
    empty = folo.init(tiny, cache, folo.SchedulerConfig(max_num_seqs=1, max_num_batched_tokens=16))
    one = folo.SamplingParams(max_tokens=1)
    older = one_step(folo.submit(empty, folo.Request(prompt(9, 0), one, "older")))
    state = empty
    for n in (1, 2):
        state = folo.submit(state, folo.Request(prompt(9, n), one, str(n)))
    state = one_step(state)  # its two blocks are in flight only, and once that has landed one of them is idle
    others = [state.heap.allocate() for _ in range(state.heap.num_free - 1)]
    batch = folo.schedule(state)
    assert batch is not None
    with pytest.raises(folo.OutOfBlocksError) as caught:
        STEP(tiny, state, batch)
    assert str(caught.value).startswith(
        "all 12 blocks of the KV heap are in use: 2 by the state being stepped, 2 pinned by 1 older states "
        "that are still held, 8 by the step itself"
    )
    del caught, batch
    others.clear()
    assert [len(folo.outputs(run(held))) for held in (older, state)] == [1, 2]


def test_histories_are_not_copied(tiny: folo.Params) -> None:
    state = folo.init(tiny, folo.CacheConfig(num_blocks=60), folo.SchedulerConfig(max_num_seqs=4))
    for n in range(4):
        sampling = folo.SamplingParams(max_tokens=12, ignore_eos=True)
        state = folo.submit(state, folo.Request(prompt(20, n), sampling, f"r{n}"))
    before = {s.id: s.tokens for s in state.waiting}
    for _ in range(8):
        state = one_step(state)
    assert len(state.running) == 4
    for sequence in state.running:
        assert sequence.num_output >= 6
        assert before[sequence.id].continued_by(sequence.tokens)


def nothing(logits: Tensor, context: Context) -> Tensor:
    return torch.full_like(logits, -torch.inf) if context.position == 10 else logits


READERS: dict[str, Callable[[folo.EngineState], object]] = {
    "has_unfinished": folo.has_unfinished,
    "outputs": folo.outputs,
    "collect": folo.collect,
    "check": folo.check,
    "stats": folo.stats,
    "fork": lambda state: folo.fork(state, "good", ["child"]),
    "extend": lambda state: folo.extend(state, "good", [5]),
    "rebind": lambda state: folo.rebind(state, state.params),
}


@pytest.mark.parametrize("reader", READERS)
def test_a_state_whose_step_found_no_token_is_the_one_from_before_it(tiny: folo.Params, reader: str) -> None:
    """For all but `schedule`, which raises: as after an error in an eager step."""
    state = folo.init(tiny, folo.CacheConfig(num_blocks=60))
    state = folo.submit(state, folo.Request(prompt(9), folo.SamplingParams(max_tokens=9), "good"))
    bad = folo.SamplingParams(max_tokens=9, logits_processors=(nothing,))
    state = folo.submit(state, folo.Request(prompt(8, 1), bad, "bad"))
    before = state
    for _ in range(3):
        before, state = state, one_step(state)
    with pytest.raises(folo.RequestError, match="'bad'"):
        folo.schedule(state)
    READERS[reader](state)
    assert folo.outputs(state) == folo.outputs(before)
    assert state.flight is not None
    state = folo.abort(state, "bad")
    folo.check(state)
    assert len(folo.outputs(run(state))["good"].outputs[0].token_ids) == 9


def engine(path: Path, **options: Any) -> folo.LLM:
    llm = folo.LLM(str(path), num_blocks=60, reserve_blocks=60, max_num_seqs=4, use_tqdm=False, **options)
    llm._step = STEP
    return llm


def finished(llm: folo.LLM) -> folo.RequestOutput:
    outputs = []
    while llm.has_unfinished_requests():
        outputs = llm.step()
    return outputs[0]


def test_closed_streams_leave_no_clock(tiny_dir: Path) -> None:
    llm = engine(tiny_dir)
    llm.add_request("other", prompt(5), folo.SamplingParams(max_tokens=60, ignore_eos=True))
    for n in range(3):
        stream = llm.stream(prompt(6, n), folo.SamplingParams(max_tokens=30, ignore_eos=True))
        next(stream)
        stream.close()
        llm.step()
    assert set(llm._clocks) == {"other"}
    last = finished(llm)
    assert llm._clocks == {}
    metrics, count = last.metrics, 60
    seconds = metrics["ttft"] + metrics["tpot"] * (count - 1)
    assert metrics["throughput"] * seconds == pytest.approx(count), "every token was counted once"


def test_tokens_of_a_step_that_found_none_are_not_counted(tiny_dir: Path) -> None:
    llm = engine(tiny_dir)
    llm.add_request("good", prompt(9), folo.SamplingParams(max_tokens=9, ignore_eos=True))
    llm.add_request("bad", prompt(8, 1), folo.SamplingParams(max_tokens=9, logits_processors=(nothing,)))
    with pytest.raises(folo.RequestError, match="'bad'"):
        finished(llm)
    llm.abort_request("bad")
    assert set(llm._clocks) == {"good"}
    counted = llm._clocks["good"].num_tokens
    assert counted == len(folo.outputs(llm.state)["good"].outputs[0].token_ids)


def test_an_engine_shows_the_text_of_the_state_that_it_is_given(tiny_dir: Path) -> None:
    """Also where the same request comes to other tokens there, as with another engine seed."""
    llm = folo.LLM(str(tiny_dir), num_blocks=60, use_tqdm=False)
    request = folo.Request(prompt(9), folo.SamplingParams(max_tokens=20, temperature=1, ignore_eos=True), "a")
    empty = llm.state
    llm.state = folo.submit(empty, request)
    for _ in range(4):
        llm.step()
    other = folo.init(llm.params, folo.CacheConfig(num_blocks=60), tokenizer=llm.tokenizer, seed=1)
    other = folo.submit(other, request)
    for _ in range(6):
        batch = folo.schedule(other)
        assert batch is not None
        other, _ = folo.step(llm.params, other, batch)
    llm.state = other
    (shown,) = llm.step()
    (held,) = folo.outputs(llm.state).values()
    assert shown.outputs[0].text == held.outputs[0].text
