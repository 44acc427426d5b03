"""The plan of a product with few bits: every kernel that can be launched is compiled in a test, and does all
the work."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from test_linear_plan import MODELS

from folo.ops.cuda import quantized
from folo.ops.cuda.kernel import DTYPES
from folo.ops.cuda.linear import MAX_SPLITS
from folo.ops.quantized import BITS, SPANS

KERNELS = {(repr(build.kernel), build.signature.get("x")) for build in quantized.builds()}


@given(
    st.integers(1, 40000),
    st.integers(1, 1000),
    st.sampled_from(BITS),
    st.sampled_from(SPANS),
    st.integers(1, 70000),
    st.sampled_from(list(DTYPES)),
)
def test_every_product_is_among_the_builds_and_covers_k_and_all_tiles(
    n: int, blocks: int, bits: int, span: int, m: int, dtype: torch.dtype
) -> None:
    plan = quantized.plan(n, blocks, bits, span, dtype)
    kernel, (tiles, side_by_side) = plan.product(m)
    assert (repr(kernel), DTYPES[dtype]) in KERNELS
    assert span % plan.step == 0, "a step has one scale"
    steps = -(-blocks // plan.step)
    assert (plan.splits - 1) * plan.chunk < steps <= plan.splits * plan.chunk
    assert plan.splits <= MAX_SPLITS
    assert side_by_side in (1, plan.splits)
    assert tiles * kernel.constants["BLOCK_M"] * kernel.constants["BLOCK_N"] >= m * n


def test_one_row_of_a_models_weights_is_work_for_many_programs() -> None:
    for weights in MODELS.values():
        for n, k in weights:
            _, (tiles, splits) = quantized.plan(n, k // 32, 4, 4, torch.bfloat16).product(1)
            assert tiles * splits >= 64, (n, k)
