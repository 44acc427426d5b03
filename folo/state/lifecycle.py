"""How requests enter a state and leave it: submit, abort, finish, collect."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from folo import detokenize
from folo.errors import RequestError
from folo.inputs import pack_sampling
from folo.request import Request, RequestOutput
from folo.sampling import derive_seed
from folo.state.engine import EngineState, Held
from folo.state.log import Log
from folo.state.map import Map
from folo.state.outputs import output_of
from folo.state.pool import Pool, extend_digests
from folo.state.queues import queued, settle
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
        requests=state.requests.set(request.id, Held(request, state.arrivals, count)),
        arrivals=state.arrivals + 1,
    )


def _origin(state: EngineState, request: Request, seed: int, sample: int) -> Origin:
    params = request.sampling
    config, stop_ids = state.params.config, set(params.stop_token_ids or ())
    if not params.ignore_eos:
        stop_ids |= {token for token in config.eos_token_ids if token < config.vocab_size}
    room = state.max_model_len - len(request.prompt_token_ids)
    return Origin(
        request=request,
        arrival=state.arrivals,
        sample=sample,
        seed=seed,
        packed_sampling=pack_sampling(params, seed, sample),
        stop_ids=frozenset(stop_ids),
        max_tokens=room if params.max_tokens is None else min(room, params.max_tokens),
    )


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
        RequestError: no such request, or an unknown reason.
    """
    if reason not in ("stop", "length", "abort"):
        raise RequestError(f'finish reason {reason!r}: expected "stop", "length" or "abort"')
    request, pool = state.held(id).request, state.pool
    mine = [s for s in (*state.running, *state.waiting) if s.origin.request is request]
    for sequence in mine:
        pool = pool.release(reversed(sequence.table.blocks))
    requests, finished = settle(state, [s.ended(reason, stop_reason) for s in mine])
    return replace(
        state,
        running=tuple(s for s in state.running if s.origin.request is not request),
        waiting=tuple(s for s in state.waiting if s.origin.request is not request),
        requests=requests,
        finished=finished,
        pool=pool,
    )


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
    done = sorted((held for _, held in state.finished.items()), key=lambda a: a.arrival)
    return replace(state, finished=Map()), {a.request.id: output_of(state, a) for a in done}
