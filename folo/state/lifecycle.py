"""How requests enter a state and leave it: submit, abort, finish, collect."""

from __future__ import annotations

from collections.abc import Sequence as Items
from numbers import Integral

import numpy as np

from folo import detokenize
from folo.detokenize import TextState
from folo.errors import RequestError
from folo.inputs import pack_sampling
from folo.request import Request, RequestOutput
from folo.sampling import derive_seed
from folo.state.engine import EngineState, Held, require_state
from folo.state.evolve import evolve
from folo.state.flight import landed_or_before
from folo.state.log import Log
from folo.state.map import Map
from folo.state.outputs import output_of
from folo.state.pool import Pool, extend_digests
from folo.state.queues import queued, settle
from folo.state.sequence import BlockTable, Origin, Sequence


def submit(state: EngineState, request: Request) -> EngineState:
    """The state with the request's sequences, n or best_of of them, in the waiting queue.

    Raises:
        RequestError: not a Request; a duplicate id; a prompt that leaves no room under max_model_len; token
            ids outside the vocabulary, or more logprobs than it has tokens; a logit_bias that bans every
            token; stop strings without a tokenizer.
    """
    require_state(state)
    if not isinstance(request, Request):
        raise RequestError(f"submit takes a folo.Request, got {request!r}")
    _validate(state, request)
    params, tokens = request.sampling, Log(request.prompt_token_ids)
    seed = derive_seed(state.seed, request.id) if params.seed is None else params.seed
    digests, text = digests_of(state, request, tokens, Log()), text_before(state, request)
    samples = (
        Sequence(
            origin=origin_of(state, request, state.arrivals, seed, sample, stream=sample),
            tokens=tokens,
            num_computed=0,
            table=BlockTable(),
            digests=digests,
            scores=Log(),
            text=text,
        )
        for sample in range(params.num_samples)
    )
    return evolve(
        state,
        waiting=queued(state, state.waiting, samples),
        requests=state.requests.set(request.id, Held(request, state.arrivals)),
        arrivals=state.arrivals + 1,
    )


def origin_of(
    state: EngineState,
    request: Request,
    arrival: int,
    seed: int,
    sample: int,
    stream: int,
    lineage: tuple[tuple[str, int, int], ...] = (),
) -> Origin:
    """The Origin of one sample, from the request's parameters and the state's limits."""
    params = request.sampling
    config, stop_ids = state.params.config, set(params.stop_token_ids or ())
    if not params.ignore_eos:
        stop_ids |= {token for token in config.eos_token_ids if 0 <= token < config.vocab_size}
    num_prompt = len(request.prompt_token_ids)
    wanted = state.max_model_len if params.max_tokens is None else num_prompt + params.max_tokens
    limit = min(state.max_model_len, wanted)
    # Prompt logprobs are the same for all samples: the first one computes them.
    scores_prompt = sample == 0 and params.prompt_logprobs is not None
    scores_output = params.logprobs is not None or params.best_of is not None
    return Origin(
        request=request,
        arrival=arrival,
        sample=sample,
        stream=stream,
        seed=seed,
        packed_sampling=pack_sampling(params, seed, stream),
        stop_ids=frozenset(stop_ids),
        num_prompt=num_prompt,
        max_length=limit,
        scored_from=1 if scores_prompt else num_prompt,
        scored_to=limit if scores_output else num_prompt,
        looks_back=params.penalizes or bool(params.logits_processors),
        lineage=lineage,
    )


def digests_of(state: EngineState, request: Request, tokens: Log[int], known: Log[bytes]) -> Log[bytes]:
    """The content addresses of the full blocks of `tokens`, of which the first are known."""
    if not state.cache.enable_prefix_caching:
        return known
    return extend_digests(known, tokens, state.cache.block_size, request.cache_salt)


def text_before(state: EngineState, request: Request) -> TextState | None:
    """The TextState before the first output token; None without stop strings, which need it at every step."""
    params = request.sampling
    if not params.stop:
        return None
    return detokenize.begin(state.tokenizer, request.prompt_token_ids, params.skip_special_tokens)


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
    biases = dict(params.logit_bias or ())
    ids = [*request.prompt_token_ids, *(params.stop_token_ids or ()), *biases]
    check_vocabulary(state, f"request {request.id!r}", ids)
    for name in ("logprobs", "prompt_logprobs"):
        if (getattr(params, name) or 0) > vocab_size:
            raise refuse(f"{name}={getattr(params, name)} exceeds the vocabulary of {vocab_size} tokens")
    if params.stop and state.tokenizer is None:
        raise refuse("stop strings need a tokenizer: folo.init(params, tokenizer=folo.load_tokenizer(model))")
    if sum(bias == -np.inf for bias in biases.values()) == vocab_size:
        raise refuse("logit_bias bans every token of the vocabulary")


def check_vocabulary(state: EngineState, what: str, ids: Items[int]) -> None:
    """Raises RequestError, about `what`, if one of the ids is no token of the model."""
    vocab_size = state.params.config.vocab_size
    for token in (min(ids), max(ids)) if ids else ():
        if not 0 <= token < vocab_size:
            raise RequestError(f"{what}: token id {token} is outside the vocabulary, [0, {vocab_size})")


def finish(
    state: EngineState, id: str, reason: str = "stop", stop_reason: int | str | None = None
) -> EngineState:
    """End every unfinished sequence of a request with this finish_reason; its blocks are released.

    Raises:
        RequestError: no such request, an unknown reason, or a stop_reason of another type.
    """
    if reason not in ("stop", "length", "abort"):
        raise RequestError(f'finish reason {reason!r}: expected "stop", "length" or "abort"')
    if not isinstance(stop_reason, str | Integral | None):
        raise RequestError(f"stop_reason {stop_reason!r}: expected a stop string, a token id or None")
    stop_reason = int(stop_reason) if isinstance(stop_reason, Integral) else stop_reason
    state = landed_or_before(state)
    request, pool = state.held(id).request, state.pool
    running, others = _parted(state.running, request)
    waiting, behind = _parted(state.waiting, request)
    mine = [*running, *waiting]
    for sequence in mine:
        pool = pool.release(sequence.table.blocks)
    ended = [evolve(s.vacate(), finish_reason=reason, stop_reason=stop_reason) for s in mine]
    return evolve(settle(state, ended), running=others, waiting=behind, pool=pool)


def _parted(queue: tuple[Sequence, ...], request: Request) -> tuple[list[Sequence], tuple[Sequence, ...]]:
    """The request's sequences in a queue, and the others. Quick: searches prune thousands, one by one."""
    mine = [s for s in queue if s.origin.request is request]
    return mine, tuple([s for s in queue if s.origin.request is not request]) if mine else queue


def abort(state: EngineState, id: str) -> EngineState:
    """`finish` with the reason "abort". Raises RequestError if there is no such request."""
    return finish(state, id, "abort")


def preempt(state: EngineState, count: int) -> EngineState:
    """The last `count` of the running sequences give up their blocks and wait to be computed again."""
    keep = len(state.running) - count
    pool, victims = state.pool, state.running[keep:]
    for victim in reversed(victims):
        pool = pool.release(victim.table.blocks)
    return evolve(
        state,
        running=state.running[:keep],
        waiting=queued(state, state.waiting, (victim.vacate() for victim in victims)),
        pool=pool,
        counters=evolve(state.counters, preemptions=state.counters.preemptions + count),
    )


def vacate(state: EngineState) -> EngineState:
    """The same requests and tokens without any K and V: all running sequences wait to be recomputed.

    Holding such a state pins no block of the heap.
    """
    return evolve(
        state,
        running=(),
        waiting=queued(state, state.waiting, (sequence.vacate() for sequence in state.running)),
        pool=Pool(state.pool.capacity),
    )


def collect(state: EngineState) -> tuple[EngineState, dict[str, RequestOutput]]:
    """Take the finished requests out of the state; their outputs by id, in order of arrival."""
    return collect_known(landed_or_before(state))


def collect_known(state: EngineState) -> tuple[EngineState, dict[str, RequestOutput]]:
    """`collect` without waiting for a step in flight: only requests already known to have finished."""
    done = sorted((held for _, held in state.finished.items()), key=lambda held: held.arrival)
    return evolve(state, finished=Map()), {held.request.id: output_of(state, held) for held in done}
