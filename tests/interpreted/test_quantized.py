"""The kernel for weights of few bits, interpreted: what it computes, and that a row depends on itself alone.

As in tests/interpreted/test_linear.py, rows are compared between tiles of one height.
"""

from __future__ import annotations

import pytest
import torch
from gptq_weights import weight
from tensors import DTYPES, check_rounded_once, random, same_bits
from torch import Tensor

from folo.ops.cuda.quantized import Plan, plan, quantized_linear
from folo.ops.quantized import BITS, Quantized, span_blocks

COUNTS = (1, 33, 64)
TILES = ((torch.float32, 32), (torch.float16, 64), (torch.float16, 128))

SHAPES = ((1, 64, 32), (20, 130, 48), (100, 192, 128), (36, 20, 128), (48, 96, -1), (16, 1056, 128))
"""[N, K] and the columns of a group: spans of 1, 2 and 4 blocks, short last ones; the last has two splits."""


def linear(x: Tensor, packed: Quantized, bias: Tensor | None = None, wide: bool = False) -> Tensor:
    parts = packed.codes, packed.scales, packed.zeros, packed.columns
    return quantized_linear(x, *parts, packed.shape[0], bias, wide)


def fix_tiling(monkeypatch: pytest.MonkeyPatch, height: int, side_by_side: bool) -> None:
    """One height for any number of rows; float32 has one in any case."""

    def tiling(plan: Plan, m: int) -> tuple[int, bool]:
        return height, side_by_side and plan.splits > 1

    monkeypatch.setattr(Plan, "tiling", tiling)


def test_the_shapes_are_all_that_there_are() -> None:
    spans = [span_blocks(packed.codes, packed.scales) for packed in (weight(*shape) for shape in SHAPES)]
    assert spans == [1, 2, 4, 1, 4, 4]
    assert plan(16, 33, 4, 4, torch.float16).splits == 2


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("desc_act", [False, True])
@pytest.mark.parametrize(("n", "k", "group_size"), SHAPES[:-1])
def test_every_code_finds_its_place(n: int, k: int, group_size: int, desc_act: bool, bits: int) -> None:
    """A row that is one column of 1 gives that column of the weight, which float32 holds exactly."""
    packed = weight(n, k, group_size, bits, desc_act)
    assert torch.equal(linear(torch.eye(k), packed), packed.plain().t())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("n", "k", "group_size"), SHAPES)
def test_it_rounds_once(n: int, k: int, group_size: int, bits: int, dtype: torch.dtype) -> None:
    packed, x = weight(n, k, group_size, bits, desc_act=n % 20 == 0), random(70, k, dtype=dtype)
    bias = random(n, dtype=dtype) if n % 3 else None
    exact = x.double() @ packed.plain(torch.float64).t() + (0 if bias is None else bias.double())
    for m in (1, 70):
        got, wide = (linear(x[:m], packed, bias, wide) for wide in (False, True))
        check_rounded_once(got, exact[:m])
        assert same_bits(wide.to(dtype), got)
        assert wide.dtype == torch.float32


@pytest.mark.parametrize(("dtype", "height"), TILES)
@pytest.mark.parametrize(("n", "k", "group_size"), SHAPES[:-1])
def test_rows_depend_on_themselves_alone(
    n: int, k: int, group_size: int, dtype: torch.dtype, height: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    fix_tiling(monkeypatch, height, side_by_side=False)
    packed, x = weight(n, k, group_size, desc_act=n % 20 == 0), random(130, k, dtype=dtype)
    bias = random(n, dtype=dtype) if n % 3 else None
    whole = linear(x, packed, bias)
    for rows in (*map(list, map(range, COUNTS)), torch.randperm(130).tolist(), [129] * 5):
        assert same_bits(linear(x[rows], packed, bias), whole[rows]), len(rows)


@pytest.mark.parametrize("height", [64, 128])
@pytest.mark.parametrize("biased", [False, True])
def test_splits_side_by_side_and_one_after_another_give_the_same_bits(
    biased: bool, height: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed, x = weight(20, 1056, 128), random(70, 1056, dtype=torch.float16)
    bias = random(20, dtype=torch.float16) if biased else None
    fix_tiling(monkeypatch, height, side_by_side=True)
    expected = linear(x, packed, bias)
    assert same_bits(linear(x[69:], packed, bias), expected[69:])
    fix_tiling(monkeypatch, height, side_by_side=False)
    assert same_bits(linear(x, packed, bias), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_does_not_see_how_its_input_is_stored(dtype: torch.dtype) -> None:
    packed, x = weight(48, 96, 32), random(48, 96, dtype=dtype)
    expected = linear(x, packed)
    shifted = torch.cat((x.new_ones(1), x.flatten()))[1:].view(x.shape)
    wide = torch.cat((x, x), 1)[:, :96]
    for stored in (shifted, wide, x.t().contiguous().t()):
        assert same_bits(linear(stored, packed), expected), stored.stride()


@pytest.mark.parametrize("desc_act", [False, True])
def test_what_no_group_has_counts_for_nothing(desc_act: bool) -> None:
    """Nor do other rows: places without a column are not multiplied with what lies beside them."""
    packed, x = weight(20, 40, 16, desc_act=desc_act), random(33, 40)
    expected = linear(x, packed)
    x[1::2] = torch.nan
    assert same_bits(linear(x, packed)[::2], expected[::2])
    assert expected.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_rows_give_no_rows(dtype: torch.dtype) -> None:
    for k in (96, 1056):
        assert linear(random(0, k, dtype=dtype), weight(16, k, 32)).shape == (0, 16)
