"""K and V `[num_blocks, block_size, num_kv_heads, head_dim]`, into caches as the heap lays them, and back."""

from __future__ import annotations

import torch
from torch import Tensor

from folo.ops import kv_cache


def laid(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    (k_cache,), (v_cache,) = kv_cache.zeros((1, *k.shape), k.dtype, k.device)  # pyright: ignore[reportArgumentType]
    kv_cache.write(k_cache, v_cache, *_slots(k_cache), k, v)
    return k_cache, v_cache


def plain(k_cache: Tensor, v_cache: Tensor) -> tuple[Tensor, Tensor]:
    return kv_cache.read(k_cache, v_cache, *_slots(k_cache))


def _slots(k_cache: Tensor) -> tuple[Tensor, Tensor]:
    return torch.arange(k_cache.shape[0])[:, None], torch.arange(k_cache.shape[1])
