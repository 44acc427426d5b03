"""A state's requests and sequences as plain data, and back: what a file can hold without running code."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Items
from dataclasses import asdict, fields
from typing import Any

from folo.detokenize import TextState
from folo.errors import RequestError, RestoreError
from folo.request import Request
from folo.sampling import Named, SamplingParams, Transform
from folo.state.engine import Counters, EngineState, Held
from folo.state.evolve import evolve
from folo.state.heap import Block
from folo.state.lifecycle import digests_of, origin_of
from folo.state.log import Log
from folo.state.map import Map
from folo.state.queues import settle
from folo.state.sequence import BlockTable, Sequence, TokenLogprobs

Document = dict[str, Any]


def describe(state: EngineState, blocks: Items[Block]) -> Document:
    """All of a state but K and V, in JSON's terms.

    blocks: `state.blocks()`; tables refer to them by their places in it.

    Raises:
        RequestError: a request has logits processors without a name (`folo.sampling.named`).
    """
    helds = state.all_held()
    sequences = [*state.running, *state.waiting, *(s for held in helds for s in held.ended)]
    number = {held.request.id: n for n, held in enumerate(helds)}
    place = {block.index: n for n, block in enumerate(blocks)}
    filled = state.filled()
    return {
        "seed": state.seed,
        "max_model_len": state.max_model_len,
        "cache": asdict(state.cache),
        "scheduler": asdict(state.scheduler),
        "arrivals": state.arrivals,
        "counters": asdict(state.counters),
        "requests": [_request(held) for held in helds],
        "num_running": len(state.running),
        "num_waiting": len(state.waiting),
        "sequences": [_sequence(s, number[s.id], place) for s in sequences],
        "blocks": [_block(block, state, filled) for block in blocks],
    }


def _request(held: Held) -> Document:
    request, params = held.request, held.request.sampling
    sampling = {f.name: getattr(params, f.name) for f in fields(params)}
    for transform in params.logits_processors:
        if not isinstance(transform, Named):
            raise RequestError(
                f"request {request.id!r} cannot be saved: its logits processor {transform!r} has no name; "
                f"give folo.sampling.named(name, function)"
            )
    sampling["logits_processors"] = [t.name for t in params.logits_processors if isinstance(t, Named)]
    plain = {f.name: getattr(request, f.name) for f in fields(request) if f.name != "sampling"}
    return {**plain, "sampling": sampling, "arrival": held.arrival}


def _sequence(sequence: Sequence, request: int, place: Mapping[int, int]) -> Document:
    origin, text = sequence.origin, sequence.text
    return {
        "request": request,
        "sample": origin.sample,
        "stream": origin.stream,
        "seed": origin.seed,
        "lineage": origin.lineage,
        "tokens": sequence.tokens[:],
        "table": [place[block.index] for block in sequence.table.blocks],
        "num_computed": sequence.num_computed,
        "scores": [[s.logprob, s.rank, s.top_ids, s.top_logprobs] for s in sequence.scores],
        "text": None if text is None else asdict(text),
        **{name: getattr(sequence, name) for name in _PLAIN},
    }


def _block(block: Block, state: EngineState, filled: Mapping[int, int]) -> Document:
    if block.content is None or not state.pool.cached(block):
        return {"filled": filled[block.index]}
    digest, parent, token_ids = block.content
    content = {"digest": digest.hex(), "parent": parent.hex(), "token_ids": token_ids}
    return {"filled": state.cache.block_size, "content": content}


_PLAIN = "num_cached", "finish_reason", "stop_reason", "stopped", "foreign"


def rebuild(
    state: EngineState, document: Document, blocks: Items[Block], transforms: Mapping[str, Transform]
) -> EngineState:
    """An empty state filled with a document's requests, their tables made of `blocks`. Its pool stays empty.

    Raises:
        RestoreError: `transforms` lacks one; stop strings, and the state has no tokenizer; a
            sequence may grow longer than the state's heap holds.
    """
    limit = document["max_model_len"]
    helds, requests = [_held(entry, transforms) for entry in document["requests"]], Map[str, Held]()
    for held in helds:
        if held.request.sampling.stop and state.tokenizer is None:
            raise RestoreError(
                f"request {held.request.id!r} has stop strings: "
                f"restore(..., tokenizer=folo.load_tokenizer(model))"
            )
        requests = requests.set(held.request.id, held)
    under = evolve(state, max_model_len=limit)
    sequences = [
        _sequence_of(under, helds[entry["request"]], entry, blocks) for entry in document["sequences"]
    ]
    num_running = document["num_running"]
    num_queued = num_running + document["num_waiting"]
    capacity = state.pool.capacity * state.cache.block_size
    for sequence in sequences[:num_queued]:
        if sequence.origin.max_length > capacity:
            raise RestoreError(
                f"request {sequence.id!r} may grow to {sequence.origin.max_length} tokens; the cache holds "
                f"{capacity}: give it a larger num_blocks"
            )
    state = evolve(
        state,
        running=tuple(sequences[:num_running]),
        waiting=tuple(sequences[num_running:num_queued]),
        requests=requests,
        arrivals=document["arrivals"],
        counters=Counters(**document["counters"]),
        max_model_len=min(limit, state.max_model_len),
    )
    return settle(state, sequences[num_queued:])


def _held(entry: Document, transforms: Mapping[str, Transform]) -> Held:
    """A request that holds none of its sequences yet."""
    sampling = dict(entry["sampling"])
    names = sampling["logits_processors"]
    sampling["logits_processors"] = [_transform(name, entry["id"], transforms) for name in names]
    values: Document = {f.name: entry[f.name] for f in fields(Request)}
    request = Request(**{**values, "sampling": SamplingParams(**sampling)})
    return Held(request, entry["arrival"])


def _transform(name: str, id: str, transforms: Mapping[str, Transform]) -> Named:
    if not callable(transforms.get(name)):
        raise RestoreError(
            f"request {id!r} uses the logits processor {name!r}: "
            f"restore(..., transforms={{{name!r}: function}})"
        )
    given = transforms[name]
    return Named(name, given.transform if isinstance(given, Named) else given)


def _sequence_of(state: EngineState, held: Held, entry: Document, blocks: Items[Block]) -> Sequence:
    request, tokens = held.request, Log[int](entry["tokens"])
    lineage = tuple((id, position, seed) for id, position, seed in entry["lineage"])
    seed, sample, stream = entry["seed"], entry["sample"], entry["stream"]
    origin = origin_of(state, request, held.arrival, seed, sample, stream, lineage)
    scores = [
        TokenLogprobs(logprob, rank, tuple(ids), tuple(logprobs))
        for logprob, rank, ids, logprobs in entry["scores"]
    ]
    text = entry["text"]
    if text is not None:
        text = TextState(**{**text, "window": tuple(text["window"])})
    return Sequence(
        origin=origin,
        tokens=tokens,
        num_computed=entry["num_computed"],
        table=BlockTable.of(tuple(blocks[place] for place in entry["table"])),
        digests=digests_of(state, request, tokens, Log()),
        scores=Log(scores),
        text=text,
        **{name: entry[name] for name in _PLAIN},
    )
