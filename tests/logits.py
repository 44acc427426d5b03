"""Rows of logits for the sampler's ops."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from folo.ops import warp


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_logits(vocabulary: int, rows: int) -> Tensor:
    """Rounded to 1/16 in every third row, so that there are ties, and with some tokens banned."""
    logits = torch.randn(rows, vocabulary, generator=generator(vocabulary)) * 4
    logits[::3] = (logits[::3] * 16).round() / 16
    logits[torch.rand(rows, vocabulary, generator=generator(1)) < 0.02] = -math.inf
    logits[:, 3] = 1.0
    return logits


def warp_of(logits: Tensor, temperature=1.0, min_p=0.0, top_k=0, top_p=1.0, truncate=True) -> Tensor:
    """`warp` of all rows with the same parameters."""
    rows = len(logits)
    return warp(
        logits,
        torch.full((rows,), temperature),
        torch.full((rows,), min_p),
        torch.full((rows,), top_k),
        torch.full((rows,), top_p),
        truncate,
    )
