"""A state in numbers."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from folo.state.engine import EngineState
from folo.state.flight import landed_or_before


@dataclass(frozen=True)
class Stats:
    """Sequences by where they stand, blocks by who holds them, and what has happened so far.

    Of `num_blocks` blocks, used ones are in some block table (shared ones in several), cached ones
    only in the prefix index, from which they may be evicted, and free ones in neither.
    """

    running: int
    waiting: int
    finished: int  # requests
    num_blocks: int
    blocks_used: int
    blocks_shared: int
    blocks_cached: int
    blocks_free: int
    kv_use: float  # filled slots over all slots of the used blocks; 1 where none is used
    hit_rate: float  # tokens found in the prefix cache over tokens looked up; 0 before the first
    preemptions: int
    steps: int


def stats(state: EngineState) -> Stats:
    """Count what a state holds; O(entries of all block tables)."""
    state = landed_or_before(state)
    size, pool, counters = state.cache.block_size, state.pool, state.counters
    tables = Counter(block.index for sequence in state.running for block in sequence.table.blocks)
    used, cached = pool.used, len(pool.idle)
    return Stats(
        running=len(state.running),
        waiting=len(state.waiting),
        finished=len(state.finished),
        num_blocks=pool.capacity,
        blocks_used=used,
        blocks_shared=sum(count > 1 for count in tables.values()),
        blocks_cached=cached,
        blocks_free=pool.capacity - used - cached,
        kv_use=sum(state.filled().values()) / (used * size) if used else 1.0,
        hit_rate=counters.prefix_hits / counters.prefix_queries if counters.prefix_queries else 0.0,
        preemptions=counters.preemptions,
        steps=counters.steps,
    )
