"""The KV heap: a block lives as long as a reference to it, and a slot is written once."""

from __future__ import annotations

import copy
import gc
import multiprocessing
import pickle
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import torch
from engine import finish_all, prompt, stepped

import folo
from folo.state.heap import Block, KVHeap


def small_heap() -> KVHeap:
    return KVHeap((2, 3, 8, 2, 4), torch.float32, torch.device("cpu"))


def test_a_block_is_free_again_when_its_last_reference_goes() -> None:
    heap = small_heap()
    block = heap.allocate()
    alias, index = block, block.index
    block.claimed = 5
    del block
    assert heap.num_free == 2
    del alias
    assert heap.num_free == 3
    again = heap.allocate()
    assert (again.index, again.claimed) == (index, 0)


def interrupted(run: Callable[[], object], at: int) -> KeyboardInterrupt | None:
    """The interrupt before the `at`-th instruction of the heap or of this file; None if none came."""
    left = at

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal left
        if frame.f_globals.get("__name__") not in (KVHeap.__module__, __name__):
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            left -= 1
            if left == 0:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys._getframe().f_trace_opcodes = True  # Python 3.12 asks for it when tracing begins
    sys.settrace(trace)
    try:
        run()
    except KeyboardInterrupt as interrupt:
        return interrupt
    finally:
        sys.settrace(before)
    return None


def test_no_block_is_lost_by_an_interrupt_wherever_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    ignored: list[object] = []  # what Python swallows: an interrupt that nobody would learn of
    monkeypatch.setattr(sys, "unraisablehook", ignored.append)
    heap = small_heap()

    def allocate_and_drop() -> None:
        blocks = [heap.allocate(), heap.allocate()]
        del blocks[0]
        blocks.append(heap.allocate())

    count = 0
    while interrupted(allocate_and_drop, count := count + 1):
        assert heap.num_free == 3, f"after an interrupt at instruction {count}"
    assert count > 60
    assert heap.num_free == 3
    assert not ignored


def test_a_block_that_only_the_interrupts_traceback_holds_is_not_given_out_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The traceback may go at any time: here while its block's index is being given to another block."""
    count = 0
    held: list[KeyboardInterrupt] = []

    def new_block(index: int) -> Block:
        held.clear()
        return Block(index)

    while interrupt := interrupted((heap := small_heap()).allocate, count := count + 1):
        held.append(interrupt)
        del interrupt
        with monkeypatch.context() as patch:
            patch.setattr("folo.state.heap.Block", new_block)
            blocks = [heap.allocate() for _ in range(3)]
        assert sorted(block.index for block in blocks) == [0, 1, 2], f"interrupted at instruction {count}"
        assert heap.num_free == 0
    assert count > 40


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_a_heap_can_be_copied_with_its_blocks(copied: Callable[[Any], Any]) -> None:
    heap = small_heap()
    blocks = [heap.allocate(), heap.allocate(), heap.allocate()]
    del blocks[1]
    other, (first, second) = copied((heap, blocks))
    assert [first.index, second.index] == [block.index for block in blocks]
    assert other.num_free == heap.num_free == 1
    del first
    assert other.num_free == 2
    assert heap.num_free == 1
    del blocks[0]
    assert (other.num_free, heap.num_free) == (2, 2)
    assert other.allocate().index != second.index


def leave_in_a_cycle(heap: KVHeap) -> None:
    cycle: list[object] = [heap.allocate()]
    cycle.append(cycle)


def test_blocks_in_reference_cycles_are_found_before_the_heap_gives_up() -> None:
    heap = small_heap()
    gc.collect()
    gc.disable()
    try:
        for _ in range(3):
            leave_in_a_cycle(heap)
        assert heap.num_free == 0
        assert heap.allocate().index in range(3)
    finally:
        gc.enable()


def test_heap_memory_is_zero_aligned_and_untouched_until_used() -> None:
    heap = KVHeap((4, 4096, 64, 8, 64), torch.bfloat16, torch.device("cpu"))  # 2 x 1 GiB, mapped only
    assert heap.k.data_ptr() % 64 == heap.v.data_ptr() % 64 == 0
    assert not heap.k[3, 4095].any()


def test_an_exhausted_heap_names_who_holds_the_blocks_and_the_way_out(tiny: folo.Params) -> None:
    cache = folo.CacheConfig(block_size=8, num_blocks=8)
    state = folo.init(tiny, cache, folo.SchedulerConfig(max_num_seqs=1, max_num_batched_tokens=8))
    one = folo.SamplingParams(max_tokens=1)
    held = []
    while state.heap.num_free > 1:  # each state that is kept pins the blocks of a prompt of its own
        held.append(state)
        state = folo.submit(state, folo.Request(prompt(9, len(held)), one, str(len(held))))
        state = finish_all(tiny, state)
    state = folo.submit(state, folo.Request(prompt(9, 0), one, "last"))
    with pytest.raises(folo.OutOfBlocksError, match=r"pinned by \d+ older states.*reserve_blocks"):
        finish_all(tiny, state)
    # Nothing is lost: with the older states dropped, the one at hand goes on.
    held.clear()
    assert not folo.has_unfinished(finish_all(tiny, state))


def test_an_exhausted_heap_counts_the_blocks_of_each_who_holds_some(tiny: folo.Params) -> None:
    one = folo.SamplingParams(max_tokens=1)

    def ended(state: folo.EngineState, seed: int) -> folo.EngineState:
        return finish_all(tiny, folo.submit(state, folo.Request(prompt(9, seed), one, str(seed))))

    cache = folo.CacheConfig(block_size=8, num_blocks=8)
    scheduler = folo.SchedulerConfig(max_num_seqs=1, max_num_batched_tokens=8)
    state = folo.init(tiny, cache, scheduler)
    elsewhere = ended(folo.init(tiny, cache, scheduler), 0)
    held = [ended(state, seed) for seed in range(state.heap.num_free - 1)]  # each leaves a full block
    state = stepped(tiny, folo.submit(held[0], folo.Request(prompt(9, 99), one, "last")))
    batch = folo.schedule(state)
    assert batch is not None
    message = "2 by the state being stepped, 9 pinned by 9 older states that are still held, 0 by the step"
    with pytest.raises(folo.OutOfBlocksError, match=message):
        folo.step(tiny, state, batch)
    folo.check(elsewhere)


def test_stepping_one_state_twice_writes_each_slot_once(tiny: folo.Params) -> None:
    state = folo.init(tiny, folo.CacheConfig(block_size=8, num_blocks=8))
    state = folo.submit(state, folo.Request(prompt(11), folo.SamplingParams(temperature=0)))
    batch = folo.schedule(state)
    assert batch is not None
    state, _ = folo.step(tiny, state, batch)  # 11 of 16 slots are claimed
    batch = folo.schedule(state)
    assert batch is not None
    (tail,) = {s.table.blocks[-1] for s in state.running}
    first, _ = folo.step(tiny, state, batch)
    assert first.running[0].table.blocks[-1] is tail, "the first to write goes on in place"
    assert tail.claimed == 4
    before = state.heap.k[:, tail.index].clone()
    second, _ = folo.step(tiny, state, batch)
    copy = second.running[0].table.blocks[-1]
    assert copy is not tail, "the second takes a copy"
    assert second.running[0].table.blocks[0] is state.running[0].table.blocks[0], "and shares the rest"
    assert torch.equal(state.heap.k[:, tail.index], before)
    assert torch.equal(state.heap.k[:, copy.index, :4], before[:, :4])
    assert first.pool.used == second.pool.used == 2


def _fill(memory: torch.Tensor) -> None:
    memory.fill_(1)


def test_a_forked_process_has_a_heap_of_its_own() -> None:
    heap = KVHeap((1, 2, 8, 1, 4), torch.float32, torch.device("cpu"))
    child = multiprocessing.get_context("fork").Process(target=_fill, args=(heap.k,))
    child.start()
    child.join()
    assert child.exitcode == 0
    assert not heap.k.any()
