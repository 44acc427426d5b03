"""The norm kernels, interpreted: what they compute, and that a row of it depends on that row alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tensors import DTYPES, check_rounded_once, random, same_bits
from torch import Tensor

from folo.ops.cuda import norm

WIDTHS = (1, 20, 1024, 1040, 1100, 4112)
EPS = 1e-5


def exact_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x.double(), x.shape[-1:], weight.double(), EPS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_norms_round_once(width: int, dtype: torch.dtype) -> None:
    x, residual = random(9, width, dtype=dtype), random(9, width, dtype=dtype, seed=1)
    weight = random(width, dtype=dtype, seed=2)
    check_rounded_once(norm.rms_norm(x, weight, EPS), exact_norm(x, weight))
    normed, total = norm.add_rms_norm(x, residual, weight, EPS)
    assert same_bits(total, x + residual)
    check_rounded_once(normed, exact_norm(x + residual, weight))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inner", [1, 37, 1040])
def test_silu_mul_rounds_once(inner: int, dtype: torch.dtype) -> None:
    gate_up = random(9, 2 * inner, dtype=dtype) * 4
    gate, up = gate_up.double().chunk(2, -1)
    check_rounded_once(norm.silu_mul(gate_up), F.silu(gate) * up)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
def test_silu_mul_of_large_gates() -> None:
    gate_up = torch.tensor([[-1e4, -90.0, 0.0, 90.0, 1e4, 1.0, 1.0, 1.0, 1.0, 1.0]])
    out = norm.silu_mul(gate_up)[0]
    assert torch.equal(out[2:], torch.tensor([0.0, 90.0, 1e4]))
    assert out[:2].abs().max() < 1e-30


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_rows_depend_on_themselves_alone(width: int, dtype: torch.dtype) -> None:
    x, residual = random(9, width, dtype=dtype), random(9, width, dtype=dtype, seed=1)
    weight, gates = random(width, dtype=dtype, seed=2), random(9, 2 * width, dtype=dtype)
    whole = (
        norm.rms_norm(x, weight, EPS),
        *norm.add_rms_norm(x, residual, weight, EPS),
        norm.silu_mul(gates),
    )
    for rows in ([0], [8], [7, 7, 3], torch.randperm(9).tolist()):
        part = (
            norm.rms_norm(x[rows], weight, EPS),
            *norm.add_rms_norm(x[rows], residual[rows], weight, EPS),
            norm.silu_mul(gates[rows]),
        )
        for got, expected in zip(part, whole, strict=True):
            assert same_bits(got, expected[rows])


def test_rows_may_lie_anywhere_in_memory() -> None:
    x, weight = random(9, 40), random(40)
    expected = norm.rms_norm(x, weight, EPS)
    shifted = torch.cat((x.new_ones(1), x.flatten()))[1:].view(x.shape)
    for stored in (shifted, torch.cat((x, x), 1)[:, :40], x.t().contiguous().t()):
        assert same_bits(norm.rms_norm(stored, weight, EPS), expected), stored.stride()


def test_heads_are_rows() -> None:
    x, weight = random(5, 4, 20), random(20)
    assert same_bits(norm.rms_norm(x, weight, EPS), norm.rms_norm(x.view(20, 20), weight, EPS).view(5, 4, 20))


def test_no_rows_give_no_rows() -> None:
    x, weight = random(0, 20), random(20)
    assert norm.rms_norm(x, weight, EPS).shape == (0, 20)
    assert [out.shape for out in norm.add_rms_norm(x, x, weight, EPS)] == [(0, 20), (0, 20)]
    assert norm.silu_mul(x).shape == (0, 10)
