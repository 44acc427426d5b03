"""Who holds the blocks of an exhausted heap: the message of the error that says so."""

from __future__ import annotations

import gc

from folo.errors import OutOfBlocksError
from folo.state.engine import EngineState


def blocks_of(state: EngineState) -> set[int]:
    """The indices of all blocks that a state refers to, used or cached."""
    tables = {block.index for sequence in state.running for block in sequence.table.blocks}
    return tables | {block.index for _, block in state.pool.index.items()}


def out_of_blocks(state: EngineState) -> OutOfBlocksError:
    """The error for a step of `state` that found no free block. Looks at every object there is: slow."""
    heap, mine = state.heap, blocks_of(state)
    others = (o for o in gc.get_objects() if type(o) is EngineState and o.heap is heap)
    pinning = [blocks for other in others if (blocks := blocks_of(other) - mine)]
    pinned = set[int]().union(*pinning)
    rest = heap.num_blocks - len(mine) - len(pinned)
    return OutOfBlocksError(
        f"all {heap.num_blocks} blocks of the KV heap are in use: {len(mine)} by the state being stepped, "
        f"{len(pinned)} pinned by {len(pinning)} older states that are still held, {rest} by the step itself "
        f"and by what tracebacks and outputs hold; drop some of the states, or give CacheConfig a larger "
        f"reserve_blocks"
    )
