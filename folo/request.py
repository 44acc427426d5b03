"""What goes into the engine and what comes out of it."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any, SupportsIndex

from torch import Tensor

from folo.errors import RequestError
from folo.sampling import SamplingParams


@dataclass(frozen=True)
class Request:
    """One prompt to continue.

    Args:
        prompt_token_ids: the prompt, at least one token.
        sampling: how to continue it.
        id: unique among the requests that a state holds.
        priority: under the "priority" policy a lower value runs first; ties by arrival.
        cache_salt: requests share cached prefixes only with requests of the same salt.
        prompt: the text that the ids came from, carried through to the output.

    Raises:
        RequestError: an empty prompt, ids that are not integers, an empty id, a field of another type.
    """

    prompt_token_ids: Sequence[int]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    id: str = "0"
    priority: int = 0
    cache_salt: str = ""
    prompt: str | None = None

    def __post_init__(self) -> None:
        require_id(self.id)
        ids = integers(f"request {self.id!r}: prompt_token_ids", self.prompt_token_ids)
        if not ids:
            raise RequestError(f"request {self.id!r}: the prompt is empty; give at least one token id")
        if not isinstance(self.sampling, SamplingParams):
            raise RequestError(f"request {self.id!r}: sampling must be SamplingParams, got {self.sampling!r}")
        if self.prompt is not None and not isinstance(self.prompt, str):
            raise RequestError(f"request {self.id!r}: prompt {self.prompt!r} is not a string")
        if not isinstance(self.priority, Integral) or isinstance(self.priority, bool):
            raise RequestError(f"request {self.id!r}: priority {self.priority!r} is not an int")
        if not isinstance(self.cache_salt, str):
            raise RequestError(f"request {self.id!r}: cache_salt {self.cache_salt!r} is not a string")
        object.__setattr__(self, "prompt_token_ids", ids)
        object.__setattr__(self, "priority", int(self.priority))


def require_id(id: Any) -> None:
    """Raises RequestError unless `id` is a non-empty string."""
    if not isinstance(id, str) or not id:
        raise RequestError(f"request id {id!r} must be a non-empty string")


def integers(what: str, ids: Iterable[SupportsIndex]) -> tuple[int, ...]:
    """Token ids as ints. Raises RequestError, about `what`, if they are none."""
    if isinstance(ids, (bytes, bytearray)):  # whose items are ints, too
        raise RequestError(f"{what} must be ints, got {bytes(ids[:40])!r}: encode text with the tokenizer")
    try:
        # A tensor's items are tensors: those of a mask, or of a column, would pass for ints.
        given = tuple(ids.tolist() if isinstance(ids, Tensor) else ids)
        numbers = tuple(map(operator.index, given))
    except TypeError as error:
        raise RequestError(f"{what} must be ints ({error})") from None
    if bool in map(type, given):  # a mask, perhaps
        raise RequestError(f"{what} must be ints, got True or False among them")
    return numbers


@dataclass(frozen=True)
class Logprob:
    """Log-probability of one token at one position.

    rank: 1 for the most likely token. decoded_token: None without a tokenizer.
    """

    logprob: float
    rank: int
    decoded_token: str | None = None


@dataclass(frozen=True)
class CompletionOutput:
    """One continuation of a prompt.

    index: its place among the request's outputs. sample_index: which of the request's samples it is, as
    `fork(sample=...)` takes it; the two differ only where best_of has chosen and sorted samples.
    finish_reason: None while it runs, then "stop", "length" or "abort". stop_reason: the stop
    string or stop token id that ended it. cumulative_logprob: None if no logprobs were computed.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: str | None
    stop_reason: int | str | None
    seed: int
    sample_index: int

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(frozen=True)
class RequestOutput:
    """A request and its continuations: the best n of best_of once finished, all of them before.

    prompt_logprobs: None for the first prompt token, then {token id: Logprob} for each.
    num_cached_tokens: tokens whose K and V were there when it was first scheduled, from the prefix cache,
        a sibling or the parent of a fork (sample 0).
    lineage: the forks that it descends from, oldest first, as (parent request id, tokens kept, seed).
    metrics: filled by the shell (LLM, LLMEngine), which owns the clock; seconds and tokens a second.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[dict[int, Logprob] | None] | None
    outputs: list[CompletionOutput]
    finished: bool
    num_cached_tokens: int = 0
    lineage: tuple[tuple[str, int, int], ...] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)
