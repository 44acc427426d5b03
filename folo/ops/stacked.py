"""Linear weights that read the same input but cannot be one tensor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from folo.ops.packed import Packed
from folo.ops.quantized import Quantized


@dataclass(frozen=True, eq=False)
class Stacked:
    """A weight `[N, K]` in parts of their own kinds, one below the other."""

    parts: tuple[Tensor | Packed | Quantized, ...]

    @property
    def heights(self) -> list[int]:
        return [part.shape[0] for part in self.parts]

    @property
    def shape(self) -> tuple[int, int]:
        return sum(self.heights), self.parts[0].shape[1]

    @property
    def device(self) -> torch.device:
        return self.parts[0].device


Weight = Tensor | Packed | Quantized | Stacked


def _flatten_with_keys(weight: Any) -> tuple[list[Any], Any]:
    return [(pytree.SequenceKey(index), part) for index, part in enumerate(weight.parts)], None


pytree.register_pytree_node(
    Stacked,
    lambda weight: (list(weight.parts), None),
    lambda children, _: Stacked(tuple(children)),
    serialized_type_name="folo.Stacked",
    flatten_with_keys_fn=_flatten_with_keys,
)
