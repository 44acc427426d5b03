"""The integrity of a state, recounted from scratch."""

from __future__ import annotations

from collections import Counter

from folo.errors import IntegrityError
from folo.state.engine import EngineState
from folo.state.flight import landed_or_before
from folo.state.heap import Block
from folo.state.pool import ROOT, block_digest
from folo.state.sequence import Sequence


def check(state: EngineState) -> None:
    """Verify that the parts of a state agree with each other; O(all that it holds).

    Raises:
        IntegrityError: they do not; the message says which. No sequence of folo's own calls leads there.
    """
    state = landed_or_before(state)
    _check_queues(state)
    for sequence in state.running:
        _check_running(state, sequence)
    _check_pool(state)


def _require(ok: bool, what: str) -> None:
    if not ok:
        raise IntegrityError(f"the state contradicts itself: {what}")


def _check_queues(state: EngineState) -> None:
    for name, queue in (("running", state.running), ("waiting", state.waiting)):
        ranks = [state.rank(sequence) for sequence in queue]
        _require(ranks == sorted(ranks), f"{name} is out of order")
    _require(len(state.running) <= state.scheduler.max_num_seqs, "more sequences run than max_num_seqs")
    unfinished = [*state.running, *state.waiting]
    ended = [s for held in state.all_held() for s in held.ended]
    keys = Counter(s.key for s in (*unfinished, *ended))
    _require(all(count == 1 for count in keys.values()), "a sequence stands in two places")
    samples = Counter(id for id, _ in keys)
    for sequence in unfinished:
        _require(sequence.finish_reason is None, f"{sequence.id!r} has finished and is still queued")
        _require(sequence.id in state.requests, f"{sequence.id!r} is queued, but not among the requests")
    for sequence in (*state.waiting, *ended):
        vacant = not sequence.table.blocks and not sequence.num_computed
        _require(vacant, f"{sequence.id!r} does not run, yet holds blocks")
    for held in state.all_held():
        id, known = held.request.id, samples[held.request.id]
        _require(known == held.num_samples, f"{id!r} has {known} of {held.num_samples} samples")
        queue = state.finished if held.finished else state.requests
        _require(queue.get(id) is held, f"{id!r} is misfiled")


def _check_running(state: EngineState, sequence: Sequence) -> None:
    name, size = f"{sequence.id!r} sample {sequence.origin.sample}", state.cache.block_size
    blocks, computed = sequence.table.blocks, sequence.num_computed
    _require(0 < computed < len(sequence.tokens), f"{name} has {computed} of {len(sequence.tokens)} computed")
    _require(len(blocks) == -(-computed // size), f"{name} holds {len(blocks)} blocks for {computed} tokens")
    _require(len({b.index for b in blocks}) == len(blocks), f"{name} holds a block twice")
    for number, block in enumerate(blocks):
        filled = min(size, computed - number * size)
        _require(block.claimed >= filled, f"{name} has {filled} tokens in {block}")
    parent, salt = ROOT, sequence.origin.request.cache_salt
    for number, digest in enumerate(sequence.digests):
        expected = block_digest(parent, sequence.tokens[number * size : (number + 1) * size], salt)
        _require(digest == expected, f"{name} has a wrong digest for block {number}")
        content = blocks[number].content if number < computed // size else None
        _require(
            content is None or content.digest == digest, f"{name} holds a block of other content at {number}"
        )
        parent = digest


def _check_pool(state: EngineState) -> None:
    pool = state.pool
    objects: dict[int, Block] = {}
    before: dict[int, int | None] = {}  # the predecessor of each used block
    ways: Counter[int] = Counter()  # ends of tables and blocks that follow
    for sequence in state.running:
        last = None
        for block in sequence.table.blocks:
            _require(objects.setdefault(block.index, block) is block, f"two objects stand for {block}")
            if block.index not in before and last is not None:
                ways[last] += 1
            known = before.setdefault(block.index, last)
            _require(known == last, f"{block} follows two blocks, {known} and {last}")
            last = block.index
        if last is not None:
            ways[last] += 1
    _check_index(state, objects)
    _require(pool.used == len(before), f"{len(before)} blocks are in use, {pool.used} accounted for")
    branches = {i: n for i, n in ways.items() if n > 1}
    _require(dict(pool.branches.items()) == branches, "the ways on from the blocks do not add up")
    idle = {block.index for _, block in pool.index.items()} - before.keys()
    _require(set(pool.idle) == idle, f"{len(idle)} blocks are idle, {len(pool.idle)} accounted for")
    inverse = {stamp: i for i, stamp in pool.idle.items()}
    released = {stamp: block.index for stamp, block in pool.released.items()}
    _require(released == inverse, "the order of eviction differs from the idle blocks")
    _require(all(pool.oldest <= stamp < pool.clock for stamp in inverse), "a stamp is out of range")
    _require(pool.used + len(pool.idle) <= pool.capacity, "more blocks are held than the pool has")


def _check_index(state: EngineState, objects: dict[int, Block]) -> None:
    index = state.pool.index
    for digest, block in index.items():
        content = block.content
        _require(objects.setdefault(block.index, block) is block, f"two objects stand for {block}")
        _require(content is not None and content.digest == digest, f"{block} is indexed under a wrong digest")
        _require(block.claimed == state.cache.block_size, f"{block} is indexed, but not full")
        parent = ROOT if content is None else content.parent
        _require(parent == ROOT or parent in index, f"the parent of {block} was evicted first")
    _require(all(0 <= i < state.heap.num_blocks for i in objects), "a block lies outside the heap")
