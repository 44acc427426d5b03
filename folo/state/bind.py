"""The host prologue of a step, first half: bind the plan to physical blocks."""

from __future__ import annotations

import gc
from dataclasses import dataclass

from folo.errors import OutOfBlocksError
from folo.state.batch import Batch, Scheduled
from folo.state.engine import EngineState
from folo.state.heap import Block
from folo.state.pool import Pool
from folo.state.sequence import BlockTable


@dataclass(frozen=True, slots=True)
class Bound:
    """A batch with its blocks: each scheduled sequence's table, the accounting, and what to copy first."""

    batch: Batch
    tables: list[BlockTable]
    pool: Pool
    copies: list[tuple[Block, Block]]  # (source, target)


def bind(batch: Batch) -> Bound:
    """Take the blocks that the plan needs and claim the slots that it writes.

    The state is not changed; blocks taken here return to the heap if the step is not completed.

    Raises:
        OutOfBlocksError: states that are still held pin the blocks that the plan needs.
    """
    binding = _Binding(batch)
    size, tables, branches = binding.size, binding.tables, binding.pool.branches
    for item in batch.scheduled:
        sequence, start, end, admitted, _, _ = item
        offset = start % size
        after = offset + end - start
        if offset and after <= size and not admitted:
            table = sequence.table
            tail = table.blocks[-1]
            if tail.claimed == offset and not (branches.length and tail.index in branches):
                # By far the most common: some slots more of a block that is the sequence's own.
                tail.claimed = after
                tables.append(table)
                continue
        tables.append(binding.table(item))
        branches = binding.pool.branches
    return Bound(batch, tables, binding.pool.evict(), binding.copies)


class _Binding:
    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self.size = batch.state.cache.block_size
        self.tables: list[BlockTable] = []
        self.copies: list[tuple[Block, Block]] = []
        self.pool = batch.state.pool
        for victim in batch.preempted:
            self.pool = self.pool.release(victim.table.blocks)

    def table(self, item: Scheduled) -> BlockTable:
        size = self.size
        table = self._reused(item) if item.admitted else item.sequence.table
        blocks, offset = table.blocks, item.start % size
        # Where a slot to be written is claimed already, histories part. What one state shares is
        # copied whether or not it is claimed yet, so that its accounting cannot depend on the heap.
        if offset and (self.pool.shared(blocks[-1]) or blocks[-1].claimed > offset):
            self.pool = self.pool.part(blocks)
            copy = self._allocate()
            self.copies.append((blocks[-1], copy))
            table = table.first(len(blocks) - 1).extended([copy])
        if (count := -(-item.end // size) - len(blocks)) > 0:
            self.pool = self.pool.take(count)
            table = table.extended([self._allocate() for _ in range(count)])
        for number in range(item.start // size, len(table.blocks)):
            table.blocks[number].claimed = min(size, item.end - number * size)
        return table

    def _reused(self, item: Scheduled) -> BlockTable:
        blocks = tuple(
            b if isinstance(b, Block) else self.tables[b.donor].blocks[b.number] for b in item.reused
        )
        self.pool = self.pool.hold(blocks)  # prefix hits are in it still: eviction comes last
        return BlockTable.of(blocks)

    def _allocate(self) -> Block:
        try:
            return self.batch.state.heap.allocate()
        except OutOfBlocksError:
            raise _out_of_blocks(self.batch) from None


def _out_of_blocks(batch: Batch) -> OutOfBlocksError:
    """The error for a step that found no free block. Looks at every object there is: slow."""
    heap, mine = batch.origin.heap, _blocks(batch.origin) | _blocks(batch.state)
    others = (o for o in gc.get_objects() if type(o) is EngineState and o.heap is heap)
    pinning = [blocks for other in others if (blocks := _blocks(other) - mine)]
    pinned = set[Block]().union(*pinning)
    rest = heap.num_blocks - len(mine) - len(pinned)
    return OutOfBlocksError(
        f"all {heap.num_blocks} blocks of the KV heap are in use: {len(mine)} by the state being stepped, "
        f"{len(pinned)} pinned by {len(pinning)} older states that are still held, {rest} by the step itself "
        f"and by what tracebacks and outputs hold; drop some of the states, or give CacheConfig a larger "
        f"reserve_blocks"
    )


def _blocks(state: EngineState) -> set[Block]:
    tables = state.flight.bound.tables if state.flight else ()
    return {*state.blocks(), *(block for table in tables for block in table.blocks)}
