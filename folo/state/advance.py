"""The host epilogue of a step: what it computed becomes the next state."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass, replace
from typing import Any

from folo import detokenize
from folo.state.bind import Bound
from folo.state.engine import Counters, EngineState
from folo.state.evolve import evolve
from folo.state.heap import Content
from folo.state.layout import Row
from folo.state.pool import ROOT, Pool, extend_digests
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
    state, size, caching = batch.state, batch.state.cache.block_size, batch.state.cache.enable_prefix_caching
    pool = bound.pool
    changed: dict[int, Sequence] = {}  # by id() of the sequence in the old state
    ended: list[Sequence] = []
    admitted: list[Sequence] = []
    hits = queries = at = 0
    num_rows = len(rows)
    for number, (item, table) in enumerate(zip(batch.scheduled, bound.tables, strict=True)):
        before, start, end = item.sequence, item.start, item.end
        if before.digests.length and end // size > start // size:
            table, pool = _index(item, table, pool, size)
        changes: dict[str, Any] = {"table": table, "num_computed": end}
        if item.admitted:
            if item.hits and caching:
                queries, hits = queries + before.tokens.length, hits + start
            if before.num_cached is None:
                changes["num_cached"] = start
        while at < num_rows and rows[at].number == number:
            row, scores = rows[at], results.scores[at]
            if scores is not None:
                _score(before, row, scores, changes)
            if row.target < 0:
                _append(state, before, results.ids[at], changes)
            at += 1
        sequence = evolve(before, **changes)
        if sequence.finish_reason is not None:
            pool = pool.release(sequence.table.blocks)
            ended.append(sequence.ended(sequence.finish_reason, sequence.stop_reason))
        elif item.admitted:
            admitted.append(sequence)
        changed[id(before)] = sequence
    gone = {id(victim) for victim in batch.preempted}
    running = [changed.get(id(s), s) for s in state.running if id(s) not in gone]
    if ended:
        running = [s for s in running if s.finish_reason is None]
    left = {id(item.sequence) for item in batch.scheduled if item.admitted}
    waiting = tuple([s for s in state.waiting if id(s) not in left]) if left else state.waiting
    evicted = [evolve(victim.vacate(), preemptions=victim.preemptions + 1) for victim in batch.preempted]
    requests, finished = settle(state, ended)
    counters = state.counters
    return evolve(
        state,
        running=queued(state, running, admitted),
        waiting=queued(state, waiting, evicted) if evicted else waiting,
        requests=requests,
        finished=finished,
        pool=pool,
        counters=Counters(
            steps=counters.steps + 1,
            preemptions=counters.preemptions + len(evicted),
            prefix_queries=counters.prefix_queries + queries,
            prefix_hits=counters.prefix_hits + hits,
        ),
    )


def _index(item: Scheduled, table: BlockTable, pool: Pool, size: int) -> tuple[BlockTable, Pool]:
    """Enter the blocks that became full into the prefix index.

    Where the index has the same content already, the table takes the indexed block instead of its
    own, if it shares that with no other: the bits are the same.
    """
    sequence, blocks = item.sequence, list(table.blocks)
    for number in range(item.start // size, min(item.end // size, len(sequence.digests))):
        if number and not pool.cached(blocks[number - 1]):
            break  # should two contents ever have one digest, what follows the second stays out
        digest = sequence.digests[number]
        parent = sequence.digests[number - 1] if number else ROOT
        token_ids = sequence.tokens[number * size : (number + 1) * size]
        mine, known = blocks[number], pool.lookup(digest, parent, token_ids)
        if known is None:
            if digest not in pool.index:
                mine.content = Content(digest, parent, tuple(token_ids))
                pool = pool.insert(mine, mine.content)
        elif known is not mine:
            if any(block.index in pool.branches for block in blocks[number:]):
                break  # another table goes through here: a block has one predecessor
            pool = pool.hold([*blocks[:number], known]).release(blocks[: number + 1])
            blocks[number] = known
    if tuple(blocks) != table.blocks:
        table = BlockTable.of(tuple(blocks))
    return table, pool


def _score(before: Sequence, row: Row, scores: TokenLogprobs, changes: dict[str, Any]) -> None:
    """One position more has its scores."""
    changes["scores"] = changes.get("scores", before.scores).append(scores)
    if not row.of_prompt:
        total = changes.get("cumulative_logprob", before.cumulative_logprob)
        changes["cumulative_logprob"] = total + scores.logprob


def _append(state: EngineState, before: Sequence, token: int, changes: dict[str, Any]) -> None:
    """One token more, and what it stops."""
    tokens, origin = before.tokens.append(token), before.origin
    changes["tokens"] = tokens
    if state.cache.enable_prefix_caching and not tokens.length % state.cache.block_size:
        salt = origin.request.cache_salt
        changes["digests"] = extend_digests(before.digests, tokens, state.cache.block_size, salt)
    if token in origin.stop_ids or tokens.length >= origin.max_length or before.text is not None:
        changes |= _stopped(state.tokenizer, before, token)


def _stopped(tokenizer: Any, sequence: Sequence, token: int) -> dict[str, Any]:
    """The text with the token and, if it is the last, why: a stop id, else a stop string, else length."""
    origin, params = sequence.origin, sequence.origin.request.sampling
    text, length = sequence.text, sequence.tokens.length + 1
    stopping = length - origin.num_prompt >= params.min_tokens
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
    if length >= origin.max_length:
        changes["finish_reason"] = "length"
    return changes
