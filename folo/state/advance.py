"""The host epilogue of a step: what it computed becomes the next state."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from folo import detokenize
from folo.inputs import SAMPLE, UNRESOLVED
from folo.state.bind import Bound
from folo.state.engine import Counters, EngineState
from folo.state.evolve import draft, evolve
from folo.state.heap import Content
from folo.state.pool import ROOT, Pool, extend_digests
from folo.state.queues import queued, settle
from folo.state.sequence import BlockTable, Sequence, TokenLogprobs


@dataclass(frozen=True, slots=True)
class Results:
    """What came back for each row: the token, and its scores where the row asked for them."""

    ids: list[int]
    scores: list[TokenLogprobs | None]


def advance(state: EngineState, bound: Bound, results: Results) -> EngineState:
    """The state after a step of it, with the tokens appended and stop conditions applied.

    Tokens may be UNRESOLVED: then a sequence ends only by its length, and its last token must not be read.
    """
    batch, size, caching = bound.batch, state.cache.block_size, state.cache.enable_prefix_caching
    pool, rows = bound.pool, batch.rows
    numbers, targets = [*rows.numbers, -1], rows.targets
    ids, scored = results.ids, any(results.scores)
    changed: dict[int, Sequence] = {}  # by id() of the sequence in the old state
    ended: list[Sequence] = []
    admitted: list[Sequence] = []
    left = False  # whether one of the waiting ones was scheduled
    hits = queries = at = 0
    for number, ((before, start, end, is_admitted, are_hits, _), table) in enumerate(
        zip(batch.scheduled, bound.tables, strict=True)
    ):
        if caching and end // size > start // size:
            table, pool = _index(before, start, end, table, pool, size)
        sequence, fields = draft(before)
        fields["table"], fields["num_computed"] = table, end
        if is_admitted:
            left = True
            if are_hits and caching:  # the blocks are prefix hits
                queries, hits = queries + before.tokens.length, hits + start
            if before.num_cached is None:
                fields["num_cached"] = start
        while numbers[at] == number:
            if scored and (scores := results.scores[at]) is not None:
                fields["scores"] = fields["scores"].append(scores)
            if targets[at] == SAMPLE:
                _append(state, before, fields, ids[at])
            at += 1
        if sequence.finish_reason is not None:
            pool = pool.release(table.blocks)
            ended.append(sequence.vacate())
        elif is_admitted:
            admitted.append(sequence)
        changed[id(before)] = sequence
    running = [changed.get(id(s), s) for s in state.running]
    if batch.preempted:
        gone = {id(victim) for victim in batch.preempted}
        running = [s for s in running if id(s) not in gone]
    if ended:
        running = [s for s in running if s.finish_reason is None]
    waiting = state.waiting
    if left:
        waiting = tuple([s for s in waiting if id(s) not in changed])
    evicted = [victim.vacate() for victim in batch.preempted]
    counters = state.counters
    return evolve(
        settle(state, ended) if ended else state,
        running=queued(state, running, admitted),
        waiting=queued(state, waiting, evicted),
        pool=pool,
        counters=Counters(
            steps=counters.steps + 1,
            preemptions=counters.preemptions + len(evicted),
            prefix_queries=counters.prefix_queries + queries,
            prefix_hits=counters.prefix_hits + hits,
        ),
    )


def _append(state: EngineState, before: Sequence, fields: dict[str, Any], token: int) -> None:
    """Change the fields of a draft of `before` to those with a token more."""
    origin, length = before.origin, before.tokens.length + 1
    if token == UNRESOLVED:
        fields["tokens"] = before.tokens.longer()
        if length >= origin.max_length:
            fields["finish_reason"] = "length"
        return
    fields["tokens"] = tokens = before.tokens.append(token)
    cache = state.cache
    if cache.enable_prefix_caching and not length % cache.block_size:
        fields["digests"] = extend_digests(
            before.digests, tokens, cache.block_size, origin.request.cache_salt
        )
    if token in origin.stop_ids or length >= origin.max_length or before.text is not None:
        fields.update(_stopped(state.tokenizer, before, token))


def _index(
    sequence: Sequence, start: int, end: int, table: BlockTable, pool: Pool, size: int
) -> tuple[BlockTable, Pool]:
    """Enter the blocks that became full into the prefix index.

    Where the index has the same content already, the table takes the indexed block in place of its
    own, provided that no other table goes through its own: the bits are the same.
    """
    blocks, swapped = list(table.blocks), False
    for number in range(start // size, min(end // size, len(sequence.digests))):
        if number and not pool.cached(blocks[number - 1]):
            break  # its predecessor was left out (below), so it is too: a block has one predecessor
        digest = sequence.digests[number]
        parent = sequence.digests[number - 1] if number else ROOT
        token_ids = sequence.tokens[number * size : (number + 1) * size]
        mine, known = blocks[number], pool.index.get(digest)
        if known is None:
            mine.content = Content(digest, parent, tuple(token_ids))
            pool = pool.insert(mine, mine.content)
        elif known is not mine:
            if pool.lookup(digest, parent, token_ids) is None:
                break  # a collision, other content under the same digest: the indexed block stays
            if any(block.index in pool.branches for block in blocks[number:]):
                break  # another table goes through here: a block has one predecessor
            pool = pool.hold([*blocks[:number], known]).release(blocks[: number + 1])
            blocks[number], swapped = known, True
    return BlockTable.of(tuple(blocks)) if swapped else table, pool


def _stopped(tokenizer: Any, sequence: Sequence, token: int) -> dict[str, Any]:
    """The text with the token and, if it is the last, why: a stop id, else a stop string, else length."""
    origin, params = sequence.origin, sequence.origin.request.sampling
    text, length = sequence.text, sequence.tokens.length + 1
    stopping = length - origin.num_prompt >= params.min_tokens
    if stopping and token in origin.stop_ids:
        if text is not None and params.include_stop_str_in_output:
            text = detokenize.advance(tokenizer, text, (token,))
        chosen = token in (params.stop_token_ids or ())
        reason = token if chosen else None
        return {"text": text, "finish_reason": "stop", "stop_reason": reason, "stopped": True}
    changes: dict[str, Any] = {}
    is_last = length >= origin.max_length
    if text is not None:
        seen = len(text.certain_text)
        changes["text"] = text = detokenize.advance(tokenizer, text, (token,))
        shown = text.final_text if is_last else text.certain_text
        found = detokenize.find_stop(shown, seen, params.stop or ()) if stopping else None
        if found is not None:
            at, stop = found
            end = at + (len(stop) if params.include_stop_str_in_output else 0)
            text = replace(text, text=shown[:end], pending="")
            return {"text": text, "finish_reason": "stop", "stop_reason": stop}
    if is_last:
        changes["finish_reason"] = "length"
    return changes
