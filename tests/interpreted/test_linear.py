"""The linear kernels, interpreted: what they compute, and that a row of it depends on that row alone.

A tile's product is NumPy's here, whose order of summation may depend on the tile's height: rows are
compared between tiles of one height. That heights make no difference on a GPU is held by the machine code,
in tests/test_triton_builds.py.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tensors import DTYPES, check_rounded_once, random, same_bits

from folo.ops.cuda.linear import Plan, linear, plan

COUNTS = (1, 2, 16, 33, 64, 70)
HEIGHTS = (64, 128)
TILES = ((torch.float32, 32), *((torch.float16, height) for height in HEIGHTS))

SHAPES = ((1, 16), (36, 130), (100, 320), (48, 64), (80, 1072))
"""[N, K] of weights: the last is cut into two splits, the shorter one with an edge."""


def fix_tiling(monkeypatch: pytest.MonkeyPatch, height: int, side_by_side: bool) -> None:
    """One height for any number of rows; what is not aligned has one in any case."""

    def tiling(plan: Plan, m: int) -> tuple[int, bool]:
        return (height, side_by_side and plan.splits > 1) if plan.aligned else (32, False)

    monkeypatch.setattr(Plan, "tiling", tiling)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_linear_rounds_once(n: int, k: int, biased: bool, dtype: torch.dtype) -> None:
    x, weight = random(70, k, dtype=dtype), random(n, k, dtype=dtype, seed=1)
    bias = random(n, dtype=dtype, seed=2) if biased else None
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    for m in (1, 70):
        check_rounded_once(linear(x[:m], weight, bias), exact[:m])
        wide = linear(x[:m], weight, bias, wide=True)
        assert wide.dtype == torch.float32
        check_rounded_once(wide, exact[:m])


@pytest.mark.parametrize(("dtype", "height"), TILES)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_rows_depend_on_themselves_alone(
    n: int, k: int, dtype: torch.dtype, height: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    fix_tiling(monkeypatch, height, side_by_side=True)
    x, weight = random(130, k, dtype=dtype), random(n, k, dtype=dtype, seed=1)
    bias = random(n, dtype=dtype) if n % 3 else None
    whole = linear(x, weight, bias)
    for rows in (*map(list, map(range, COUNTS)), torch.randperm(130).tolist(), [129] * 5):
        assert same_bits(linear(x[rows], weight, bias), whole[rows]), len(rows)


@pytest.mark.parametrize("height", HEIGHTS)
@pytest.mark.parametrize("biased", [False, True])
def test_splits_side_by_side_and_one_after_another_give_the_same_bits(
    biased: bool, height: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    n, k = 272, 1072
    x, weight = random(130, k, dtype=torch.float16), random(n, k, dtype=torch.float16, seed=1)
    bias = random(n, dtype=torch.float16) if biased else None
    assert plan(n, k, torch.float16).splits == 2
    fix_tiling(monkeypatch, height, side_by_side=True)
    expected = linear(x, weight, bias)
    fix_tiling(monkeypatch, height, side_by_side=False)
    assert same_bits(linear(x, weight, bias), expected)


def test_a_wide_weight_is_multiplied_by_every_group_of_rows() -> None:
    """More tiles of rows than a group has, the last group not full, and an edge in every direction."""
    x, weight = random(1100, 16, dtype=torch.float16), random(8208, 16, dtype=torch.float16, seed=1)
    assert plan(8208, 16, torch.float16).block_n == 128
    check_rounded_once(linear(x, weight), x.double() @ weight.double().t())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [130, 512])
def test_linear_does_not_see_how_its_input_is_stored(k: int, dtype: torch.dtype) -> None:
    x, weight = random(48, k, dtype=dtype), random(128, k, dtype=dtype, seed=1)
    expected = linear(x, weight)
    shifted = torch.cat((x.new_ones(1), x.flatten()))[1:].view(x.shape)
    wide = torch.cat((x, x), 1)[:, :k]
    for stored in (shifted, wide, x.t().contiguous().t()):
        assert same_bits(linear(stored, weight), expected), stored.stride()
        assert same_bits(linear(stored[:1], weight), expected[:1]), stored.stride()
    assert same_bits(linear(x, weight.t().contiguous().t()), expected)


def test_what_other_rows_hold_is_not_seen() -> None:
    x, weight = random(33, 64, dtype=torch.float16), random(48, 64, dtype=torch.float16, seed=1)
    expected = linear(x, weight)
    x[1::2] = torch.nan
    assert same_bits(linear(x, weight)[::2], expected[::2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_rows_give_no_rows(dtype: torch.dtype) -> None:
    assert linear(random(0, 1024, dtype=dtype), random(64, 1024, dtype=dtype)).shape == (0, 64)
