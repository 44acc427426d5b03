"""Matrix products in which a row's sum has one order, for one row as for thousands.

What decides the order is a function of the weight's shape and dtype alone (`Plan`): the instruction that
multiplies, and the places at which K is cut into splits. A split is summed from the left in float32; the
splits' sums are added in order. Whether programs compute the splits of a tile side by side, for a second
kernel to add their sums, or one program walks them all and adds as it goes, is for the number of rows to
decide: the additions are the same. So is the instruction at every height of a tile, since heights begin at
the 64 rows of Hopper's wgmma. A single row is padded to that: its time is that of reading the weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from folo.ops.cuda.kernel import DTYPES, Build, Kernel, aligned

MAX_SPLITS = 8
_CHUNK = 512  # of K: a split is no shorter, so that a program that walks them seldom has to stop
_FEW = 64  # programs: so many, each on a multiprocessor of its own, read memory at nearly full speed
_BLOCK_K = 64
_SUM_BLOCK = 256
GROUP = 8  # tiles of rows: programs that run together meet in L2 in what they read of x and of the weight
_STAGES = {(64, 64): 8, (64, 128): 6, (128, 64): 4, (128, 128): 3}
"""Stages of a tile of (rows, columns): few programs keep much of the weight in flight; of many, two fit on a
multiprocessor."""
_FEW_STAGES = {(64, 64): 7, (64, 128): 5}
"""In the 99 KB of shared memory that smaller GPUs have; other tiles fit as they are."""


@triton.jit
def corner(m, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """The first row and column of the tile of `[M, N]` that is the program's."""
    tiles_m, tiles_n = tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N)
    first_m = tl.program_id(0) // (GROUP * tiles_n) * GROUP
    height = tl.minimum(tiles_m - first_m, GROUP)
    within = tl.program_id(0) % (GROUP * tiles_n)
    return (first_m + within % height) * BLOCK_M, within // height * BLOCK_N


@triton.jit
def _split_product(
    x, weight, row, column, row_live, column_live, k, begin, end,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The tile x @ weight.T over columns begin:end of K, from the left."""
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(begin, end, BLOCK_K):
        at = start + tl.arange(0, BLOCK_K)
        x_live = row_live[:, None] & (at < end)[None, :]
        weight_live = column_live[None, :] & (at < end)[:, None]
        a = tl.load(x + row[:, None] * k + at[None, :], mask=x_live, other=0.0)
        b = tl.load(weight + column[None, :] * k + at[:, None], mask=weight_live, other=0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
    return total


@triton.jit(do_not_specialize=["m", "n", "k", "chunk"])
def _product(
    x, weight, bias, out, m, n, k, chunk,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr, WALK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """One tile of x @ weight.T + bias: of all K under WALK, else of the split that is the program's."""
    if ALIGNED:
        n = n // 16 * 16  # tells the compiler that rows begin at a multiple of 16
        k = k // 16 * 16
    chunk = chunk // BLOCK_K * BLOCK_K
    first_row, first_column = corner(m, n, BLOCK_M, BLOCK_N, GROUP)  # pyright: ignore[reportGeneralTypeIssues]
    row, column = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    row_live, column_live = row < m - first_row, column < n - first_column
    x += first_row.to(tl.int64) * k
    weight += first_column.to(tl.int64) * k
    if WALK:
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for begin in range(0, k, chunk):
            total += _split_product(
                x, weight, row, column, row_live, column_live, k, begin, tl.minimum(begin + chunk, k),
                BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
    else:
        begin = tl.program_id(1) * chunk
        total = _split_product(
            x, weight, row, column, row_live, column_live, k, begin, tl.minimum(begin + chunk, k),
            BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    if bias is not None:
        total += tl.load(bias + first_column + column, mask=column_live, other=0.0).to(tl.float32)[None, :]
    out += (tl.program_id(1).to(tl.int64) * m + first_row) * n + first_column
    live = row_live[:, None] & column_live[None, :]
    tl.store(out + row[:, None] * n + column[None, :], total.to(out.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["m", "n", "splits"])
def _sum_splits(
    parts, bias, out, m, n, splits,
    BLOCK: tl.constexpr, MAX_SPLITS: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """BLOCK columns of a row of the sum of parts `[splits, M, N]`, plus bias."""
    if ALIGNED:
        n = n // 16 * 16
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for split in tl.static_range(MAX_SPLITS):  # unrolled: all loads start before the first addition
        live = (column < n) & (split < splits)
        total += tl.load(parts + (split * m + row) * n + column, mask=live, other=0.0)
    if bias is not None:
        total += tl.load(bias + column, mask=column < n, other=0.0).to(tl.float32)
    tl.store(out + row * n + column, total.to(out.dtype.element_ty), mask=column < n)


@dataclass(frozen=True)
class Plan:
    """How products with a weight `[N, K]` are computed: all that decides their bits.

    `aligned`: rows begin at multiples of 16 elements, in a dtype that matrix instructions take. A tile is
    `block_n` columns wide. K is cut into `splits` of `chunk` columns, of which the last may be shorter.
    """

    n: int
    k: int
    dtype: torch.dtype
    aligned: bool
    block_n: int
    splits: int
    chunk: int

    @property
    def tiles(self) -> int:
        """How many stand side by side."""
        return -(-self.n // self.block_n)

    def tiling(self, m: int) -> tuple[int, bool]:
        """For M rows: the height of a tile, and whether its splits are computed side by side."""
        if not self.aligned:
            return 32, False
        # Few rows make too few programs: shorter tiles make more of them, and so do splits side by side.
        tiles = -(-m // 64) * self.tiles
        short = m <= 64 or (self.splits > 1 and tiles < 2 * _FEW)
        return 64 if short else 128, self.splits > 1 and short

    def product(self, m: int) -> tuple[Kernel, tuple[int, int]]:
        """The kernel for M rows, and its grid: tiles, and the splits that are computed side by side."""
        height, side_by_side = self.tiling(m)
        constants = {
            "BLOCK_M": height,
            "BLOCK_N": self.block_n,
            "BLOCK_K": _BLOCK_K if self.aligned else _BLOCK_K // 2,
            "GROUP": GROUP,
            "WALK": self.splits > 1 and not side_by_side,
            "ALIGNED": self.aligned,
        }
        stages, few = 2, None
        if self.aligned:
            stages, few = _STAGES[height, self.block_n], _FEW_STAGES.get((height, self.block_n))
        kernel = Kernel(_product, constants, max(4, height // 16), stages, few)
        return kernel, (-(-m // height) * self.tiles, self.splits if side_by_side else 1)


def splits_sum(aligned: bool) -> Kernel:
    """The kernel that adds the sums of splits which were computed side by side.

    aligned: rows of the result begin at multiples of 16 elements.
    """
    constants = {"BLOCK": _SUM_BLOCK, "MAX_SPLITS": MAX_SPLITS, "ALIGNED": aligned}
    return Kernel(_sum_splits, constants, num_warps=2)


def add_splits(parts: Tensor, bias: Tensor | None, out: Tensor, aligned: bool) -> None:
    """parts float32 `[S, M, N]`, added in order, plus bias `[N]`: to out `[M, N]`."""
    splits, m, n = parts.shape
    splits_sum(aligned).launch((m, -(-n // _SUM_BLOCK)), parts, bias, out, m, n, splits)


def plan(n: int, k: int, dtype: torch.dtype) -> Plan:
    """The plan for a weight `[N, K]`.

    Narrow tiles make more programs, wide ones read less per product. A small weight is cut into narrow
    tiles, a large one into wide ones, and along K where these are too few to read memory at full speed.
    What is not aligned has one kernel for any number of rows.
    """
    rows_aligned = dtype.itemsize == 2 and n % 16 == 0 and k % 16 == 0
    block_n = 128 if rows_aligned and (n > 8192 or k >= 4096) else 64
    tiles = -(-n // block_n)
    splits = max(1, min(2 * _FEW // tiles, k // _CHUNK, MAX_SPLITS)) if rows_aligned and tiles < _FEW else 1
    chunk = -(-k // (splits * _BLOCK_K)) * _BLOCK_K
    return Plan(n, k, dtype, rows_aligned, block_n, -(-k // chunk), chunk)


_WEIGHTS = (4096, 1024), (1024, 2048), (151936, 1024), (4096, 4096), (100, 130)
"""One `[N, K]` of each kind: narrow and wide tiles, whole and split, and what is not aligned."""


def builds() -> Iterator[Build]:
    """Every kernel of `linear`, for each kind of weight and of number of rows."""
    for dtype, pointer in DTYPES.items():
        for n, k in _WEIGHTS:
            chosen = plan(n, k, dtype)
            integers = dict.fromkeys(("m", "n", "k"), "i32")
            serves = f"linear {pointer} {chosen.block_n} {chosen.aligned}"
            for bias, out, m in product((pointer, "constexpr"), (pointer, "*fp32"), (1, 128, 8192)):
                kernel, grid = chosen.product(m)
                whole = {"x": pointer, "weight": pointer, "bias": bias, "out": out}
                if grid[1] > 1:
                    whole |= {"bias": "constexpr", "out": "*fp32"}
                    ends = {"parts": "*fp32", "bias": bias, "out": out}
                    yield Build(splits_sum(chosen.aligned), {**ends, "m": "i32", "n": "i32", "splits": "i32"})
                yield Build(kernel, {**whole, **integers, "chunk": "i32"}, serves)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, wide: bool = False) -> Tensor:
    """`reference.linear`."""
    x, weight = aligned(x), aligned(weight)
    bias = None if bias is None else aligned(bias)
    (m, k), n = x.shape, weight.shape[0]
    chosen = plan(n, k, x.dtype)
    kernel, grid = chosen.product(m)
    out = x.new_empty((m, n), dtype=torch.float32 if wide else x.dtype)
    if grid[1] == 1:
        kernel.launch(grid, x, weight, bias, out, m, n, k, chosen.chunk)
    else:
        parts = x.new_empty((chosen.splits, m, n), dtype=torch.float32)
        kernel.launch(grid, x, weight, None, parts, m, n, k, chosen.chunk)
        add_splits(parts, bias, out, chosen.aligned)
    return out
