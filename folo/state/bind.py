"""The host prologue of a step, first half: bind the plan to physical blocks."""

from __future__ import annotations

from dataclasses import dataclass

from folo.state.heap import Block
from folo.state.pool import Pool
from folo.state.schedule import Batch, Scheduled
from folo.state.sequence import BlockTable


@dataclass(frozen=True, slots=True)
class Bound:
    """A batch with its blocks: each scheduled sequence's table, the accounting, and what to copy first."""

    batch: Batch
    tables: tuple[BlockTable, ...]
    pool: Pool
    copies: tuple[tuple[Block, Block], ...]  # (source, target)


def bind(batch: Batch) -> Bound:
    """Take the blocks that the plan needs and claim the slots that it writes.

    The state is not changed; blocks taken here return to the heap if the step is not completed.

    Raises:
        OutOfBlocksError: states that are still held pin the blocks that the plan needs.
    """
    binding = _Binding(batch)
    for item in batch.scheduled:
        binding.bind(item)
    return Bound(batch, tuple(binding.tables), binding.pool, tuple(binding.copies))


class _Binding:
    def __init__(self, batch: Batch) -> None:
        self.size = batch.state.cache.block_size
        self.heap = batch.state.heap
        self.tables: list[BlockTable] = []
        self.copies: list[tuple[Block, Block]] = []
        self.pool = batch.state.pool
        self.live = self.pool.used + len(self.pool.idle)
        for victim in batch.preempted:
            self.pool = self.pool.release(reversed(victim.table.blocks))

    def bind(self, item: Scheduled) -> None:
        size, table = self.size, item.sequence.table
        if item.admitted:
            table = self._reused(item)
        blocks, offset = table.blocks, item.start % size
        # Where a slot to be written is claimed already, histories part. What one state shares is
        # copied whether or not it is claimed yet, so that its accounting cannot depend on the heap.
        if offset and (self.pool.shared(blocks[-1]) or blocks[-1].claimed > offset):
            self.pool = self.pool.release(blocks[-1:])
            (copy,) = self._take(1)
            self.copies.append((blocks[-1], copy))
            table = BlockTable.of((*blocks[:-1], copy))
        if (count := -(-item.end // size) - len(blocks)) > 0:
            table = BlockTable.of((*table.blocks, *self._take(count)))
        for number in range(item.start // size, len(table.blocks)):
            table.blocks[number].claimed = min(size, item.end - number * size)
        self.tables.append(table)

    def _reused(self, item: Scheduled) -> BlockTable:
        blocks = tuple(
            b if isinstance(b, Block) else self.tables[b.donor].blocks[b.number] for b in item.reused
        )
        for block in blocks:
            self.pool = self.pool.hold(block)
        return BlockTable.of(blocks)

    def _take(self, count: int) -> list[Block]:
        self.pool = self.pool.take(count)
        return [self.heap.allocate(self.live) for _ in range(count)]
