"""How requests enter a state and leave it: submit, abort, finish, collect."""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from folo import detokenize
from folo.errors import RequestError
from folo.inputs import SAMPLING
from folo.request import Request, RequestOutput
from folo.sampling import SamplingParams, derive_seed
from folo.state.engine import Admitted, EngineState
from folo.state.log import Log
from folo.state.map import Map
from folo.state.outputs import output_of
from folo.state.pool import ROOT, Pool, block_digest
from folo.state.sequence import BlockTable, Origin, Sequence


def submit(state: EngineState, request: Request) -> EngineState:
    """The state with the request's sequences, n or best_of of them, in the waiting queue.

    Raises:
        RequestError: a duplicate id; a prompt that leaves no room under max_model_len; token ids
            outside the vocabulary; stop strings without a tokenizer.
    """
    _validate(state, request)
    params, tokens = request.sampling, Log(request.prompt_token_ids)
    seed = derive_seed(state.seed, request.id) if params.seed is None else params.seed
    digests = Log[bytes]()
    if state.cache.enable_prefix_caching:
        digests = extend_digests(digests, tokens, state.cache.block_size, request.cache_salt)
    text = None
    if params.stop:
        text = detokenize.begin(state.tokenizer, request.prompt_token_ids, params.skip_special_tokens)
    count = params.best_of or params.n
    samples = (
        Sequence(
            origin=_origin(state, request, seed, sample),
            tokens=tokens,
            num_computed=0,
            table=BlockTable(),
            digests=digests,
            logprobs=Log(),
            prompt_logprobs=Log(),
            text=text,
        )
        for sample in range(count)
    )
    return replace(
        state,
        waiting=queued(state, state.waiting, samples),
        requests=state.requests.set(request.id, Admitted(request, state.arrivals, count)),
        arrivals=state.arrivals + 1,
    )


def extend_digests(digests: Log[bytes], tokens: Log[int], block_size: int, salt: str) -> Log[bytes]:
    """The content addresses of all full blocks of `tokens`, of which some are there already."""
    for number in range(len(digests), len(tokens) // block_size):
        parent = digests[number - 1] if number else ROOT
        ids = tokens[number * block_size : (number + 1) * block_size]
        digests = digests.append(block_digest(parent, ids, salt))
    return digests


def queued(state: EngineState, queue: tuple[Sequence, ...], new: Iterable[Sequence]) -> tuple[Sequence, ...]:
    """A queue with new sequences at the places of their rank."""
    merged = list(queue)
    for sequence in new:
        if not merged or state.rank(merged[-1]) < state.rank(sequence):
            merged.append(sequence)
        else:
            insort(merged, sequence, key=state.rank)
    return tuple(merged)


def _origin(state: EngineState, request: Request, seed: int, sample: int) -> Origin:
    params = request.sampling
    stop_ids = set(params.stop_token_ids or ())
    if not params.ignore_eos:
        stop_ids |= set(state.params.config.eos_token_ids)
    room = state.max_model_len - len(request.prompt_token_ids)
    return Origin(
        request=request,
        arrival=state.arrivals,
        sample=sample,
        seed=seed,
        packed_sampling=_pack(params, seed, sample),
        stop_ids=frozenset(stop_ids),
        max_tokens=room if params.max_tokens is None else min(room, params.max_tokens),
    )


def _pack(params: SamplingParams, seed: int, sample: int) -> bytes:
    row = np.zeros((), SAMPLING)
    row["temperature"], row["top_k"] = params.temperature, params.top_k
    row["min_p"], row["top_p"] = params.min_p, params.top_p
    row["repetition"] = params.repetition_penalty
    row["presence"], row["frequency"] = params.presence_penalty, params.frequency_penalty
    row["seed"] = seed - 2**64 if seed >= 2**63 else seed  # the same bits, signed: torch has no uint64 ops
    row["sample_index"] = sample
    return row.tobytes()


def _validate(state: EngineState, request: Request) -> None:
    def refuse(why: str) -> RequestError:
        return RequestError(f"request {request.id!r}: {why}")

    params, length = request.sampling, len(request.prompt_token_ids)
    vocab_size = state.params.config.vocab_size
    if request.id in state.requests or request.id in state.finished:
        raise refuse("a request with this id is in the state already; choose another or collect that one")
    if length >= state.max_model_len:
        raise refuse(
            f"a prompt of {length} tokens leaves no room for output under max_model_len={state.max_model_len}"
        )
    ids = [*request.prompt_token_ids, *(params.stop_token_ids or ())]
    biases = dict(params.logit_bias or ())
    ids += biases
    for token in (min(ids), max(ids)):
        if not 0 <= token < vocab_size:
            raise refuse(f"token id {token} is outside the vocabulary, [0, {vocab_size})")
    for name in ("logprobs", "prompt_logprobs"):
        if (getattr(params, name) or 0) > vocab_size:
            raise refuse(f"{name}={getattr(params, name)} exceeds the vocabulary of {vocab_size} tokens")
    if params.stop and state.tokenizer is None:
        raise refuse("stop strings need a tokenizer: folo.init(params, tokenizer=folo.load_tokenizer(model))")
    if sum(bias == -np.inf for bias in biases.values()) == vocab_size:
        raise refuse("logit_bias bans every token of the vocabulary")


def finish(
    state: EngineState, id: str, reason: str = "stop", stop_reason: int | str | None = None
) -> EngineState:
    """End every unfinished sequence of a request with this finish_reason; its blocks are released.

    Raises:
        RequestError: no such request.
    """
    state.admitted(id)
    mine = [s for s in (*state.running, *state.waiting) if s.id == id]
    pool = state.pool
    for sequence in mine:
        pool = pool.release(reversed(sequence.table.blocks))
    requests, finished = settle(state, [ended_as(s, reason, stop_reason) for s in mine])
    return replace(
        state,
        running=tuple(s for s in state.running if s.id != id),
        waiting=tuple(s for s in state.waiting if s.id != id),
        requests=requests,
        finished=finished,
        pool=pool,
    )


def settle(state: EngineState, ended: Iterable[Sequence]) -> tuple[Map[str, Admitted], Map[str, Admitted]]:
    """`requests` and `finished` once these sequences have ended."""
    requests, finished = state.requests, state.finished
    for sequence in ended:
        admitted = requests[sequence.id]
        admitted = replace(admitted, ended=(*admitted.ended, sequence))
        if len(admitted.ended) < admitted.num_samples:
            requests = requests.set(sequence.id, admitted)
        else:
            requests, finished = requests.delete(sequence.id), finished.set(sequence.id, admitted)
    return requests, finished


def ended_as(sequence: Sequence, reason: str, stop_reason: int | str | None) -> Sequence:
    return replace(sequence.vacate(), finish_reason=reason, stop_reason=stop_reason)


def abort(state: EngineState, id: str) -> EngineState:
    """`finish` with the reason "abort". Raises RequestError if there is no such request."""
    return finish(state, id, "abort")


def vacate(state: EngineState) -> EngineState:
    """The same requests and tokens without any K and V: all running sequences wait to be recomputed.

    Holding such a state pins no block of the heap.
    """
    return replace(
        state,
        running=(),
        waiting=queued(state, state.waiting, (sequence.vacate() for sequence in state.running)),
        pool=Pool(state.pool.capacity),
    )


def collect(state: EngineState) -> tuple[EngineState, dict[str, RequestOutput]]:
    """Take the finished requests out of the state; their outputs by id, in order of arrival."""
    done = sorted((admitted for _, admitted in state.finished.items()), key=lambda a: a.arrival)
    return replace(state, finished=Map()), {a.request.id: output_of(state, a) for a in done}
