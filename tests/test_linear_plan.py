"""The plan of a product: every kernel that can be launched is compiled in a test, and does all the work."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from folo.ops.cuda import linear
from folo.ops.cuda.kernel import DTYPES

KERNELS = [(repr(build.kernel), build.signature.get("x")) for build in linear.builds()]

MODELS = {
    "0.6B": ((4096, 1024), (1024, 2048), (6144, 1024), (1024, 3072), (151936, 1024)),
    "8B": ((6144, 4096), (4096, 4096), (24576, 4096), (4096, 12288), (151936, 4096)),
}
"""[N, K] of Qwen3's weights."""

sizes = st.integers(1, 40000) | st.integers(1, 1024).map(lambda n: 16 * n)


@given(sizes, sizes, st.integers(1, 70000), st.sampled_from(list(DTYPES)))
def test_every_product_is_among_the_builds_and_covers_k_and_all_tiles(
    n: int, k: int, m: int, dtype: torch.dtype
) -> None:
    plan = linear.plan(n, k, dtype)
    kernel, (tiles, side_by_side) = plan.product(m)
    assert (repr(kernel), DTYPES[dtype]) in KERNELS
    assert (plan.splits - 1) * plan.chunk < k <= plan.splits * plan.chunk
    assert plan.splits <= linear.MAX_SPLITS
    assert plan.splits == 1 or plan.chunk >= 512
    assert side_by_side in (1, plan.splits)
    assert kernel.constants["WALK"] == (side_by_side < plan.splits)
    assert tiles * kernel.constants["BLOCK_M"] * kernel.constants["BLOCK_N"] >= m * n


def test_one_row_of_a_models_weights_is_work_for_many_programs() -> None:
    for weights in MODELS.values():
        for n, k in weights:
            _, (tiles, splits) = linear.plan(n, k, torch.bfloat16).product(1)
            assert tiles * splits >= 64, (n, k)
