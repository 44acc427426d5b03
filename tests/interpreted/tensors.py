"""Tensors for the tests of interpreted kernels, and how results are compared."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float16)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """As torch.equal, but -0.0 differs from 0.0, and NaN equals itself."""
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(kind), b.contiguous().view(kind))


def check_rounded_once(got: Tensor, exact: Tensor, slack: float = 1.02) -> None:
    """Within 1e-5 of the largest element in float32; in float16 as near as `exact` rounded, up to `slack`."""
    assert got.shape == exact.shape
    error = (got.double() - exact).abs()
    if got.dtype == torch.float32:
        assert error.max() <= 1e-5 * exact.abs().max()
    else:
        assert error.mean() <= slack * (exact.to(got.dtype).double() - exact).abs().mean()
