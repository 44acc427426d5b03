"""The host epilogue of a step: what it computed becomes the next state."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass, replace
from typing import Any

from folo import detokenize
from folo.state.bind import Bound
from folo.state.engine import EngineState
from folo.state.layout import Row
from folo.state.pool import ROOT, Entry, Pool, extend_digests
from folo.state.queues import queued, settle
from folo.state.sequence import BlockTable, Sequence, TokenLogprobs


@dataclass(frozen=True, slots=True)
class Results:
    """What came back for each row: the token, and its scores where the row asked for them."""

    ids: list[int]
    scores: list[TokenLogprobs | None]


def advance(bound: Bound, rows: Items[Row], results: Results) -> EngineState:
    """The state after the step, with its tokens appended and its stop conditions applied."""
    batch = bound.batch
    state, size = batch.state, batch.state.cache.block_size
    by_sequence: dict[int, list[int]] = {}
    for at, row in enumerate(rows):
        by_sequence.setdefault(row.number, []).append(at)
    pool = bound.pool
    changed: dict[int, Sequence] = {}  # by id() of the sequence in the old state
    ended: list[Sequence] = []
    hits = queries = 0
    for number, (item, table) in enumerate(zip(batch.scheduled, bound.tables, strict=True)):
        sequence = replace(item.sequence, table=table, num_computed=item.end)
        if item.admitted:
            if item.hits and state.cache.enable_prefix_caching:
                queries, hits = queries + len(sequence.tokens), hits + item.start
            if sequence.num_cached is None:
                sequence = replace(sequence, num_cached=item.start)
        if item.end // size > item.start // size:
            sequence, pool = _index(sequence, pool, item.start // size, size)
        for at in by_sequence.get(number, ()):
            sequence = _append(state, sequence, rows[at], results.ids[at], results.scores[at])
        if sequence.finish_reason is not None:
            pool = pool.release(reversed(sequence.table.blocks))
            sequence = sequence.ended(sequence.finish_reason, sequence.stop_reason)
            ended.append(sequence)
        changed[id(item.sequence)] = sequence
    gone = {id(victim) for victim in batch.preempted}
    admitted = [changed[id(item.sequence)] for item in batch.scheduled if item.admitted]
    running = [changed.get(id(s), s) for s in state.running if id(s) not in gone]
    left = {id(item.sequence) for item in batch.scheduled if item.admitted}
    waiting = tuple(s for s in state.waiting if id(s) not in left) if left else state.waiting
    evicted = [replace(victim.vacate(), preemptions=victim.preemptions + 1) for victim in batch.preempted]
    requests, finished = settle(state, ended)
    counters = state.counters
    return replace(
        state,
        running=queued(
            state,
            tuple(s for s in running if s.finish_reason is None),
            (s for s in admitted if s.finish_reason is None),
        ),
        waiting=queued(state, waiting, evicted) if evicted else waiting,
        requests=requests,
        finished=finished,
        pool=pool,
        counters=replace(
            counters,
            steps=counters.steps + 1,
            preemptions=counters.preemptions + len(evicted),
            prefix_queries=counters.prefix_queries + queries,
            prefix_hits=counters.prefix_hits + hits,
        ),
    )


def _index(sequence: Sequence, pool: Pool, first: int, size: int) -> tuple[Sequence, Pool]:
    """Enter the blocks that became full into the prefix index.

    Where the index has the same content already, the table takes the indexed block instead of its
    own: the bits are the same, and a chain's parents stay in use as long as its children are.
    """
    blocks = list(sequence.table.blocks)
    for number in range(first, min(sequence.num_computed // size, len(sequence.digests))):
        digest = sequence.digests[number]
        parent = sequence.digests[number - 1] if number else ROOT
        token_ids = sequence.tokens[number * size : (number + 1) * size]
        known = pool.lookup(digest, parent, token_ids)
        if known is None:
            if digest not in pool.index:  # a digest of other content, should one ever occur, stays
                pool = pool.insert(digest, Entry(blocks[number], parent, tuple(token_ids)))
        elif known is not blocks[number]:
            pool = pool.release((blocks[number],)).hold(known)
            blocks[number] = known
    if any(a is not b for a, b in zip(blocks, sequence.table.blocks, strict=True)):
        sequence = replace(sequence, table=BlockTable.of(tuple(blocks)))
    return sequence, pool


def _append(
    state: EngineState, sequence: Sequence, row: Row, token: int, scores: TokenLogprobs | None
) -> Sequence:
    """The sequence with the row's result: a scored prompt token, or a sampled one."""
    if row.target >= 0:
        assert scores is not None
        return replace(sequence, prompt_logprobs=sequence.prompt_logprobs.append(scores))
    origin = sequence.origin
    tokens = sequence.tokens.append(token)
    digests = sequence.digests
    if state.cache.enable_prefix_caching and not len(tokens) % state.cache.block_size:
        digests = extend_digests(digests, tokens, state.cache.block_size, origin.request.cache_salt)
    logprobs, total = sequence.logprobs, sequence.cumulative_logprob
    if scores is not None:
        logprobs, total = logprobs.append(scores), total + scores.logprob
    sequence = replace(sequence, tokens=tokens, digests=digests, logprobs=logprobs, cumulative_logprob=total)
    return _stop(state.tokenizer, sequence, token)


def _stop(tokenizer: Any, sequence: Sequence, token: int) -> Sequence:
    """With its text and, if the last token is the last, why: a stop id, else a stop string, else length."""
    origin, params = sequence.origin, sequence.origin.request.sampling
    text, may_stop = sequence.text, sequence.num_output >= params.min_tokens
    if may_stop and token in origin.stop_ids:
        chosen = token in (params.stop_token_ids or ())
        if text is not None and params.include_stop_str_in_output:
            text = detokenize.advance(tokenizer, text, (token,))
        return replace(sequence, text=text, finish_reason="stop", stop_reason=token if chosen else None)
    if text is not None:
        seen = len(text.text)
        text = detokenize.advance(tokenizer, text, (token,))
        found = detokenize.find_stop(text.text, seen, params.stop or ()) if may_stop else None
        if found is not None:
            at, stop = found
            end = at + (len(stop) if params.include_stop_str_in_output else 0)
            text = replace(text, text=text.text[:end], pending="")
            return replace(sequence, text=text, finish_reason="stop", stop_reason=stop)
        sequence = replace(sequence, text=text)
    if sequence.num_output >= origin.max_tokens:
        return replace(sequence, finish_reason="length")
    return sequence
