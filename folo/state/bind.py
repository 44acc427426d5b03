"""The host prologue of a step, first half: bind the plan to physical blocks."""

from __future__ import annotations

import gc
from dataclasses import dataclass

from folo.errors import OutOfBlocksError
from folo.state.batch import Batch
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
    size, pool = batch.state.cache.block_size, batch.state.pool
    tables, copies = list[BlockTable](), list[tuple[Block, Block]]()
    for victim in batch.preempted:
        pool = pool.release(victim.table.blocks)
    for sequence, start, end, admitted, _, reused in batch.scheduled:
        table, offset = sequence.table, start % size
        after = offset + end - start
        if offset and after <= size and not admitted:
            tail = table.blocks[-1]
            if tail.claimed == offset and not (pool.branches.length and pool.shared(tail)):
                # The fast path of nearly all decodes: more slots of a block that no other table holds.
                tail.claimed = after
                tables.append(table)
                continue
        if admitted:
            held = tuple(b if isinstance(b, Block) else tables[b.donor].blocks[b.number] for b in reused)
            pool = pool.hold(held)  # prefix hits are in it still: eviction comes last
            table = BlockTable.of(held)
        blocks = table.blocks
        # Copy on write: where a slot to be written is claimed already, another state has gone on from here.
        # What this state itself shares is copied whether or not it is claimed yet, so that the accounting
        # follows from the state, and not from what else was done with the heap.
        if offset and (pool.shared(blocks[-1]) or blocks[-1].claimed > offset):
            pool, copy = pool.part(blocks), _allocate(batch)
            copies.append((blocks[-1], copy))
            table = table.first(len(blocks) - 1).extended([copy])
        if (count := -(-end // size) - len(blocks)) > 0:
            pool, table = pool.take(count), table.extended([_allocate(batch) for _ in range(count)])
        for number in range(start // size, len(table.blocks)):
            table.blocks[number].claimed = min(size, end - number * size)
        tables.append(table)
    return Bound(batch, tables, pool.evict(), copies)


def _allocate(batch: Batch) -> Block:
    try:
        return batch.state.heap.allocate()
    except OutOfBlocksError:
        raise _out_of_blocks(batch) from None


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
