"""How a request begins in the middle of another: fork it, or extend it by its next turn."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import replace
from numbers import Integral
from typing import Any

from folo import detokenize
from folo.detokenize import TextState
from folo.errors import RequestError
from folo.request import integers
from folo.state.engine import EngineState, Held
from folo.state.evolve import evolve
from folo.state.flight import landed_or_before
from folo.state.lifecycle import check_vocabulary, digests_of, origin_of, text_before
from folo.state.log import Log
from folo.state.queues import queued
from folo.state.sequence import Origin, Sequence, TokenLogprobs

# What a sequence begins anew with when it goes on from another.
_GOES_ON: dict[str, Any] = {"num_cached": None, "finish_reason": None, "stop_reason": None, "stopped": False}


def fork(
    state: EngineState,
    id: str,
    children: Items[str],
    sample: int = 0,
    keep: int | None = None,
    append: Items[int] | Items[Items[int]] | None = None,
    seeds: Items[int | None] | None = None,
) -> EngineState:
    """New requests that begin as copies of one sample of a request; that one stays as it is.

    A child shares its parent's blocks; nothing is copied until one of them writes where the other
    reads, and then at most one block. It has the parent's sampling parameters, with n = 1; max_tokens,
    min_tokens and penalties count the output that it inherits.

    Args:
        id: the parent, whether it waits, runs or has finished.
        children: the ids of the new requests.
        sample: which sample of the parent, as `CompletionOutput.sample_index` counts them.
        keep: how many of its tokens a child keeps, the prompt's included; None: all.
        append: token ids that are forced to follow: one list for all children, or a list for each.
            They are output tokens; they stop nothing, and have logprobs where the request wants them.
        seeds: one for each child; None (for one child, or for all): continue the parent's random stream.

    Raises:
        RequestError: no such request or sample; an id that is taken; a `keep` that is not between
            the prompt and the whole; a token outside the vocabulary; no room left for output.
    """
    state = landed_or_before(state)
    parent = _sample(state, id, sample)
    num_prompt, length = parent.origin.num_prompt, parent.tokens.length
    keep = length if keep is None else keep
    if not isinstance(keep, Integral) or not num_prompt <= keep <= length:
        raise RequestError(
            f"fork of {id!r}: keep={keep!r}, but it counts tokens with the prompt: {num_prompt} (the prompt) "
            f"to {length} (all)"
        )
    keep = int(keep)
    if isinstance(children, str) or not isinstance(children, Items) or not children:
        raise RequestError(f"fork of {id!r}: children={children!r} is not a list of different ids")
    for child in children:
        if not isinstance(child, str) or not child or child in state.requests or child in state.finished:
            raise RequestError(f"fork of {id!r}: the id {child!r} is empty, no string, or taken already")
    if len(set(children)) != len(children):
        raise RequestError(f"fork of {id!r}: children={children!r} is not a list of different ids")
    forced = _forced(state, id, append, len(children))
    own = _seeds(parent, seeds, len(children))
    text = _kept_text(state, parent, keep)
    running, waiting, pool, requests = list[Sequence](), list[Sequence](), state.pool, state.requests
    num_free = state.scheduler.max_num_seqs - len(state.running)
    for number, (child, tokens, seed) in enumerate(zip(children, forced, own, strict=True)):
        arrival = state.arrivals + number
        sequence = _child(state, parent, child, arrival, keep, text, tokens, seed)
        requests = requests.set(child, Held(sequence.origin.request, arrival))
        if sequence.num_computed and len(running) < num_free:
            running.append(sequence)
            pool = pool.hold(sequence.table.blocks)
        else:
            waiting.append(evolve(sequence.vacate(), num_cached=None))
    return evolve(
        state,
        running=queued(state, state.running, running),
        waiting=queued(state, state.waiting, waiting),
        requests=requests,
        pool=pool,
        arrivals=state.arrivals + len(children),
    )


def extend(state: EngineState, id: str, token_ids: Items[int]) -> EngineState:
    """The next turn of a conversation: prompt, output and `token_ids` become the prompt of a new output.

    A running request is cut off where it is and keeps its K and V; one that has ended waits in the
    queue again and finds what the prefix cache still has of it. Sampling parameters, seed and
    lineage stay; `max_tokens` counts anew.

    Raises:
        RequestError: no such request; several samples (fork the one to go on with); no token ids, or
            one outside the vocabulary; no room left for output under max_model_len.
    """
    state = landed_or_before(state)
    held = state.held(id)
    if held.num_samples > 1:
        raise RequestError(f"request {id!r} has {held.num_samples} samples: fork the one to go on with")
    before, new = _sample(state, id, 0), _ids(state, f"extend of {id!r}", token_ids)
    if not new:
        raise RequestError(f"extend of {id!r}: no token ids; give at least one")
    tokens = before.tokens.extend(new)
    if tokens.length >= state.max_model_len:
        raise RequestError(
            f"extend of {id!r}: {tokens.length} tokens leave no room for output under "
            f"max_model_len={state.max_model_len}"
        )
    request = evolve(held.request, prompt_token_ids=tuple(tokens), prompt=None)
    ended = before.finish_reason is not None
    arrival, old = state.arrivals if ended else held.arrival, before.origin
    origin = origin_of(state, request, arrival, old.seed, 0, old.stream, old.lineage)
    # Scores of what was the prompt stay; what was output becomes prompt, which the model scores alone.
    kept = 0 if before.foreign else len(before.prompt_scores)
    sequence = evolve(
        before,
        origin=origin,
        tokens=tokens,
        digests=digests_of(state, request, tokens, before.digests),
        scores=before.scores.first(kept),
        text=text_before(state, request),
        foreign=0,
        **_GOES_ON,
    )
    sequence = _caught_up(state, sequence)
    pool = state.pool
    if sequence.table is not before.table:
        pool = pool.hold(sequence.table.blocks).release(before.table.blocks)
    others = [s for s in state.running if s is not before], [s for s in state.waiting if s is not before]
    runs = bool(sequence.num_computed)
    return evolve(
        state,
        running=queued(state, others[0], [sequence] if runs else ()),
        waiting=queued(state, others[1], () if runs else [sequence]),
        requests=state.requests.set(id, Held(request, arrival)),
        finished=state.finished.delete(id) if ended else state.finished,
        pool=pool,
        arrivals=state.arrivals + ended,
    )


def _sample(state: EngineState, id: str, sample: int) -> Sequence:
    held = state.held(id)
    for group in (state.running, state.waiting, held.ended):
        for sequence in group:
            origin = sequence.origin
            if origin.request is held.request and origin.sample == sample:
                return sequence
    raise RequestError(f"request {id!r} has no sample {sample!r}: it has {held.num_samples}, from 0 on")


def _ids(state: EngineState, what: str, token_ids: Items[int]) -> list[int]:
    ids = list(integers(f"{what}: token ids", token_ids))
    check_vocabulary(state, what, ids)
    return ids


def _forced(state: EngineState, id: str, append: Any, count: int) -> list[list[int]]:
    what = f"fork of {id!r}"
    # The items of a tensor or an array are tensors or arrays, which would pass for lists.
    append = () if append is None else append.tolist() if hasattr(append, "tolist") else append
    if isinstance(append, bytes | bytearray):  # whose items are ints
        return [_ids(state, what, append)] * count
    try:
        lists = list(append)
    except TypeError:
        raise RequestError(f"{what}: append={append!r} is no list of token ids") from None
    if not lists or not hasattr(lists[0], "__iter__") or getattr(lists[0], "ndim", 1) == 0:
        return [_ids(state, what, lists)] * count
    if len(lists) != count:
        raise RequestError(f"{what}: {len(lists)} lists to append for {count} children")
    return [_ids(state, what, ids) for ids in lists]


def _seeds(parent: Sequence, seeds: Items[int | None] | None, count: int) -> list[int | None]:
    seeds = [None] * count if seeds is None else seeds
    if not isinstance(seeds, Items):
        raise RequestError(f"fork of {parent.id!r}: seeds={seeds!r} is not a list, one for each child")
    if len(seeds) != count:
        raise RequestError(f"fork of {parent.id!r}: {len(seeds)} seeds for {count} children")
    params = parent.origin.request.sampling  # which knows what a seed may be
    return [None if seed is None else replace(params, seed=seed).seed for seed in seeds]


def _kept_text(state: EngineState, parent: Sequence, keep: int) -> TextState | None:
    """As `Sequence.text`, of the first `keep` tokens. Decodes them, so once for all children."""
    origin = parent.origin
    if keep == parent.tokens.length and parent.finish_reason is None:
        return parent.text
    text, ids = text_before(state, origin.request), parent.tokens[origin.num_prompt : keep]
    return None if text is None else detokenize.advance(state.tokenizer, text, ids)


def _child(
    state: EngineState,
    parent: Sequence,
    id: str,
    arrival: int,
    keep: int,
    text: TextState | None,
    forced: list[int],
    seed: int | None,
) -> Sequence:
    """text: that of the tokens kept."""
    old, params = parent.origin, parent.origin.request.sampling
    if params.n > 1 or params.best_of is not None:
        params = replace(params, n=1, best_of=None if params.best_of is None else 1)
    seed, stream = (old.seed, old.stream) if seed is None else (seed, 0)
    lineage = (*old.lineage, (parent.id, keep, seed))
    request = evolve(old.request, id=id, sampling=params)
    origin = origin_of(state, request, arrival, seed, 0, stream, lineage)
    tokens = parent.tokens.first(keep)
    if forced:
        tokens = tokens.extend(forced)
        text = None if text is None else detokenize.advance(state.tokenizer, text, forced)
    if tokens.length >= origin.max_length:
        raise RequestError(
            f"fork of {parent.id!r}: {tokens.length} tokens leave no room for output: max_tokens "
            f"and max_model_len end it at {origin.max_length}; keep fewer"
        )
    known = parent.digests.first(keep // state.cache.block_size)
    scores = _scores(parent, origin, tokens, keep)
    sequence = evolve(
        parent,
        origin=origin,
        tokens=tokens,
        num_computed=min(parent.num_computed, keep),
        digests=digests_of(state, request, tokens, known),
        scores=scores,
        text=text,
        foreign=min(parent.foreign, scores.length),
        **_GOES_ON,
    )
    return _caught_up(state, sequence)


def _scores(parent: Sequence, origin: Origin, tokens: Log[int], keep: int) -> Log[TokenLogprobs]:
    """The parent's scores as far as they are the child's: of the tokens kept, and of the first one forced."""
    old, at = parent.origin, keep - parent.origin.scored_from
    # The child of a later sample scores the prompt itself; after `rebind`, the new weights a prompt alone.
    if origin.scored_from < old.scored_from or (parent.foreign and keep <= old.num_prompt):
        return Log()
    scores = parent.scores.first(at)
    if keep == tokens.length or not parent.foreign <= at < parent.scores.length:
        return scores
    if origin.stream != old.stream and origin.request.sampling.logits_processors:
        return scores  # they may look at the sample index
    token, row = tokens[keep], parent.scores[at]
    forced = row if parent.tokens[keep] == token else row.of(token)
    return scores if forced is None else scores.append(forced)


def _caught_up(state: EngineState, sequence: Sequence) -> Sequence:
    """The sequence with only the K and V that it may reuse: the rest of its table is dropped."""
    computed = min(sequence.num_computed, sequence.reusable)
    if not computed:
        return sequence.vacate()
    table = sequence.table.first(-(-computed // state.cache.block_size))
    cached = computed if sequence.num_cached is None else sequence.num_cached
    return evolve(sequence, num_computed=computed, table=table, num_cached=cached)
