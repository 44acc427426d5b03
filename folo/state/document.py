"""A state's requests and sequences as plain data, and back: what a file can hold without running code."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as Items
from dataclasses import asdict, fields
from typing import Any

from folo.config import CacheConfig, SchedulerConfig
from folo.detokenize import TextState
from folo.errors import RequestError, RestoreError
from folo.request import Request
from folo.sampling import Named, SamplingParams, Transform
from folo.state.engine import Counters, EngineState, Held
from folo.state.evolve import evolve
from folo.state.lifecycle import digests_of, origin_of
from folo.state.log import Log
from folo.state.map import Map
from folo.state.sequence import BlockTable, Sequence, TokenLogprobs

Document = dict[str, Any]


def sequences_of(state: EngineState) -> list[Sequence]:
    """All sequences in the order in which a document lists them: running, waiting, ended."""
    both = (held for requests in (state.requests, state.finished) for _, held in requests.items())
    ended = [s for held in sorted(both, key=lambda held: held.arrival) for s in held.ended]
    return [*state.running, *state.waiting, *ended]


def describe(state: EngineState) -> Document:
    """All of a state but its tokens, tables and K/V, in JSON's terms.

    Raises:
        RequestError: a request has logits processors without a name (`folo.sampling.named`).
    """
    helds = [held for requests in (state.requests, state.finished) for _, held in requests.items()]
    helds.sort(key=lambda held: held.arrival)
    number = {held.request.id: n for n, held in enumerate(helds)}
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
        "sequences": [_sequence(s, number[s.id]) for s in sequences_of(state)],
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
    return {**plain, "sampling": sampling, "arrival": held.arrival, "num_samples": held.num_samples}


def _sequence(sequence: Sequence, request: int) -> Document:
    origin, text = sequence.origin, sequence.text
    return {
        "request": request,
        "sample": origin.sample,
        "stream": origin.stream,
        "seed": origin.seed,
        "lineage": origin.lineage,
        "num_computed": sequence.num_computed,
        "scores": [[s.logprob, s.rank, s.top_ids, s.top_logprobs] for s in sequence.scores],
        "text": None if text is None else asdict(text),
        **{name: getattr(sequence, name) for name in _PLAIN},
    }


_PLAIN = (
    "cumulative_logprob",
    "num_cached",
    "preemptions",
    "finish_reason",
    "stop_reason",
    "stopped",
)


def configs_of(document: Document) -> tuple[CacheConfig, SchedulerConfig]:
    """The configuration that the document's state ran under."""
    return CacheConfig(**document["cache"]), SchedulerConfig(**document["scheduler"])


def rebuild(
    state: EngineState,
    document: Document,
    tokens: Items[list[int]],
    tables: Items[BlockTable],
    transforms: Mapping[str, Transform],
) -> EngineState:
    """An empty state filled with a document's requests; its pool is left as it is.

    tokens, tables: of each sequence, in the order of `sequences_of`.

    Raises:
        RestoreError: `transforms` lacks one; stop strings, and the state has no tokenizer; a
            sequence may grow longer than the state's heap holds.
    """
    limit = document["max_model_len"]
    requests = [_request_of(entry, transforms) for entry in document["requests"]]
    for request in requests:
        if request.sampling.stop and state.tokenizer is None:
            raise RestoreError(
                f"request {request.id!r} has stop strings: restore(..., tokenizer=folo.load_tokenizer(model))"
            )
    under = evolve(state, max_model_len=limit)
    sequences = [
        _sequence_of(under, document["requests"], requests, entry, ids, table)
        for entry, ids, table in zip(document["sequences"], tokens, tables, strict=True)
    ]
    num_running, num_waiting = document["num_running"], document["num_waiting"]
    unfinished = sequences[: num_running + num_waiting]
    capacity = state.pool.capacity * state.cache.block_size
    for sequence in unfinished:
        if sequence.origin.max_length > capacity:
            raise RestoreError(
                f"request {sequence.id!r} may grow to {sequence.origin.max_length} tokens; the cache holds "
                f"{capacity}: give it a larger num_blocks"
            )
    ended: dict[str, list[Sequence]] = {}
    for sequence in sequences[num_running + num_waiting :]:
        ended.setdefault(sequence.id, []).append(sequence)
    helds: dict[bool, Map[str, Held]] = {False: Map(), True: Map()}
    for entry, request in zip(document["requests"], requests, strict=True):
        done = tuple(ended.get(request.id, ()))
        held = Held(request, entry["arrival"], entry["num_samples"], done)
        over = len(done) == held.num_samples
        helds[over] = helds[over].set(request.id, held)
    return evolve(
        state,
        running=tuple(unfinished[:num_running]),
        waiting=tuple(unfinished[num_running:]),
        requests=helds[False],
        finished=helds[True],
        arrivals=document["arrivals"],
        counters=Counters(**document["counters"]),
        max_model_len=min(limit, state.max_model_len),
    )


def _request_of(entry: Document, transforms: Mapping[str, Transform]) -> Request:
    values = {f.name: entry[f.name] for f in fields(Request)}
    sampling = dict(entry["sampling"])
    for name in sampling["logits_processors"]:
        if name not in transforms:
            raise RestoreError(
                f"request {entry['id']!r} uses the logits processor {name!r}: "
                f"restore(..., transforms={{{name!r}: function}})"
            )
    processors = tuple(Named(name, _bare(transforms[name])) for name in sampling["logits_processors"])
    bias = sampling["logit_bias"]
    sampling |= {"logits_processors": processors, "logit_bias": None if bias is None else dict(bias)}
    return Request(**{**values, "sampling": SamplingParams(**sampling)})


def _bare(transform: Transform) -> Callable[..., Any]:
    return transform.transform if isinstance(transform, Named) else transform


def _sequence_of(
    state: EngineState,
    entries: Items[Document],
    requests: Items[Request],
    entry: Document,
    ids: list[int],
    table: BlockTable,
) -> Sequence:
    request, tokens = requests[entry["request"]], Log(ids)
    lineage = tuple((id, position, seed) for id, position, seed in entry["lineage"])
    arrival = entries[entry["request"]]["arrival"]
    origin = origin_of(state, request, arrival, entry["seed"], entry["sample"], entry["stream"], lineage)
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
        table=table,
        digests=digests_of(state, request, tokens, Log()),
        scores=Log(scores),
        text=text,
        **{name: entry[name] for name in _PLAIN},
    )
