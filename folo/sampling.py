"""What a request asks of the sampler: `SamplingParams`, and logits transforms as pure functions.

A transform is `(logits, context) -> logits`; `chain` composes them:

    chain(temperature(0.7), top_k(50), top_p(0.95))(logits)

They are thin: the arithmetic is that of `folo.ops.sampler`, in plain torch, so gradients pass through them.
The engine's kernels do the same to whole batches. Their exponentials may differ in the last bit, so min-p and
top-p may decide differently about a token that lies exactly at their bound; all else agrees bit for bit.
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from folo.errors import RequestError
from folo.ops import sampler


@dataclass(frozen=True, slots=True)
class Context:
    """What a transform may know besides the logits: the tokens so far, and which token is sampled.

    position: absolute index of the token that is sampled. sample_index: which of n siblings this is.
    """

    prompt_ids: Sequence[int] = ()
    output_ids: Sequence[int] = ()
    position: int = 0
    sample_index: int = 0


Transform = Callable[[Tensor, Context], Tensor]
"""`(logits float32[V], context) -> float32[V]`: pure; -inf bans a token."""

_NO_CONTEXT = Context()


@dataclass(frozen=True, slots=True)
class Named:
    """A transform with a name, by which a saved state refers to it: `restore(..., transforms={name: fn})`."""

    name: str
    transform: Transform

    def __call__(self, logits: Tensor, context: Context) -> Tensor:
        return self.transform(logits, context)


def named(name: str, transform: Transform) -> Named:
    """The transform under a name, so that states with requests that use it can be saved."""
    if not isinstance(name, str) or not name or not callable(transform):
        raise RequestError(f"named({name!r}, {transform!r}) takes a non-empty string and a function")
    return Named(name, transform)


class RowTransform(Protocol):
    """A `Transform` of this module: it also takes rows [..., V] of one context, which may be omitted."""

    def __call__(self, logits: Tensor, context: Context = _NO_CONTEXT, /) -> Tensor: ...


# What a number may be: its kind, in words, and as a test. The ranges keep float32 logits finite: within them
# no quotient of a finite logit overflows.
_NUMBERS: dict[str, tuple[Any, str, Callable[[Any], bool]]] = {
    "temperature": (float, "0 (greedy) or in [1e-5, 1e5]", lambda x: x == 0 or 1e-5 <= x <= 1e5),
    "top_p": (float, "in (0, 1]; 1 is off", lambda x: 0 < x <= 1),
    "min_p": (float, "in [0, 1]; 0 is off", lambda x: 0 <= x <= 1),
    "repetition_penalty": (float, "in [1e-5, 1e5]; 1 is off", lambda x: 1e-5 <= x <= 1e5),
    "presence_penalty": (float, "in [-2, 2]; 0 is off", lambda x: -2 <= x <= 2),
    "frequency_penalty": (float, "in [-2, 2]; 0 is off", lambda x: -2 <= x <= 2),
    "logit_bias value": (
        float,
        "in [-1e30, 1e30], or -inf to ban the token",
        lambda x: x == -math.inf or -1e30 <= x <= 1e30,
    ),
    "n": (int, "at least 1", lambda x: x >= 1),
    "best_of": (int, "at least 1, or None", lambda x: x >= 1),
    "top_k": (int, "0 or -1 (off), or in [1, 2**31)", lambda x: -1 <= x < 2**31),
    "max_tokens": (int, "at least 1, or None for no limit", lambda x: x >= 1),
    "min_tokens": (int, "at least 0", lambda x: x >= 0),
    "seed": (int, "in [0, 2**64), or None to derive one from the engine's", lambda x: 0 <= x < 2**64),
    "logprobs": (int, "at least 0, or None", lambda x: x >= 0),
    "prompt_logprobs": (int, "at least 0, or None", lambda x: x >= 0),
    "stop_token_ids element": (int, "at least 0", lambda x: x >= 0),
    "logit_bias token id": (int, "at least 0", lambda x: x >= 0),
    "engine seed": (int, "in [0, 2**64)", lambda x: 0 <= x < 2**64),
}
_FLAGS = ("include_stop_str_in_output", "ignore_eos", "skip_special_tokens", "detokenize")
_OPTIONAL = ("best_of", "max_tokens", "seed", "logprobs", "prompt_logprobs")


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to sample a request. Names and defaults are vLLM's. Immutable, hashable, compared by value.

    n: samples to return. best_of: samples to run, of which the n of highest cumulative log-probability
        are returned; None is n.
    temperature: 0 is greedy. top_k, top_p, min_p: see `folo.ops.sampler.warp`; applied in the order
        min-p, top-k, top-p after temperature. top_k 0 or -1, top_p 1 and min_p 0 are off.
    repetition_penalty: for tokens of prompt and output; presence_penalty, frequency_penalty: of the output.
    logit_bias: {token id: what is added to its logit}, -inf to ban it. Kept as a tuple of pairs, sorted.
    max_tokens: most output tokens; None for as many as fit. min_tokens: no stop token
        and no stop string before that many.
    stop: strings that end the output (cut off unless include_stop_str_in_output). Kept as a tuple.
    stop_token_ids: tokens that end it, besides the model's own end of sequence, which ignore_eos disables.
    detokenize, skip_special_tokens: whether outputs have text, and whether special tokens are left out of it.
    seed: 64 bits; None derives one from the engine's seed and the request's id (`derive_seed`).
    logprobs, prompt_logprobs: how many of the likeliest tokens to report besides the chosen one.
    logprobs_mode: "raw" (the model's distribution) or "processed" (the one that was sampled).
    logits_processors: the caller's own transforms, applied last, in order.

    Raises RequestError, which names the value and the valid range.
    """

    n: int = 1
    best_of: int | None = None
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | tuple[tuple[int, float], ...] | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logprobs_mode: Literal["raw", "processed"] = "raw"
    skip_special_tokens: bool = True
    detokenize: bool = True
    logits_processors: Sequence[Transform] = ()

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            if name in _NUMBERS and not (value is None and name in _OPTIONAL):
                self._set(name, _number(name, value))
        for name in _FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise RequestError(f"{name} must be True or False, got {getattr(self, name)!r}")
        self._set("logit_bias", _biases(self.logit_bias))
        self._set("stop", _stops(self.stop))
        self._set("stop_token_ids", _token_ids(self.stop_token_ids))
        self._set("logits_processors", _callables(self.logits_processors))
        self._check_together()

    @property
    def num_samples(self) -> int:
        """How many sequences are computed."""
        return self.best_of or self.n

    @property
    def penalizes(self) -> bool:
        """Whether any penalty is on, so that sampling depends on earlier tokens."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _check_together(self) -> None:
        if self.best_of is not None and self.best_of < self.n:
            raise RequestError(f"best_of must be at least n, got best_of={self.best_of} and n={self.n}")
        if self.temperature == 0 and self.n > 1:
            raise RequestError(f"n must be 1 when using greedy sampling (temperature 0), got {self.n}")
        if self.temperature == 0 and self.best_of is not None and self.best_of > 1:
            raise RequestError(
                f"best_of must be 1 or None when using greedy sampling (temperature 0), got {self.best_of}: "
                "all samples would be equal"
            )
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(
                f"min_tokens must be at most max_tokens={self.max_tokens}, got {self.min_tokens}"
            )
        if self.stop and not self.detokenize:
            raise RequestError(
                f"stop={self.stop!r} needs detokenize=True: stop strings are found in the text"
            )
        if self.logprobs_mode not in ("raw", "processed"):
            raise RequestError(f'logprobs_mode must be "raw" or "processed", got {self.logprobs_mode!r}')


def temperature(value: float) -> RowTransform:
    """Divide the logits by `value`, in [1e-5, 1e5]. Greedy decoding is not a transform: 0 is refused."""
    value = _number("temperature", value)
    if value == 0:
        raise RequestError(
            "temperature must be in [1e-5, 1e5] as a transform, got 0: take the argmax instead"
        )
    return _warp(temperature=value)


def min_p(value: float) -> RowTransform:
    """Drop tokens less likely than `value`, in [0, 1], times the likeliest."""
    return _warp(min_p=_number("min_p", value))


def top_k(value: int) -> RowTransform:
    """Keep the `value` largest logits, and ties with the last of them; 0 and -1 keep all."""
    return _warp(top_k=_number("top_k", value))


def top_p(value: float) -> RowTransform:
    """Keep the likeliest tokens whose probabilities reach `value`, in (0, 1]; the lower id wins a tie."""
    return _warp(top_p=_number("top_p", value))


def repetition_penalty(value: float) -> RowTransform:
    """Divide positive logits, multiply negative ones, of tokens in prompt or output by `value`."""
    return _penalize(repetition=_number("repetition_penalty", value))


def frequency_penalty(value: float) -> RowTransform:
    """Subtract `value`, in [-2, 2], times the number of times that a token is in the output."""
    return _penalize(frequency=_number("frequency_penalty", value))


def presence_penalty(value: float) -> RowTransform:
    """Subtract `value`, in [-2, 2], from the logits of tokens in the output."""
    return _penalize(presence=_number("presence_penalty", value))


def logit_bias(biases: Mapping[int, float]) -> RowTransform:
    """Add to the logits of these token ids; -inf bans one. An id of V or more raises IndexError when used."""
    return _penalize(bias=_biases(biases))


def chain(*transforms: Transform) -> RowTransform:
    """The transform that applies these from left to right. An empty chain leaves the logits as they are."""

    def chained(logits: Tensor, context: Context = _NO_CONTEXT, /) -> Tensor:
        for transform in transforms:
            logits = transform(logits, context)
        return logits

    return chained


def transforms_of(params: SamplingParams) -> RowTransform:
    """What `params` does to a row before the draw, in the pinned order: the reference for the engine.

    Not here: the ban on stop tokens before min_tokens, since only the engine knows the model's own.
    """
    steps: list[Transform] = [
        repetition_penalty(params.repetition_penalty),
        frequency_penalty(params.frequency_penalty),
        presence_penalty(params.presence_penalty),
        _penalize(bias=_biases(params.logit_bias)),
    ]
    if params.temperature > 0:
        steps.append(temperature(params.temperature))
    steps += [min_p(params.min_p), top_k(params.top_k), top_p(params.top_p), *params.logits_processors]
    return chain(*steps)


def derive_seed(engine_seed: int, request_id: str) -> int:
    """The seed, in [0, 2**64), of a request that has none: blake2b of the engine's seed and the id."""
    digest = hashlib.blake2b(_number("engine seed", engine_seed).to_bytes(8, "little"))
    digest.update(request_id.encode("utf-8", "surrogatepass"))
    return int.from_bytes(digest.digest()[:8], "little")


def _warp(temperature: float = 1.0, min_p: float = 0.0, top_k: int = 0, top_p: float = 1.0) -> RowTransform:
    def warped(logits: Tensor, context: Context = _NO_CONTEXT, /) -> Tensor:
        rows = logits.reshape(-1, logits.shape[-1])
        k = torch.full((len(rows),), top_k, dtype=torch.int64, device=rows.device)
        result = sampler.warp(rows, _column(temperature, rows), _column(min_p, rows), k, _column(top_p, rows))
        return result.reshape(logits.shape)

    return warped


def _penalize(
    repetition: float = 1.0,
    presence: float = 0.0,
    frequency: float = 0.0,
    bias: tuple[tuple[int, float], ...] = (),
) -> RowTransform:
    def penalized(logits: Tensor, context: Context = _NO_CONTEXT, /) -> Tensor:
        rows = logits.reshape(-1, logits.shape[-1])
        count, device = len(rows), rows.device
        tokens = torch.tensor([*context.prompt_ids, *context.output_ids], dtype=torch.int64, device=device)
        row = torch.arange(count, device=device)
        result = sampler.penalize(
            rows,
            tokens.repeat(count),
            torch.arange(count + 1, device=device) * len(tokens),
            torch.full_like(row, len(context.prompt_ids)),
            _column(repetition, rows),
            _column(presence, rows),
            _column(frequency, rows),
            row.repeat_interleave(len(bias)),
            torch.tensor([token for token, _ in bias], dtype=torch.int64, device=device).repeat(count),
            torch.tensor([value for _, value in bias], dtype=torch.float32, device=device).repeat(count),
        )
        return result.reshape(logits.shape)

    return penalized


def _column(value: float, rows: Tensor) -> Tensor:
    return torch.full((len(rows),), value, dtype=torch.float32, device=rows.device)


def _number(name: str, value: Any) -> Any:
    """An int or a float within its range. numpy's numbers count as numbers; True and False do not."""
    kind, text, valid = _NUMBERS[name]
    expected: Any = Integral if kind is int else Real
    if not isinstance(value, expected) or isinstance(value, bool) or not valid(value):
        prefix = "an integer, " if kind is int else ""
        raise RequestError(f"{name} must be {prefix}{text}, got {value!r}")
    return kind(value)


def _biases(
    biases: Mapping[int, float] | tuple[tuple[int, float], ...] | None,
) -> tuple[tuple[int, float], ...]:
    """Sorted pairs: hashable and picklable, unlike a mapping; `dict` makes one of them again."""
    try:
        pairs = dict(() if biases is None else biases).items()
    except (TypeError, ValueError):
        raise RequestError(f"logit_bias must map token ids to numbers, got {biases!r}") from None
    return tuple(
        sorted(
            (_number("logit_bias token id", token), _number("logit_bias value", value))
            for token, value in pairs
        )
    )


def _stops(stop: Any) -> tuple[str, ...]:
    stops = (stop,) if isinstance(stop, str) else _elements("stop", stop)
    for text in stops:
        if not isinstance(text, str) or not text:
            raise RequestError(f"stop must hold strings that are not empty, got {text!r}")
    return stops


def _token_ids(ids: Any) -> tuple[int, ...]:
    return tuple(_number("stop_token_ids element", token) for token in _elements("stop_token_ids", ids))


def _callables(processors: Any) -> tuple[Transform, ...]:
    elements = _elements("logits_processors", processors)
    for processor in elements:
        if not callable(processor):
            raise RequestError(f"logits_processors must hold functions, got {processor!r}")
    return elements


def _elements(name: str, values: Any) -> tuple[Any, ...]:
    if values is None:
        return ()
    if isinstance(values, str | bytes | bytearray) or not isinstance(values, Sequence):
        raise RequestError(f"{name} must be a sequence, got {values!r}")
    return tuple(values)
