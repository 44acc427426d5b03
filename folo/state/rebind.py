"""A state's surroundings exchanged: other weights, or other scheduler limits."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import TYPE_CHECKING

from folo.config import SchedulerConfig, require_kind
from folo.errors import ConfigError, ParamsMismatchError
from folo.state.engine import EngineState, Held, longest_sequence, margin, require_params
from folo.state.evolve import evolve
from folo.state.flight import landed_or_before
from folo.state.lifecycle import origin_of, preempt, vacate
from folo.state.log import Log
from folo.state.map import Map
from folo.state.sequence import Sequence, TokenLogprobs

if TYPE_CHECKING:
    from folo.model.params import Params


def rebind(state: EngineState, params: Params) -> EngineState:
    """The same requests and tokens over other weights: all K and V are dropped and computed again.

    Tokens that were sampled keep the logprobs that they were sampled with. The new weights alone score
    prompts without output yet and, later, the prompt of a fork that keeps nothing else, tokens that a
    fork forces, and what `extend` turns into a prompt. The old state stays with the old weights.

    Raises:
        ParamsMismatchError: the weights are of another architecture, dtype or device.
        ConfigError: `params` is not a Params.
    """
    require_params(params)
    state = landed_or_before(state)
    old = state.params
    for name, mine, theirs in (
        *((f"config.{f.name}", getattr(old.config, f.name), getattr(params.config, f.name))
          for f in fields(old.config)),
        ("dtype", old.dtype, params.dtype),
        ("device", old.device, params.device),
    ):  # fmt: skip
        if mine != theirs:
            raise ParamsMismatchError(
                f"rebind takes other weights of the same model: {name} is {theirs!r}, the state's is {mine!r}"
            )
    state = vacate(state)
    return evolve(
        state,
        params=params,
        waiting=tuple(_foreign(s) if _past_prompt(s) else _unscored(s) for s in state.waiting),
        requests=_ended_before(state.requests),
        finished=_ended_before(state.finished),
    )


def _past_prompt(sequence: Sequence) -> bool:
    # A fork may have forced output behind a prompt that is not scored to its end yet.
    origin = sequence.origin
    return sequence.num_output > 0 and origin.scored_from + sequence.scores.length >= origin.num_prompt


def _unscored(sequence: Sequence) -> Sequence:
    return evolve(sequence, scores=Log[TokenLogprobs](), foreign=0)


def _foreign(sequence: Sequence) -> Sequence:
    return evolve(sequence, foreign=sequence.scores.length)


def _ended_before(requests: Map[str, Held]) -> Map[str, Held]:
    for id, held in requests.items():
        if held.ended:
            requests = requests.set(id, evolve(held, ended=tuple(map(_foreign, held.ended))))
    return requests


def reconfigure(state: EngineState, scheduler: SchedulerConfig) -> EngineState:
    """The same state under other limits or another policy, effective with the next `schedule`.

    With a lower max_num_seqs the last of the running sequences are preempted.

    Raises:
        ConfigError: no SchedulerConfig; max_model_len is more than model or heap allow, or less than a
            request has already; the heap has no room for the steps that the new limits make possible (it
            was sized for the first ones; CacheConfig.reserve_blocks leaves room for more).
    """
    require_kind("scheduler", scheduler, SchedulerConfig)
    state = landed_or_before(state)
    cache, capacity, heap = state.cache, state.pool.capacity, state.heap
    needed = capacity + margin(replace(cache, reserve_blocks=0), scheduler, state.params.device)
    if needed > heap.num_blocks:
        raise ConfigError(
            f"max_num_seqs={scheduler.max_num_seqs} and max_num_batched_tokens="
            f"{scheduler.max_num_batched_tokens} need a heap of {needed} blocks; this one was made with "
            f"{heap.num_blocks}: init with reserve_blocks of at least {needed - heap.num_blocks} more"
        )
    longest = longest_sequence(state.params.config, cache, scheduler, capacity)
    state = evolve(state, scheduler=scheduler, max_model_len=longest)
    running = sorted((_limited(state, s) for s in state.running), key=state.rank)
    waiting = sorted((_limited(state, s) for s in state.waiting), key=state.rank)
    state = evolve(state, running=tuple(running), waiting=tuple(waiting))
    return preempt(state, max(0, len(running) - scheduler.max_num_seqs))


def _limited(state: EngineState, sequence: Sequence) -> Sequence:
    """The sequence under the state's max_model_len."""
    old = sequence.origin
    origin = origin_of(state, old.request, old.arrival, old.seed, old.sample, old.stream, old.lineage)
    if sequence.tokens.length >= origin.max_length:
        raise ConfigError(
            f"max_model_len={state.max_model_len} leaves no room for output to request {sequence.id!r}, "
            f"which has {sequence.tokens.length} tokens; finish it first"
        )
    return evolve(sequence, origin=origin)
