"""The layout of K and V in memory: as the kernels read them, so that none has to transpose.

On a GPU `k` and `v` are `[..., num_blocks, block_size, num_kv_heads, head_dim]` with head_dim innermost.

A CPU multiplies a query with many keys at once: there the keys of a block lie side by side, one element of
each after the other. What is stored in 16 bits lies in pairs, as a CPU multiplies it: two elements of a key,
and an element of the values of two keys. So `k` is `[..., num_blocks, block_size, num_kv_heads, head_dim / 2,
2]`, and `v` `[..., num_blocks, block_size / 2, 2, num_kv_heads, head_dim]` (rounded up).

Both are views of memory that has all of a head together, block after block: attention reads one head at a
time, and a sequence's blocks mostly follow each other, which a CPU that looks ahead makes use of.
"""

from __future__ import annotations

import torch
from torch import Tensor

from folo.ops.memory import mapped


def zeros(
    shape: tuple[int, int, int, int, int], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """K and V of all layers, for `[num_layers, num_blocks, block_size, num_kv_heads, head_dim]`."""
    layers, blocks, size, heads, dim = shape
    outer = (layers, heads, blocks)
    if device.type != "cpu":
        k, v = (torch.zeros((*outer, size, dim), dtype=dtype, device=device) for _ in range(2))
        return k.permute(0, 2, 3, 1, 4), v.permute(0, 2, 3, 1, 4)
    if dtype.itemsize == 2:
        k = mapped((*outer, dim // 2, size, 2), dtype).permute(0, 2, 4, 1, 3, 5)
        v = mapped((*outer, -(-size // 2), dim, 2), dtype).permute(0, 2, 3, 5, 1, 4)
        return k, v
    k = mapped((*outer, dim, size), dtype).permute(0, 2, 4, 1, 3)
    return k, mapped((*outer, size, dim), dtype).permute(0, 2, 3, 1, 4)


def read(k: Tensor, v: Tensor, block: Tensor, slot: Tensor) -> tuple[Tensor, Tensor]:
    """K and V at slots of blocks, of one layer or of all: indices int64 `[...]` -> `[(L,) ..., heads, E]`."""
    if not _paired(k, v):
        return k[..., block, slot, :, :], v[..., block, slot, :, :]
    return k[..., block, slot, :, :, :].flatten(-2), v[..., block, slot // 2, slot % 2, :, :]


def write(k: Tensor, v: Tensor, block: Tensor, slot: Tensor, new_k: Tensor, new_v: Tensor) -> None:
    """Write K and V there, in place, shaped as `read` returns them."""
    if not _paired(k, v):
        k[..., block, slot, :, :], v[..., block, slot, :, :] = new_k, new_v
    else:
        k[..., block, slot, :, :, :] = new_k.unflatten(-1, (-1, 2))
        v[..., block, slot // 2, slot % 2, :, :] = new_v


def _paired(k: Tensor, v: Tensor) -> bool:
    return k.shape != v.shape
