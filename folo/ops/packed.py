"""A linear weight in the layout that a backend's kernels read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from folo.ops.memory import Arena
from folo.ops.tree import register

TILE = 16  # columns of the product that stand together
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def pack(weight: Tensor, arena: Arena | None = None) -> Tensor:
    """A weight `[N, K]` in one of DTYPES as `Packed.data`, which lies in the arena if there is one."""
    paired = weight.dtype == torch.bfloat16
    tail, rest = -weight.shape[0] % TILE, -weight.shape[1] % 32 if paired else 0
    if tail or rest:  # F.pad copies in any case
        weight = F.pad(weight, (0, rest, 0, tail))
    rows = weight.unflatten(1, (-1, 2)) if paired else weight
    packed = rows.unflatten(0, (-1, TILE)).transpose(1, 2)
    if arena is None:
        return packed.clone(memory_format=torch.contiguous_format)
    return arena.take(tuple(packed.shape), packed.dtype).copy_(packed)


@dataclass(frozen=True, eq=False)
class Packed:
    """A weight `[N, K]` in tiles of 16 rows, padded with zeros: the CPU kernels' layout.

    data: `[ceil(N / 16), K, 16]` in float32 and float16; `[ceil(N / 16), ceil(K / 32) * 16, 16, 2]` in
    bfloat16, whose instructions take two products at a time.
    """

    data: Tensor
    shape: tuple[int, int]

    def __reduce__(self) -> tuple[Any, ...]:
        # On its own: pickle writes all of the memory that a tensor lies in, and an arena holds every weight.
        return Packed, (self.data.detach().clone(), self.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.data.dtype

    @property
    def device(self) -> torch.device:
        return self.data.device

    @property
    def parts(self) -> list[Tensor]:
        """What an op takes for it."""
        return [self.data]

    def rows(self, index: Tensor) -> Tensor:
        """Some of the weight's rows: index int64 `[T]` -> `[T, K]`."""
        return self.data[index // TILE, :, index % TILE].flatten(1)[:, : self.shape[1]]

    def plain(self) -> Tensor:
        """The weight `[N, K]`."""
        rows = self.data.transpose(1, 2).flatten(0, 1).flatten(1)
        return rows[: self.shape[0], : self.shape[1]].contiguous()


register(Packed, context=("shape",))
