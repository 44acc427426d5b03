"""What the sampler's kernels do with a row of logits: order, weigh, and find the largest.

One program has a row, which it walks in blocks; what it gathers on the way is kept for each lane, a place in
the block, and combined once at the end. Where integers are gathered, the order of that does not matter.
"""

from __future__ import annotations

import triton
import triton.language as tl

BLOCK = 4096
NUM_WARPS = 16
STAGES = tl.constexpr(3)  # two blocks are on their way while one is looked at
INF = tl.constexpr(0x7F800000)
NEGATIVE_INF = tl.constexpr(-0x7F800001)


@triton.jit
def ordered(x):
    """An int32 that sorts as the float32 does: INF and NEGATIVE_INF at the ends, NaN above, -0.0 as 0.0."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return tl.where(x == x, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits), 0x7FFFFFFF)


@triton.jit
def value_of(order):
    """The float32 that `ordered` turns into this."""
    return tl.where(order < 0, order ^ 0x7FFFFFFF, order).to(tl.float32, bitcast=True)


@triton.jit
def lane_tops(row, vocabulary, BLOCK: tl.constexpr):
    """The largest logit of each lane, `ordered`: int32 [BLOCK]."""
    tops = tl.full((BLOCK,), NEGATIVE_INF, tl.int32)
    for first in tl.range(0, vocabulary, BLOCK, num_stages=STAGES):  # pyright: ignore[reportGeneralTypeIssues]
        at = first + tl.arange(0, BLOCK)
        tops = tl.maximum(tops, ordered(tl.load(row + at, mask=at < vocabulary, other=float("-inf"))))
    return tops


@triton.jit
def fixed_point(x, top):
    """exp(x - top) as a multiple of 2^-40, rounded down: int64."""
    return (tl.exp(x - top) * 1099511627776.0).to(tl.int64)
