"""Nothing piles up: not blocks, not memory, not objects, over many requests."""

from __future__ import annotations

import gc
import random
import sys
import weakref

import pytest
import torch
from engine import finish_all, prompt

import folo
from folo.inputs import NO_LOGPROBS, Inputs, Rows
from folo.model import device
from folo.model.forward import layer_in_heap
from folo.step import launched

WARM_UP = 5_000


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random tokens in place of the device function's: the host side is what could leak."""
    numbers = random.Random(0)

    def run(params: folo.Params, k: object, v: object, inputs: Inputs, *_: object) -> torch.Tensor:
        return torch.empty(sum(len(tile.target) for tile in inputs.rows), 0)

    def row_logits(
        params: folo.Params, hidden: torch.Tensor, rows: Rows
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return hidden, hidden

    def sample(raw: torch.Tensor, processed: torch.Tensor, rows: Rows) -> device.Sampled:
        assert rows.num_logprobs == NO_LOGPROBS
        ids = numbers.choices(range(3, 300), k=len(rows.target))
        return device.Sampled(torch.tensor(ids))

    for name, function in (("run", run), ("row_logits", row_logits), ("sample", sample)):
        monkeypatch.setattr(device, name, function)


def serve(params: folo.Params, state: folo.EngineState, count: int, first: int) -> folo.EngineState:
    """`count` requests of mixed lengths, a few at a time, some aborted. The caller holds the first state."""
    numbers = random.Random(first)
    left = iter(range(first, first + count))
    while True:
        while len(state.waiting) < 4 and (n := next(left, None)) is not None:
            ids = prompt(numbers.choice((3, 8, 20, 33)), seed=n % 50)
            sampling = folo.SamplingParams(max_tokens=numbers.choice((1, 3, 9)), n=1 + (n % 7 == 0))
            state = folo.submit(state, folo.Request(ids, sampling, str(n)))
        batch = folo.schedule(state)
        if batch is None:
            return state
        state, tokens = folo.step(params, state, batch)
        if tokens.request_ids and numbers.random() < 0.1 and tokens.request_ids[0] in state.requests:
            state = folo.abort(state, tokens.request_ids[0])
        state, _ = folo.collect(state)


@pytest.mark.no_cover
@pytest.mark.usefixtures("no_model")
def test_20_000_requests_leave_no_block_no_object_and_no_memory_behind(tiny: folo.Params) -> None:
    cache = folo.CacheConfig(block_size=8, num_blocks=16, reserve_blocks=16)
    state = folo.init(tiny, cache, folo.SchedulerConfig(max_num_seqs=6, max_num_batched_tokens=64))
    heap = state.heap
    counts: list[int] = []
    memory: list[int] = []
    for first in range(0, 20_000, WARM_UP):
        state = serve(tiny, state, WARM_UP, first)
        folo.check(state)
        numbers = folo.stats(state)
        assert (numbers.running, numbers.waiting, numbers.finished) == (0, 0, 0)
        assert numbers.blocks_used == 0
        assert numbers.blocks_free + numbers.blocks_cached == 16
        gc.collect()
        assert heap.num_free == heap.num_blocks - numbers.blocks_cached
        counts.append(len(gc.get_objects()))
        memory.append(sys.getallocatedblocks())
    assert max(counts[1:]) < counts[0] + 200, f"objects alive after each 5,000 requests: {counts}"
    assert max(memory[1:]) < memory[0] + 1000, f"blocks of memory after each 5,000 requests: {memory}"
    assert state.counters.preemptions > 0
    del state
    assert heap.num_free == heap.num_blocks


def test_requests_with_a_model_end_with_every_block_free_or_cached(tiny: folo.Params) -> None:
    cache = folo.CacheConfig(block_size=8, num_blocks=24, reserve_blocks=24)
    state = folo.init(tiny, cache, folo.SchedulerConfig(max_num_seqs=6, max_num_batched_tokens=64))
    heap = state.heap
    state = finish_all(tiny, serve(tiny, state, 300, 0))
    numbers = folo.stats(state)
    assert numbers.blocks_used == 0
    assert heap.num_free == heap.num_blocks - numbers.blocks_cached
    del state
    assert heap.num_free == heap.num_blocks


@pytest.mark.parametrize("penalty", [1.0, 1.1])  # with one, the next step's plan waits for the tokens
def test_a_step_in_flight_keeps_no_state_but_the_one_before_it(tiny: folo.Params, penalty: float) -> None:
    step = launched(layer_in_heap)
    state = folo.init(
        tiny, folo.CacheConfig(block_size=8, num_blocks=24), folo.SchedulerConfig(max_num_seqs=2)
    )
    sampling = folo.SamplingParams(seed=1, max_tokens=9, ignore_eos=True, repetition_penalty=penalty)
    for n in range(6):
        state = folo.submit(state, folo.Request(prompt(9, n), sampling, str(n)))
    states = []
    while (batch := folo.schedule(state)) is not None:
        states.append(weakref.ref(state))
        state, _ = step(tiny, state, batch)
        del batch
        assert sum(older() is not None for older in states) <= 1
    assert len(states) > 25
