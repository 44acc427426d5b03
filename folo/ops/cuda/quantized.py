"""Products with weights of 2, 4 and 8 bits, which stay packed in memory and are widened on the way.

A step multiplies columns of one scale: its words are read once and unpacked in registers, to whole numbers
(code - zero) that are exact in every dtype; their product with x, summed in float32, is scaled and added to
those before it. What decides the order is the weight's layout alone (`Plan`), as in `folo.ops.cuda.linear`:
the places of steps and splits, and the instruction that multiplies, the same at every height of a tile.
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
from folo.ops.cuda.linear import GROUP, MAX_SPLITS, add_splits, corner, splits_sum
from folo.ops.quantized import BITS, SPANS, placed, span_blocks

_BLOCK_N = 64
_PROGRAMS = 256  # of one row of tiles: enough that their loads, short as they are, keep memory busy
_CHUNK = 16  # blocks: a split is no shorter
_STAGES = {32: 2, 64: 4, 128: 3}
"""By the height of a tile: two programs of 64 rows share a multiprocessor, those of 128 have one each."""


@triton.jit
def _unpacked(words, BITS: tl.constexpr):
    """Words `[N, W]` of rows as codes `[N, W * 32 / BITS]`, in the order of columns."""
    if BITS == 2:
        words = tl.interleave(words, words >> 8)
    if BITS <= 4:
        words = tl.interleave(words, words >> 2 * BITS)
    words = tl.interleave(words, words >> BITS)
    words = tl.interleave(words, words >> 16)
    return words & (1 << BITS) - 1


@triton.jit
def _less(codes, zero):
    """codes `[N, K]` - zero `[N]`, in float32: 2^23 + code has the code for its last bits."""
    return (codes | 0x4B000000).to(tl.float32, bitcast=True) - (zero.to(tl.float32) + 8388608.0)[:, None]


@triton.jit(do_not_specialize=["m", "n", "blocks", "chunk", "reach"])
def _product(
    x, codes, scales, zeros, bias, out, m, n, blocks, chunk, reach,
    BITS: tl.constexpr, SPAN: tl.constexpr, STEP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One tile of x `[M, 32 blocks]` @ weight.T + bias, over the `reach` steps of K that the program has.

    A split is `chunk` steps of STEP blocks; SPAN blocks have one scale.
    """
    k, words, spans = blocks * 32, blocks * BITS, tl.cdiv(blocks, SPAN)
    first_row, first_column = corner(m, n, BLOCK_M, BLOCK_N, GROUP)  # pyright: ignore[reportGeneralTypeIssues]
    row, column = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    row_live, column_live = row < m - first_row, column < n - first_column
    stored = column < tl.cdiv(n, 16) * 16 - first_column
    first_tile, tile, lane = (first_column // 16).to(tl.int64), column // 16, column % 16
    x += first_row.to(tl.int64) * k
    codes += first_tile * words * 16
    scales += first_tile * spans * 16
    zeros += first_tile * spans * 16
    weight, scaling = tile * words * 16 + lane, tile * spans * 16 + lane

    begin = tl.program_id(1) * reach
    end = tl.minimum(begin + reach, tl.cdiv(blocks, STEP))
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(begin, end, chunk):
        part = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for step in range(first, tl.minimum(first + chunk, end)):
            at = step * (32 * STEP) + tl.arange(0, 32 * STEP)
            x_live = row_live[:, None] & (at < k)[None, :]
            a = tl.load(x + row[:, None] * k + at[None, :], mask=x_live, other=0.0)
            word = step * (BITS * STEP) + tl.arange(0, BITS * STEP)
            word_live = stored[:, None] & (word < words)[None, :]
            packed = tl.load(codes + weight[:, None] + word[None, :] * 16, mask=word_live, other=0)
            span = step * STEP // SPAN
            zero = tl.load(zeros + scaling + span * 16, mask=stored, other=0)
            scale = tl.load(scales + scaling + span * 16, mask=stored, other=0.0).to(tl.float32)
            b = _less(_unpacked(packed, BITS), zero).to(x.dtype.element_ty)
            part += tl.dot(a, tl.trans(b), input_precision="ieee") * scale[None, :]
        total += part
    if bias is not None:
        total += tl.load(bias + first_column + column, mask=column_live, other=0.0).to(tl.float32)[None, :]
    out += (tl.program_id(1).to(tl.int64) * m + first_row) * n + first_column
    live = row_live[:, None] & column_live[None, :]
    tl.store(out + row[:, None] * n + column[None, :], total.to(out.dtype.element_ty), mask=live)


@dataclass(frozen=True)
class Plan:
    """How products with a quantised weight of N rows are computed: all that decides their bits.

    A span of `span` blocks has one scale, and is multiplied in steps of `step` blocks. K is cut into `splits`
    of `chunk` steps, of which the last may be shorter.
    """

    n: int
    blocks: int
    bits: int
    span: int
    dtype: torch.dtype
    step: int
    splits: int
    chunk: int

    @property
    def tiles(self) -> int:
        """How many lie side by side, to cover N."""
        return -(-self.n // _BLOCK_N)

    def tiling(self, m: int) -> tuple[int, bool]:
        """For M rows: the height of a tile, and whether its splits are computed side by side."""
        if self.dtype == torch.float32:
            return 32, False
        short = m <= 64 or (self.splits > 1 and -(-m // 64) * self.tiles < _PROGRAMS // 2)
        return 64 if short else 128, self.splits > 1 and short

    def product(self, m: int) -> tuple[Kernel, tuple[int, int]]:
        """The kernel for M rows, and its grid: tiles, and the splits that are computed side by side."""
        height, side_by_side = self.tiling(m)
        constants = {
            "BITS": self.bits,
            "SPAN": self.span,
            "STEP": self.step,
            "BLOCK_M": height,
            "BLOCK_N": _BLOCK_N,
            "GROUP": GROUP,
        }
        kernel = Kernel(_product, constants, num_warps=max(4, height // 16), num_stages=_STAGES[height])
        return kernel, (-(-m // height) * self.tiles, self.splits if side_by_side else 1)


def plan(n: int, blocks: int, bits: int, span: int, dtype: torch.dtype) -> Plan:
    """The plan for a weight of N rows.

    A step is a span, unless that would not fit into registers: it has at most one block in float32, which no
    matrix instruction takes, and at most two blocks of 2 bits.
    """
    step = 1 if dtype == torch.float32 else min(span, bits)
    steps, tiles = -(-blocks // step), -(-n // _BLOCK_N)
    splits = max(1, min(_PROGRAMS // tiles, blocks // _CHUNK, MAX_SPLITS)) if dtype.itemsize == 2 else 1
    chunk = -(-steps // splits)
    return Plan(n, blocks, bits, span, dtype, step, -(-steps // chunk), chunk)


_WEIGHTS = (1024, 64), (24576, 64)
"""N and blocks of a weight in splits, and of one that is whole."""


def builds() -> Iterator[Build]:
    """Every kernel of `quantized_linear`, for each kind of weight and of number of rows."""
    for dtype, pointer in DTYPES.items():
        for bits, span in ((bits, span) for bits in BITS for span in SPANS):
            serves = f"quantized_linear {pointer} {bits} {span}"
            for n, blocks in _WEIGHTS:
                chosen = plan(n, blocks, bits, span, dtype)
                integers = dict.fromkeys(("m", "n", "blocks", "chunk", "reach"), "i32")
                for bias, out, m in product((pointer, "constexpr"), (pointer, "*fp32"), (1, 8192)):
                    kernel, grid = chosen.product(m)
                    ends = {"bias": bias, "out": out}
                    if grid[1] > 1:
                        sums = {"parts": "*fp32", **ends, **dict.fromkeys(("m", "n", "splits"), "i32")}
                        yield from (Build(splits_sum(aligned_rows), sums) for aligned_rows in (False, True))
                        ends = {"bias": "constexpr", "out": "*fp32"}
                    weight = {"codes": "*i32", "scales": "*fp16", "zeros": "*u8"}
                    yield Build(kernel, {"x": pointer, **weight, **ends, **integers}, serves)


def quantized_linear(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor,
    columns: Tensor | None,
    n: int,
    bias: Tensor | None = None,
    wide: bool = False,
) -> Tensor:
    """`reference.quantized_linear`."""
    x = aligned(placed(x, codes, columns))
    codes, scales, zeros = aligned(codes), aligned(scales), aligned(zeros)
    bias = None if bias is None else aligned(bias)
    m, blocks = x.shape[0], codes.shape[1]
    chosen = plan(n, blocks, codes.shape[2], span_blocks(codes, scales), x.dtype)
    kernel, grid = chosen.product(m)
    out = x.new_empty((m, n), dtype=torch.float32 if wide else x.dtype)
    if grid[1] == 1:
        kernel.launch(grid, x, codes, scales, zeros, bias, out, m, n, blocks, chosen.chunk, blocks)
    else:
        parts = x.new_empty((chosen.splits, m, n), dtype=torch.float32)
        kernel.launch(grid, x, codes, scales, zeros, None, parts, m, n, blocks, chosen.chunk, chosen.chunk)
        add_splits(parts, bias, out, n % 16 == 0)
    return out
