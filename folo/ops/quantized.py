"""A linear weight of small integers in groups along K, as a value and in the layout that the kernels read."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from folo.ops.memory import Arena
from folo.ops.packed import TILE
from folo.ops.tree import register

BITS = (2, 4, 8)
BLOCK = 32  # columns that fill one word for each bit of a code
SPANS = (1, 2, 4)  # blocks that may share a scale: kernels multiply no more at a time


@dataclass(frozen=True, eq=False)
class Grouped:
    """A weight `[N, K]`: element [n, k] of group g = groups[k] is scales[g, n] * (codes[n, k] - zeros[g, n]).

    codes uint8 `[N, K]`, below 2^bits; scales float16 `[G, N]`; zeros uint8 `[G, N]`; groups int64 `[K]`.

    group_size: columns of a group; -1: there is one group.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    groups: Tensor
    bits: int
    group_size: int

    def joins(self, other: Grouped) -> bool:
        """Whether rows of both may stand in one weight."""
        same = (self.bits, self.group_size) == (other.bits, other.group_size)
        return same and torch.equal(self.groups, other.groups)

    def split(self, heights: list[int]) -> list[Grouped]:
        """The weights that were `joined`."""
        codes, scales = self.codes.split(heights), self.scales.split(heights, 1)
        rows = zip(codes, scales, self.zeros.split(heights, 1), strict=True)
        return [replace(self, codes=c, scales=s, zeros=z) for c, s, z in rows]

    def to(self, device: torch.device) -> Grouped:
        parts = {name: getattr(self, name).to(device) for name in ("codes", "scales", "zeros", "groups")}
        return replace(self, **parts)


def joined(weights: list[Grouped]) -> Grouped:
    """The weights stacked, the first on top; each of them `joins` the first."""
    first = weights[0]
    return Grouped(
        torch.cat([weight.codes for weight in weights]),
        torch.cat([weight.scales for weight in weights], 1),
        torch.cat([weight.zeros for weight in weights], 1),
        first.groups,
        first.bits,
        first.group_size,
    )


@dataclass(frozen=True, eq=False)
class Quantized:
    """A `Grouped` weight `[N, K]` in tiles of 16 rows and blocks of 32 columns, a group's columns together.

    codes: int32 `[ceil(N / 16), B, bits, 16]`. A word holds 32 / bits columns of a row: the even ones in its
        lower half, the odd ones in its upper half, low bits first, so that a shift and a mask leave a pair.
    scales, zeros: float16 and uint8 `[ceil(N / 16), S, 16]`, for each span: of 4 blocks if every group begins
        at a multiple of 4, else of 2 if each begins at one of 2, else of 1. Kernels need not know of groups.
    groups: int32 `[S]`, the group of each span.
    columns: int64 `[32 B]`, the column at each place, K at an empty one; None if the columns are in order and
        empty places come last.
    num_groups: those of `Grouped`, some of which may have no column, and so no span.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    groups: Tensor
    columns: Tensor | None
    shape: tuple[int, int]
    group_size: int
    num_groups: int

    def __reduce__(self) -> tuple[Any, ...]:
        rest = (getattr(self, field.name) for field in fields(self)[1:])
        return Quantized, (self.codes.clone(), *rest)  # as `Packed`: codes lie in an arena

    @property
    def bits(self) -> int:
        return self.codes.shape[2]

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def num_bytes(self) -> int:
        return sum(leaf.numel() * leaf.itemsize for leaf in pytree.tree_leaves(self))

    @property
    def parts(self) -> list[Tensor]:
        """What an op takes for it: its tensors, of which the last may be missing."""
        parts = [self.codes, self.scales, self.zeros]
        return parts if self.columns is None else [*parts, self.columns]

    def plain(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight `[N, K]`. Exact in float32 and float64."""
        return stored(self.codes, self.scales, self.zeros, dtype)[: self.shape[0], self._places()]

    def grouped(self) -> Grouped:
        """The weight as `quantized` got it; groups without a column have scales and zeros of 0."""
        n = self.shape[0]
        places, groups = self._places(), self.groups.long()
        scales, zeros = self.scales.new_zeros(self.num_groups, n), self.zeros.new_zeros(self.num_groups, n)
        scales[groups], zeros[groups] = (
            part.transpose(1, 2).flatten(0, 1)[:n].t() for part in (self.scales, self.zeros)
        )
        return Grouped(
            _unpacked(self.codes)[:n, places].contiguous(),
            scales,
            zeros,
            groups[places // (BLOCK * span_blocks(self.codes, self.scales))],
            self.bits,
            self.group_size,
        )

    def _places(self) -> Tensor:
        """Where each column stands, int64 `[K]`."""
        k = self.shape[1]
        if self.columns is None:
            return torch.arange(k, device=self.device)
        return torch.argsort(self.columns, stable=True)[:k]


def quantized(weight: Grouped, arena: Arena | None = None) -> Quantized:
    """Lay a weight out; its codes lie in the arena if there is one."""
    n, k = weight.codes.shape
    counts = torch.bincount(weight.groups, minlength=weight.scales.shape[0])
    starts = F.pad(torch.cumsum(-(-counts // BLOCK), 0), (1, 0))
    order = torch.argsort(weight.groups, stable=True)
    group = weight.groups[order]
    rank = torch.arange(k, device=order.device) - (torch.cumsum(counts, 0) - counts)[group]
    columns = torch.full((int(starts[-1]) * BLOCK,), k, device=order.device)
    columns[starts[group] * BLOCK + rank] = order
    codes = F.pad(weight.codes, (0, 1, 0, -n % TILE))[:, columns]
    codes = _packed(codes, weight.bits)
    if arena is not None:
        codes = arena.take(tuple(codes.shape), codes.dtype).copy_(codes)
    in_order = torch.equal(columns[:k], torch.arange(k, device=columns.device))
    whole = math.gcd(SPANS[-1], *starts[:-1].tolist())
    first = torch.arange(0, int(starts[-1]), whole, device=starts.device)
    groups = torch.searchsorted(starts, first, right=True) - 1
    return Quantized(
        codes,
        _tiles(weight.scales[groups]),
        _tiles(weight.zeros[groups]),
        groups.int(),
        None if in_order else columns,
        (n, k),
        weight.group_size,
        len(counts),
    )


def span_blocks(codes: Tensor, scales: Tensor) -> int:
    """Blocks in a span of `Quantized`, by the shapes; if there is only one span, enough for all blocks."""
    needed = -(-codes.shape[1] // scales.shape[1])
    return next(blocks for blocks in SPANS if blocks >= needed)


def stored(codes: Tensor, scales: Tensor, zeros: Tensor, dtype: torch.dtype) -> Tensor:
    """The columns as they stand in the layout of `Quantized`, `[16 ceil(N / 16), 32 B]`."""
    spans = torch.arange(codes.shape[1], device=codes.device) // span_blocks(codes, scales)
    values = _unpacked(codes).unflatten(1, (-1, BLOCK)).to(dtype)
    scales, zeros = (part.to(dtype).transpose(1, 2).flatten(0, 1)[:, spans, None] for part in (scales, zeros))
    return ((values - zeros) * scales).flatten(1)


def placed(x: Tensor, codes: Tensor, columns: Tensor | None) -> Tensor:
    """x `[M, K]` with its columns placed as in `Quantized`, `[M, 32 B]`: zero at empty places."""
    if columns is not None:
        return F.pad(x, (0, 1))[:, columns]
    missing = BLOCK * codes.shape[1] - x.shape[1]
    return F.pad(x, (0, missing)) if missing else x  # F.pad copies in any case


def _tiles(rows: Tensor) -> Tensor:
    """`[S, N]` -> `[ceil(N / 16), S, 16]`."""
    return F.pad(rows, (0, -rows.shape[1] % TILE)).unflatten(1, (-1, TILE)).transpose(0, 1).contiguous()


def _shifts(bits: int) -> list[int]:
    """Where in a word its columns stand, in order."""
    return [bits * pair + 16 * odd for pair in range(16 // bits) for odd in range(2)]


def _packed(codes: Tensor, bits: int) -> Tensor:
    """uint8 `[16 T, 32 B]` -> `[T, B, bits, 16]`."""
    columns = codes.unflatten(1, (-1, bits, BLOCK // bits))
    words = torch.zeros(columns.shape[:-1], dtype=torch.int32, device=codes.device)
    for place, shift in enumerate(_shifts(bits)):
        words |= columns[..., place].int() << shift
    return words.unflatten(0, (-1, TILE)).permute(0, 2, 3, 1).contiguous()


def _unpacked(words: Tensor) -> Tensor:
    """`[T, B, bits, 16]` -> uint8 `[16 T, 32 B]`."""
    bits = words.shape[2]
    rows = words.permute(0, 3, 1, 2).flatten(0, 1)
    columns = [((rows >> shift) & (2**bits - 1)).to(torch.uint8) for shift in _shifts(bits)]
    return torch.stack(columns, -1).flatten(1)


register(Quantized, context=("shape", "group_size", "num_groups"))
