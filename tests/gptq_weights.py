"""Random weights of few bits, for the tests of kernels."""

from __future__ import annotations

import torch

from folo.ops.quantized import Grouped, Quantized, quantized


def weight(n: int, k: int, group_size: int, bits: int = 4, desc_act: bool = False) -> Quantized:
    numbers = torch.Generator().manual_seed(n + k + bits)
    size = k if group_size == -1 else group_size
    groups = torch.arange(k) // size
    num_groups = int(groups[-1]) + 1
    if desc_act:
        groups = groups[torch.randperm(k, generator=numbers)]
    codes = torch.randint(2**bits, (n, k), generator=numbers, dtype=torch.uint8)
    zeros = torch.randint(2**bits, (num_groups, n), generator=numbers, dtype=torch.uint8)
    scales = torch.rand(num_groups, n, generator=numbers) + 0.5
    return quantized(Grouped(codes, scales.half(), zeros, groups, bits, group_size))
