"""The ops compute what they say: against the same formula in float64, and against their own schemas.

Two measures. In float32 the error is relative to the largest element of the result: 1e-5 leaves a
factor of ten over what sums of these lengths round to, and a wrong formula is off by far more. In
bfloat16 and float16 the rounding of the result itself is most of the error, which nothing can avoid;
so the mean error may exceed that of the exact result rounded to the dtype, or of torch's own op, by
little.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kv_caches import laid, plain
from torch import Tensor

from folo import ops
from folo.ops import cpu, reference
from folo.ops.packed import pack

pytestmark = pytest.mark.usefixtures("each_instruction_set")

HALVES = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALVES)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def relative(got: Tensor, exact: Tensor) -> float:
    """Largest error over the largest element."""
    return float((got.double() - exact).abs().max() / exact.abs().max())


def mean_error(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).abs().mean())


def check_rounded_once(got: Tensor, exact: Tensor, slack: float) -> None:
    """As near to `exact` as the dtype allows: in a half dtype, `exact` rounded to it, up to `slack`."""
    assert got.shape == exact.shape
    if got.dtype == torch.float32:
        assert relative(got, exact) <= 1e-5
    else:
        assert mean_error(got, exact) <= slack * mean_error(exact.to(got.dtype), exact)


# --- against float64


@pytest.mark.parametrize(("m", "n", "k"), [(1, 100, 130), (33, 36, 576), (70, 576, 1536), (5, 960, 20)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("biased", [False, True])
def test_linear_is_as_exact_as_torchs(m: int, n: int, k: int, dtype: torch.dtype, biased: bool) -> None:
    x, weight = random(m, k, dtype=dtype), random(n, k, dtype=dtype, seed=1)
    bias = random(n, dtype=dtype) if biased else None
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    got = ops.linear(x, weight, bias)
    assert got.dtype == dtype
    if dtype == torch.float32:
        assert relative(got, exact) <= 1e-5
    else:
        # Both sum in float32 and round once, bias and all: no order of summation moves the mean by 2 %.
        assert mean_error(got, exact) <= 1.02 * mean_error(F.linear(x, weight, bias), exact)
    wide = ops.linear(x, weight, bias, wide=True)
    assert wide.dtype == torch.float32
    assert relative(wide, exact) <= 1e-5  # products are exact, and not rounded but as they are summed


@pytest.mark.parametrize("width", [1, 20, 577, 1536])
@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_round_once(width: int, dtype: torch.dtype) -> None:
    x, residual = random(33, width, dtype=dtype), random(33, width, dtype=dtype, seed=1)
    weight, eps = random(width, dtype=dtype, seed=2), 1e-5

    def norm(x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.double()

    # Within float32: 1 % is room for the rare double rounding.
    check_rounded_once(ops.rms_norm(x, weight, eps), norm(x.double()), 1.01)
    normed, total = ops.add_rms_norm(x, residual, weight, eps)
    assert torch.equal(total, x + residual)
    check_rounded_once(normed, norm(total.double()), 1.01)


def test_rms_norm_of_zeros_is_zero_and_eps_counts() -> None:
    assert torch.equal(ops.rms_norm(torch.zeros(2, 8), torch.ones(8), 1e-6), torch.zeros(2, 8))
    small = torch.full((1, 4), 1e-3)
    assert relative(ops.rms_norm(small, torch.ones(4), 1e-6), small.double() / 2e-6**0.5) <= 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_mul_rounds_once(dtype: torch.dtype) -> None:
    gate_up = random(33, 2 * 129, dtype=dtype) * 5
    gate, up = gate_up.double().chunk(2, -1)
    check_rounded_once(ops.silu_mul(gate_up), F.silu(gate) * up, 1.01)


def test_silu_mul_of_large_gates() -> None:
    gate_up = torch.tensor([[-1e4, -90.0, 0.0, 90.0, 1e4, 1.0, 1.0, 1.0, 1.0, 1.0]])
    assert torch.equal(ops.silu_mul(gate_up)[0, 2:], torch.tensor([0.0, 90.0, 1e4]))
    assert ops.silu_mul(gate_up)[0, :2].abs().max() < 1e-30


def test_rope_angles_are_those_of_the_rounded_product() -> None:
    """position * inv_freq is rounded to float32, as every implementation does; cos and sin add 1e-6."""
    inv_freq = 10000 ** -torch.linspace(0, 1, 32)
    positions = torch.tensor([0, 1, 100, 8191, 131071])
    product = (positions.float()[:, None] * inv_freq).double()
    exact = torch.cat((product.cos(), product.sin()), -1)
    got = ops.rope_angles(positions, inv_freq)
    assert got.dtype == torch.float32
    assert float((got.double() - exact).abs().max()) <= 1e-6


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_qk_norm_rope_rotates_by_the_position(norm: bool, dtype: torch.dtype) -> None:
    tokens, heads, num_kv_heads, head_dim, eps = 33, 6, 2, 64, 1e-6
    qkv = random(tokens, (heads + 2 * num_kv_heads) * head_dim, dtype=dtype)
    weights = [random(head_dim, dtype=dtype, seed=s) if norm else None for s in (1, 2)]
    inv_freq = 10000 ** -torch.arange(0, 1, 2 / head_dim)
    angles = ops.rope_angles(torch.arange(tokens), inv_freq)
    k_cache, v_cache = laid(*torch.zeros((2, 3, 16, num_kv_heads, head_dim), dtype=dtype))
    q = ops.qk_norm_rope_write(qkv, angles, *weights, eps, k_cache, v_cache, torch.arange(tokens))
    parts = qkv.view(tokens, -1, head_dim).split((heads, num_kv_heads, num_kv_heads), 1)
    # A complex number turned by the angle: (a + ib) * exp(i * angle), halves being a and b.
    turn = torch.polar(torch.ones_like(product := torch.arange(tokens).double()[:, None] * inv_freq), product)

    def exact(x: Tensor, weight: Tensor | None) -> Tensor:
        wide = x.double()
        if weight is not None:
            wide = wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()
            wide = wide.to(dtype).double() if dtype != torch.float32 else wide  # stored between the two
        turned = torch.complex(*wide.chunk(2, -1)) * turn[:, None]
        return torch.cat((turned.real, turned.imag), -1)

    # 5 %: where the norm rounds the other way in float32 than in float64, its result is one ulp off.
    check_rounded_once(q, exact(parts[0], weights[0]), 1.05)
    k, v = (part.flatten(0, 1)[:tokens] for part in plain(k_cache, v_cache))
    check_rounded_once(k, exact(parts[1], weights[1]), 1.05)
    assert torch.equal(v, parts[2])


@pytest.mark.parametrize(
    ("heads", "num_kv_heads", "head_dim"), [(4, 4, 16), (6, 2, 80), (8, 1, 128), (9, 3, 64)]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_paged_attention_is_as_exact_as_torchs(
    heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype
) -> None:
    spans, lengths, block_size = [1, 40, 17], [300, 40, 150], 16
    k_cache, v_cache = random(2, 64, block_size, num_kv_heads, head_dim, dtype=dtype)
    tables = torch.randperm(64, generator=torch.Generator().manual_seed(0))[:57].view(3, 19).int()
    q = random(sum(spans), heads, head_dim, dtype=dtype) * 2
    start = torch.tensor([0, 1, 41, 58]).int()
    scale = head_dim**-0.5
    laid_k, laid_v = laid(k_cache, v_cache)
    got = ops.paged_attention(q, laid_k, laid_v, tables, start, torch.tensor(lengths).int(), scale)
    for s, (own, out) in enumerate(zip(q.split(spans), got.split(spans), strict=True)):
        k, v = (c[tables[s]].flatten(0, 1)[: lengths[s]].transpose(0, 1) for c in (k_cache, v_cache))
        mask = torch.ones(spans[s], lengths[s], dtype=torch.bool).tril(lengths[s] - spans[s])

        def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor = mask) -> Tensor:
            out = F.scaled_dot_product_attention(
                q[None], k[None], v[None], mask, scale=scale, enable_gqa=True
            )
            return out[0].transpose(0, 1)

        exact = attention(own.transpose(0, 1).double(), k.double(), v.double())
        if dtype == torch.float32:
            assert relative(out, exact) <= 1e-5
        else:
            # All but the result is in float32, unless the CPU multiplies in bfloat16: then the weights are
            # rounded too, as torch always does: two errors of one size come to 1.41 of it, give or take.
            in_pairs = dtype == torch.bfloat16 and cpu.instruction_set() in ("amx", "avx512_bf16")
            check_rounded_once(out, exact, 1.5 if in_pairs else 1.02)
            assert mean_error(out, exact) <= 1.02 * mean_error(attention(own.transpose(0, 1), k, v), exact)


def test_attention_to_one_key_is_its_value() -> None:
    k, v = random(2, 1, 8, 1, 16)
    one, start = torch.ones(1, dtype=torch.int32), torch.tensor([0, 1]).int()
    table = torch.zeros(1, 1, dtype=torch.int32)
    out = ops.paged_attention(random(1, 3, 16), *laid(k, v), table, start, one, 1.0)
    assert torch.equal(out[0], v[0, 0].expand(3, 16))


def test_attention_survives_large_scores() -> None:
    k, v = random(2, 2, 8, 1, 16)
    q, start = random(16, 1, 16) * 1e4, torch.tensor([0, 16]).int()
    table = torch.tensor([[0, 1]]).int()
    out = ops.paged_attention(q, *laid(k, v), table, start, torch.tensor([16]).int(), 1.0)
    mask = torch.ones(16, 16, dtype=torch.bool).tril()
    scores = (q[:, 0].double() @ k.flatten(0, 2).double().t()).masked_fill(~mask, -torch.inf)
    assert relative(out[:, 0], scores.softmax(-1) @ v.flatten(0, 2).double()) <= 1e-5


# --- in float64 throughout


def test_float64_stays_float64() -> None:
    x, weight = random(5, 130, dtype=torch.float64), random(36, 130, dtype=torch.float64, seed=1)
    got = ops.linear(x, weight)
    assert got.dtype == torch.float64
    assert relative(got, x @ weight.t()) <= 1e-14
    assert relative(ops.rms_norm(x, weight[0], 0.0), F.rms_norm(x, (130,), weight[0], 0.0)) <= 1e-14
    gate, up = x.chunk(2, -1)
    assert relative(ops.silu_mul(x), F.silu(gate) * up) <= 1e-14
    assert ops.rope_angles(torch.arange(3), torch.ones(2).double()).dtype == torch.float64


# --- schemas and shape functions


def _cases() -> dict[str, tuple[Any, tuple[Any, ...]]]:
    x, weight = random(5, 20), random(20, seed=1)
    angles = reference.rope_angles(torch.arange(5), torch.ones(8))
    k, v = laid(*random(2, 3, 8, 2, 16))
    table, start = torch.tensor([[0, 1], [2, 0]]).int(), torch.tensor([0, 3, 5]).int()
    lens, layers = torch.tensor([11, 2]).int(), random(2, 2, 3, 8, 2, 16)
    paged = k, v, table, start, lens, 0.25
    norms = torch.ones(16), torch.ones(16)
    write = (angles, *norms, 1e-6, k, v, torch.tensor([3, 4, -1, 9, 23]))
    return {
        "linear": (ops.linear, (x, random(36, 20), random(36))),
        "linear without bias": (ops.linear, (x.bfloat16(), random(1, 20).bfloat16())),
        "linear of columns": (ops.linear, (random(20, 5).t(), random(36, 20))),
        "linear of no rows": (ops.linear, (x[:0], random(36, 20))),
        "linear of wide results": (ops.linear, (x.half(), random(36, 20).half(), None, True)),
        "packed linear of wide results": (
            torch.ops.folo.packed_linear.default,
            (x.bfloat16(), pack(random(36, 20).bfloat16()), 36, None, True),
        ),
        "rms_norm": (ops.rms_norm, (x, weight, 1e-6)),
        "rms_norm of heads": (ops.rms_norm, (random(5, 4, 20), weight, 1e-6)),
        "add_rms_norm": (ops.add_rms_norm, (x, x + 1, weight, 1e-6)),
        "silu_mul": (ops.silu_mul, (x,)),
        "gated_linear": (
            torch.ops.folo.packed_gated_linear.default,
            (x, pack(random(64, 20)), 64, random(64)),
        ),
        "rope_angles": (ops.rope_angles, (torch.arange(5), torch.ones(8))),
        "qk_norm_rope_write": (ops.qk_norm_rope_write, (random(5, 6 * 16), *write)),
        "paged_attention": (ops.paged_attention, (random(5, 4, 16), *paged)),
        "paged_attention of a transpose": (ops.paged_attention, (random(4, 5, 16).transpose(0, 1), *paged)),
        "copy_blocks": (ops.copy_blocks, (*layers, torch.tensor([0]), torch.tensor([2]))),
    }


@pytest.mark.parametrize("case", list(_cases()))
def test_schema_and_shape_function_agree_with_the_op(case: str) -> None:
    op, arguments = _cases()[case]
    op = torch.ops.folo.linear.default if op is ops.linear else op
    torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))
