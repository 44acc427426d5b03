"""Linear layers in AutoGPTQ's checkpoint format, which GPTQModel writes too: names, shapes and meaning.

Of a layer `[N, K]` with b bits in groups of g columns, a file holds, under its module's name:

    qweight  int32 [K b / 32, N]          codes, packed along K, low bits first
    qzeros   int32 [ceil(K / g), N b / 32]  zeros, packed along N, low bits first
    scales   float16 [ceil(K / g), N]
    g_idx    int32 [K]                     the group of each column; k // g where it is not stored
    bias     float16 [N], or none

A weight is scale * (code - zero). Format "gptq" stores zero - 1 modulo 2^b, "gptq_v2" the zero itself.
(https://github.com/AutoGPTQ/AutoGPTQ, auto_gptq/nn_modules/qlinear; https://github.com/ModelCloud/GPTQModel,
gptqmodel/nn_modules/qlinear.)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from folo.errors import LoadError
from folo.model.config import typed
from folo.ops.quantized import BITS, Grouped

FILES = ("quantize_config.json", "quant_config.json")
_FORMATS = ("gptq", "gptq_v2")
_WORD = 32


@dataclass(frozen=True)
class Scheme:
    """How layers are stored. dynamic: GPTQModel's rules, (pattern of module names, keys that it changes)."""

    bits: int
    group_size: int
    version: int
    dynamic: tuple[tuple[str, Mapping[str, Any]], ...] = ()

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Scheme:
        """From `quantization_config` or `quantize_config.json`. Raises LoadError if it is not supported."""
        method = config.get("quant_method") or config.get("method") or "unnamed"
        if method != "gptq":
            raise LoadError(f"The checkpoint has a quantization_config ({method}): only gptq is supported.")
        named = config.get("checkpoint_format") or config.get("format") or "gptq"
        if named not in _FORMATS:
            raise LoadError(f"The GPTQ format {named!r} is not supported: only {' and '.join(_FORMATS)} are.")
        words = config.get("pack_dtype") or "int32"
        if words != "int32":
            raise LoadError(f"pack_dtype is {words!r}: only int32 is supported.")
        rules = typed(config, "dynamic", dict) or {}
        dynamic = tuple((pattern, typed(rules, pattern, dict) or {}) for pattern in rules)
        bits, group_size = (config.get(key) for key in _KEYS)  # of any type: `_checked` refuses others
        return _checked(cls(bits, group_size, _FORMATS.index(named) + 1, dynamic))  # pyright: ignore[reportArgumentType]

    def at(self, module: str) -> Scheme:
        """The scheme of one module: the first rule that matches its name changes it."""
        for pattern, changes in self.dynamic:
            if not pattern.startswith("-:") and _matches(pattern.removeprefix("+:"), module):
                return _checked(replace(self, **{key: changes[key] for key in _KEYS if key in changes}))
        return self

    def parts(self, n: int, k: int) -> dict[str, tuple[int, ...]]:
        """The tensors of a layer `[N, K]` that are always stored, and their shapes.

        Raises LoadError if the layer does not fill words.
        """
        per = _WORD // self.bits
        if n % per or k % per:
            raise LoadError(f"A layer of {k} inputs and {n} outputs does not fill words of {per} codes.")
        groups = 1 if self.group_size == -1 else -(-k // self.group_size)
        return {"qweight": (k // per, n), "qzeros": (groups, n // per), "scales": (groups, n)}


_KEYS = ("bits", "group_size")


def _matches(pattern: str, module: str) -> bool:
    try:
        return re.match(pattern, module) is not None
    except re.error as error:
        raise LoadError(f"dynamic has the pattern {pattern!r}, which is none: {error}.") from error


def _checked(scheme: Scheme) -> Scheme:
    if type(scheme.bits) is not int or scheme.bits not in BITS:  # where 4.0 and 4 are the same
        raise LoadError(f"bits is {scheme.bits!r}: only {', '.join(map(str, BITS))} are supported.")
    size = scheme.group_size
    if type(size) is not int or (size != -1 and size <= 0):
        raise LoadError(f"group_size is {size!r}: it must be a positive integer, or -1 for whole columns.")
    return scheme


def find_scheme(
    path: Path, config: Mapping[str, Any], read_json: Callable[[Path], dict[str, Any]]
) -> Scheme | None:
    """The scheme of a checkpoint's directory, from its config.json or one of `FILES`; None if it is dense."""
    if (given := typed(config, "quantization_config", dict)) is not None:
        return Scheme.of(given)
    for file in (path / name for name in FILES):
        if file.exists():
            return Scheme.of({"quant_method": "gptq", **read_json(file)})
    return None


def read(scheme: Scheme, module: str, k: int, tensor: Callable[[str], Tensor | None]) -> Grouped:
    """The weight of a layer of k inputs. tensor(kind): one of the module's tensors; None if it is not stored.

    Raises LoadError if g_idx is out of range, or scales are not finite in float16.
    """
    qweight, qzeros, scales = (tensor(kind) for kind in ("qweight", "qzeros", "scales"))
    assert qweight is not None
    assert qzeros is not None
    assert scales is not None
    bits, num_groups = scheme.bits, scales.shape[0]
    if not scales.half().isfinite().all():
        raise LoadError(f"{module}.scales holds what is no finite float16.")
    groups = tensor("g_idx")
    if groups is None:
        groups = torch.arange(k, device=scales.device) // (
            k if scheme.group_size == -1 else scheme.group_size
        )
    wrong = groups[(groups < 0) | (groups >= num_groups)]
    if wrong.numel():
        raise LoadError(f"{module}.g_idx holds {int(wrong[0])}: there are {num_groups} groups.")
    zeros = _unpack(qzeros, bits)
    if scheme.version == 1:
        zeros = (zeros + 1) & (2**bits - 1)
    codes = _unpack(qweight.t(), bits)
    return Grouped(codes, scales.half(), zeros, groups.long(), bits, scheme.group_size)


def tensors(weight: Grouped) -> Iterator[tuple[str, Tensor]]:
    """A layer's tensors in format "gptq", by kind, without its bias."""
    yield "qweight", _pack(weight.codes, weight.bits).t().contiguous()
    yield "qzeros", _pack((weight.zeros - 1) & (2**weight.bits - 1), weight.bits)
    yield "scales", weight.scales.contiguous()
    yield "g_idx", weight.groups.int()


def described(weights: list[Grouped]) -> dict[str, Any] | None:
    """The `quantization_config` of layers that `tensors` has written; None if no single one fits all."""
    bits, group_size = weights[0].bits, weights[0].group_size
    if any((weight.bits, weight.group_size) != (bits, group_size) for weight in weights):
        return None
    return {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "pack_dtype": "int32",
        "bits": bits,
        "group_size": group_size,
        "desc_act": any(bool((weight.groups.diff() < 0).any()) for weight in weights),
        "sym": all(bool((weight.zeros == 2 ** (bits - 1)).all()) for weight in weights),
    }


def _unpack(words: Tensor, bits: int) -> Tensor:
    """int32 `[R, C]` -> uint8 `[R, C * 32 / bits]`."""
    codes = [((words >> shift) & (2**bits - 1)).to(torch.uint8) for shift in range(0, _WORD, bits)]
    return torch.stack(codes, -1).flatten(1)


def _pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 `[R, C]` -> int32 `[R, C * bits / 32]`."""
    columns = codes.unflatten(1, (-1, _WORD // bits))
    words = torch.zeros(columns.shape[:2], dtype=torch.int32, device=codes.device)
    for place in range(columns.shape[2]):
        words |= columns[..., place].int() << (bits * place)
    return words
