"""GPTQ for one weight (Frantar et al. 2022, https://arxiv.org/abs/2210.17323): round it column by column, and
let the columns that are still to come make up for the error."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor

from folo.errors import ConfigError
from folo.ops.quantized import BITS, Grouped

_COLUMNS = 128  # rounded before their errors are moved to all later columns
_SMALLEST = 2.0**-24  # the smallest positive float16
_PARTS = tuple(1 - step / 80 for step in range(1, 40))  # of a group's range, down to about half of it


@dataclass(frozen=True)
class QuantConfig:
    """How weights are quantised.

    Args:
        bits: of a code: 2, 4 or 8.
        group_size: columns that share a scale; -1: all of them.
        sym: the zero is the middle code; otherwise it is where a group's own range puts it.
        desc_act: round the columns of the largest inputs first. Groups are then of columns in that order.
        damp: added to the Hessian's diagonal, relative to its mean.
        clip: let a group's scale reach only a part of its range, where that loses less.

    Raises ConfigError if a value is out of range.
    """

    bits: int = 4
    group_size: int = 128
    sym: bool = True
    desc_act: bool = False
    damp: float = 0.01
    clip: bool = True

    def __post_init__(self) -> None:
        if type(self.bits) is not int or self.bits not in BITS:  # where 4.0 and 4 are the same
            raise ConfigError(f"bits={self.bits!r}: expected one of {', '.join(map(str, BITS))}")
        if type(self.group_size) is not int or (self.group_size != -1 and self.group_size < 1):
            raise ConfigError(f"group_size={self.group_size!r}: expected a positive integer, or -1")
        if not isinstance(self.damp, Real) or not 0 < self.damp < 1:
            raise ConfigError(f"damp={self.damp!r}: expected a number between 0 and 1")
        for name in ("sym", "desc_act", "clip"):
            if not isinstance(getattr(self, name), bool):  # "no" is true
                raise ConfigError(f"{name}={getattr(self, name)!r}: expected True or False")


def gptq(weight: Tensor, hessian: Tensor, config: QuantConfig) -> Grouped:
    """Quantise a weight `[N, K]`; hessian `[K, K]`: the sum of x xᵀ over the inputs x `[K]`, in any scale.

    In float64 throughout, on the CPU. With the identity as Hessian it is rounding to nearest.
    """
    k = weight.shape[1]
    weight, hessian = weight.double(), hessian.double().clone()
    unused = hessian.diagonal() == 0
    hessian.diagonal()[unused] = 1
    order = torch.arange(k)
    if config.desc_act:
        order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    weight, hessian = weight[:, order], hessian[order][:, order]
    spread = _spread(hessian, config.damp)
    size = k if config.group_size == -1 else config.group_size
    codes = torch.empty(weight.shape, dtype=torch.uint8)
    scales, zeros = [], []
    for group in range(0, k, size):
        end = min(group + size, k)
        scale, zero = _grid(weight[:, group:end], spread.diagonal()[group:end], config)
        scales.append(scale)
        zeros.append(zero)
        for first in range(group, end, _COLUMNS):
            last = min(first + _COLUMNS, end)
            codes[:, first:last], errors = _block(
                weight[:, first:last], spread[first:last, first:last], scale, zero, config.bits
            )
            weight[:, last:] -= errors @ spread[first:last, last:]
    groups = torch.empty(k, dtype=torch.int64)
    groups[order] = torch.arange(k) // size
    back = torch.argsort(order)
    return Grouped(
        codes[:, back].contiguous(),
        torch.stack(scales).half(),
        torch.stack(zeros).to(torch.uint8),
        groups,
        config.bits,
        config.group_size,
    )


def relative_error(weight: Tensor, quantised: Tensor, hessian: Tensor) -> float:
    """|(W - Q) x|² over |W x|², each summed over the inputs x of the Hessian."""
    weight, hessian = weight.double(), hessian.double()
    lost = weight - quantised.double()
    return float(((lost @ hessian) * lost).sum() / ((weight @ hessian) * weight).sum())


def _spread(hessian: Tensor, damp: float) -> Tensor:
    """The upper Cholesky factor of the damped Hessian's inverse: how an error moves to later columns."""
    diagonal = hessian.diagonal()
    damped = hessian + torch.diag(damp * diagonal.mean().expand_as(diagonal))
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)


def _grid(columns: Tensor, spread: Tensor, config: QuantConfig) -> tuple[Tensor, Tensor]:
    """Scale, rounded to float16, and zero of each row of a group, float64 `[N]`.

    With `clip`, those of the part of the range that loses least: the search of the paper's own code
    (https://github.com/IST-DASLab/gptq, quant.py), by GPTQ's loss with each column taken by itself.
    """
    low, high = columns.amin(1).clamp(max=0), columns.amax(1).clamp(min=0)
    scale, zero = _reaching(low, high, config)
    if not config.clip:
        return scale, zero
    least = _loss(columns, spread, scale, zero, config.bits)
    for part in _PARTS:
        tried = _reaching(part * low, part * high, config)
        loss = _loss(columns, spread, *tried, config.bits)
        better = loss < least
        least = torch.where(better, loss, least)
        scale, zero = (torch.where(better, new, old) for new, old in zip(tried, (scale, zero), strict=True))
    return scale, zero


def _reaching(low: Tensor, high: Tensor, config: QuantConfig) -> tuple[Tensor, Tensor]:
    """Scale and zero whose codes go from low to high.

    A zero of 0 is avoided: format "gptq" stores zero - 1, and readers differ in what they make of -1.
    """
    most = 2**config.bits - 1
    if config.sym:
        scale = 2 * torch.maximum(-low, high) / most
    else:
        scale = torch.maximum((high - low) / most, high / (most - 1))
    scale = scale.half().double().clamp(min=_SMALLEST)
    if config.sym:
        return scale, torch.full_like(scale, 2 ** (config.bits - 1))
    return scale, torch.round(-low / scale).clamp(1, most)


def _loss(columns: Tensor, spread: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    scale, zero = scale[:, None], zero[:, None]
    error = columns - scale * (_codes(columns, scale, zero, bits) - zero)
    return (error / spread).square().sum(1)


def _codes(columns: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    return torch.round(columns / scale + zero).clamp(0, 2**bits - 1)


def _block(columns: Tensor, spread: Tensor, scale: Tensor, zero: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Round columns in order -> their codes, and their errors as `spread` takes them, `[N, C]` each."""
    columns, errors = columns.clone(), torch.empty_like(columns)
    codes = torch.empty(columns.shape, dtype=torch.uint8)
    for i in range(columns.shape[1]):
        code = _codes(columns[:, i], scale, zero, bits)
        codes[:, i] = code.to(torch.uint8)
        errors[:, i] = (columns[:, i] - scale * (code - zero)) / spread[i, i]
        columns[:, i + 1 :] -= errors[:, i, None] * spread[i, i + 1 :]
    return codes, errors
