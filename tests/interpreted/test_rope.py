"""The kernel between qkv and attention, interpreted: as the reference, whose arithmetic it states."""

from __future__ import annotations

import pytest
import torch
from tensors import DTYPES, random, same_bits
from torch import Tensor

from folo.ops import reference
from folo.ops.cuda.rope import qk_norm_rope_write

EPS = 1e-6
SHAPES = ((64, 2, 1), (80, 3, 2), (96, 5, 1), (128, 8, 3), (256, 2, 1), (18, 1, 2))
"""(head_dim, query heads, KV heads)"""

Arguments = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


def problem(shape: tuple[int, int, int], norm: bool, dtype: torch.dtype, tokens: int = 9) -> Arguments:
    head_dim, num_heads, num_kv_heads = shape
    qkv = random(tokens, (num_heads + 2 * num_kv_heads) * head_dim, dtype=dtype)
    q_norm, k_norm = (random(head_dim, dtype=dtype, seed=s) if norm else None for s in (1, 2))
    inv_freq = 10000 ** -torch.linspace(0, 1, head_dim // 2)
    return qkv, reference.rope_angles(torch.arange(tokens) * 517, inv_freq), q_norm, k_norm


def caches(shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """K and V `[5, 8, Hkv, E]` full of NaN: K head by head in memory, V token by token."""
    head_dim, _, num_kv_heads = shape
    k = torch.full((5, num_kv_heads, 8, head_dim), torch.nan, dtype=dtype).transpose(1, 2)
    return k, torch.full((5, 8, num_kv_heads, head_dim), torch.nan, dtype=dtype)


def near(a: Tensor, b: Tensor) -> bool:
    """One rounding apart at most: sums of squares have another order than the reference's."""
    return torch.allclose(a, b, rtol=2e-3 if a.dtype == torch.float16 else 1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_queries_are_returned_and_keys_and_values_written(
    shape: tuple[int, int, int], norm: bool, dtype: torch.dtype
) -> None:
    arguments = problem(shape, norm, dtype)
    slots = torch.tensor([5, -1, 17, 39, 0, -3, 8, 7, 31])
    live = slots >= 0
    k, v = caches(shape, dtype)
    expected_k, expected_v = caches(shape, dtype)
    q = qk_norm_rope_write(*arguments, EPS, k, v, slots)
    expected_q = reference.qk_norm_rope_write(*arguments, EPS, expected_k, expected_v, slots)
    assert same_bits(v, expected_v)
    assert torch.equal(k.isnan(), expected_k.isnan())
    got, expected = (q[live], k.nan_to_num()), (expected_q[live], expected_k.nan_to_num())
    for one, other in zip(got, expected, strict=True):
        assert near(one, other) if norm else same_bits(one, other)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(80, 3, 2), (128, 8, 3)])
def test_tokens_depend_on_themselves_alone(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    qkv, angles, q_norm, k_norm = problem(shape, True, dtype)
    slots = torch.tensor([5, 1, 17, 39, 0, 3, 8, 7, 31])

    def apply(rows: list[int]) -> tuple[Tensor, ...]:
        k, v = caches(shape, dtype)
        q = qk_norm_rope_write(qkv[rows], angles[rows], q_norm, k_norm, EPS, k, v, slots[rows])
        where = slots[rows] // 8, slots[rows] % 8
        return q, k[where], v[where]

    whole = apply(list(range(9)))
    for rows in ([0], [8], [3, 7], torch.randperm(9).tolist()):
        for got, expected in zip(apply(rows), whole, strict=True):
            assert same_bits(got, expected[rows])


def test_no_tokens_write_nothing() -> None:
    shape = (64, 2, 1)
    k, v = caches(shape, torch.float32)
    arguments = problem(shape, True, torch.float32, tokens=0)
    q = qk_norm_rope_write(*arguments, EPS, k, v, torch.zeros(0, dtype=torch.int64))
    assert q.shape == (0, 2, 64)
    assert bool(k.isnan().all() and v.isnan().all())
