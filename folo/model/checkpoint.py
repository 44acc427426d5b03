"""What a file format has to offer so that weights can be loaded from it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor

from folo.model.config import DecoderConfig
from folo.ops.quantized import Grouped

_SLAB_ELEMENTS = 1 << 20


class Weights(Protocol):
    """Tensors to be read. Layers and tensors go by their names in transformers' state dict."""

    def read(self, name: str, out: Tensor) -> None:
        """Fill `out`, which has the stored shape, and any dtype and device."""
        ...

    def quantized(self, module: str, shape: tuple[int, ...]) -> Grouped | None:
        """The weight `[N, K]` of a linear layer that is stored in groups of integers; None if it is not."""
        ...


class Checkpoint(Weights, Protocol):
    """Weights on disk, and the decoder that they belong to."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Every tensor that is stored, by the name that the file gives it."""
        ...

    @property
    def stored_dtype(self) -> torch.dtype:
        """What `dtype="auto"` stands for."""
        ...

    def parts(self, name: str, shape: tuple[int, ...]) -> Mapping[str, tuple[int, ...]]:
        """The shapes, by the file's own names, of what has to be stored for transformers' tensor `name`."""
        ...

    def config(self, dtype: torch.dtype) -> DecoderConfig:
        """The decoder that the metadata describes; raises LoadError if it is not supported."""
        ...


def row_slabs(shape: tuple[int, ...]) -> Iterator[slice]:
    """Cut the first dimension into runs of about a million elements: all that is ever held beside `out`."""
    rows = shape[0]
    step = max(1, _SLAB_ELEMENTS * rows // max(1, torch.Size(shape).numel()))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))
