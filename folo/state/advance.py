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
from folo.state.schedule import Scheduled
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
        before = item.sequence
        if item.end // size > item.start // size:
            table, pool = _index(item, table, pool, size)
        changes: dict[str, Any] = {"table": table, "num_computed": item.end}
        if item.admitted:
            if item.hits and state.cache.enable_prefix_caching:
                queries, hits = queries + len(before.tokens), hits + item.start
            if before.num_cached is None:
                changes["num_cached"] = item.start
        scored = before.prompt_logprobs
        for at in by_sequence.get(number, ()):
            if rows[at].target < 0:
                changes |= _sampled(state, before, results.ids[at], results.scores[at])
            elif (scores := results.scores[at]) is not None:
                changes["prompt_logprobs"] = scored = scored.append(scores)
        sequence = replace(before, **changes)
        if sequence.finish_reason is not None:
            pool = pool.release(reversed(sequence.table.blocks))
            sequence = sequence.ended(sequence.finish_reason, sequence.stop_reason)
            ended.append(sequence)
        changed[id(before)] = sequence
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


def _index(item: Scheduled, table: BlockTable, pool: Pool, size: int) -> tuple[BlockTable, Pool]:
    """Enter the blocks that became full into the prefix index.

    Where the index has the same content already, the table takes the indexed block instead of its
    own: the bits are the same, and a chain's parents stay in use as long as its children are.
    """
    sequence, blocks = item.sequence, list(table.blocks)
    for number in range(item.start // size, min(item.end // size, len(sequence.digests))):
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
            table = BlockTable.of(tuple(blocks))
    return table, pool


def _sampled(
    state: EngineState, sequence: Sequence, token: int, scores: TokenLogprobs | None
) -> dict[str, Any]:
    """What changes about a sequence by one more token."""
    size, salt = state.cache.block_size, sequence.origin.request.cache_salt
    tokens = sequence.tokens.append(token)
    changes = _stopped(state.tokenizer, sequence, token)
    changes["tokens"] = tokens
    if state.cache.enable_prefix_caching and not len(tokens) % size:
        changes["digests"] = extend_digests(sequence.digests, tokens, size, salt)
    if scores is not None:
        changes["logprobs"] = sequence.logprobs.append(scores)
        changes["cumulative_logprob"] = sequence.cumulative_logprob + scores.logprob
    return changes


def _stopped(tokenizer: Any, sequence: Sequence, token: int) -> dict[str, Any]:
    """The text with the token and, if it is the last, why: a stop id, else a stop string, else length."""
    origin, params = sequence.origin, sequence.origin.request.sampling
    text, count = sequence.text, sequence.num_output + 1
    stopping = count >= params.min_tokens
    if stopping and token in origin.stop_ids:
        if text is not None and params.include_stop_str_in_output:
            text = detokenize.advance(tokenizer, text, (token,))
        chosen = token in (params.stop_token_ids or ())
        return {"text": text, "finish_reason": "stop", "stop_reason": token if chosen else None}
    changes: dict[str, Any] = {}
    if text is not None:
        seen = len(text.text)
        changes["text"] = text = detokenize.advance(tokenizer, text, (token,))
        found = detokenize.find_stop(text.text, seen, params.stop or ()) if stopping else None
        if found is not None:
            at, stop = found
            end = at + (len(stop) if params.include_stop_str_in_output else 0)
            text = replace(text, text=text.text[:end], pending="")
            return {"text": text, "finish_reason": "stop", "stop_reason": stop}
    if count >= origin.max_tokens:
        changes["finish_reason"] = "length"
    return changes
