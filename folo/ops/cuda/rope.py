"""From the product of queries, keys and values to attention, in one kernel: norms, rotation, writing K and V.

The angles themselves are the reference's: torch's cos and sin on a GPU reduce large arguments exactly and
see one element each, so they keep the contract; and they run once a step, not once a layer.
"""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from folo.ops.cuda.kernel import DTYPES, Build, Kernel, aligned

_HEADS = 8  # of a token, in one program


@triton.jit
def _gain(q_norm, k_norm, is_q, at, inside):
    """The norm weights of each head `[HEADS, BLOCK]`."""
    q, k = tl.load(q_norm + at, mask=inside, other=0.0), tl.load(k_norm + at, mask=inside, other=0.0)
    return tl.where(is_q, q, k).to(tl.float32)


@triton.jit(
    do_not_specialize=[
        "k_cache", "v_cache", "slots", "num_heads", "num_kv_heads", "half", "block_size",
        "k_block", "k_offset", "k_head", "v_block", "v_offset", "v_head",
    ]
)  # fmt: skip
def _qk_norm_rope_write(
    qkv, angles, q_norm, k_norm, eps, q, k_cache, v_cache, slots,
    num_heads, num_kv_heads, half, block_size, k_block, k_offset, k_head, v_block, v_offset, v_head,
    HEADS: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """HEADS heads of a token's queries, keys and values, each as its two halves `[HEADS, BLOCK]`."""
    if ALIGNED:
        half = half // 8 * 8  # tells the compiler that halves begin at a multiple of 8
    token = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    at = tl.arange(0, BLOCK)[None, :]
    inside = at < half
    is_q = head < num_heads
    total = num_heads + 2 * num_kv_heads

    row = qkv + token * total * (2 * half) + head * (2 * half) + at
    first = tl.load(row, mask=(head < total) & inside, other=0.0)
    second = tl.load(row + half, mask=(head < total) & inside, other=0.0)
    a, b = first.to(tl.float32), second.to(tl.float32)
    if q_norm is not None:
        mean = tl.div_rn(tl.sum(a * a + b * b, 1, keep_dims=True), (2 * half).to(tl.float32))
        scale = tl.div_rn(1.0, tl.sqrt_rn(mean + eps))
        gain_a = _gain(q_norm, k_norm, is_q, at, inside)
        gain_b = _gain(q_norm + half, k_norm + half, is_q, at, inside)
        a = (a * scale * gain_a).to(first.dtype).to(tl.float32)
        b = (b * scale * gain_b).to(first.dtype).to(tl.float32)
    angle = angles + token * (2 * half) + at
    cos, sin = tl.load(angle, mask=inside, other=0.0), tl.load(angle + half, mask=inside, other=0.0)
    turned_a, turned_b = (a * cos - b * sin).to(first.dtype), (b * cos + a * sin).to(first.dtype)

    target = q + token * num_heads * (2 * half) + head * (2 * half) + at
    tl.store(target, turned_a, mask=is_q & inside)
    tl.store(target + half, turned_b, mask=is_q & inside)
    slot = tl.load(slots + token)
    block, offset = slot // block_size, slot % block_size
    is_k = (head >= num_heads) & (head < num_heads + num_kv_heads) & (slot >= 0)
    own = (head - num_heads).to(tl.int64)  # heads lie a whole cache apart
    target = k_cache + block * k_block + offset * k_offset + own * k_head + at
    tl.store(target, turned_a, mask=is_k & inside)
    tl.store(target + half, turned_b, mask=is_k & inside)
    is_v = (head >= num_heads + num_kv_heads) & (head < total) & (slot >= 0)
    target = v_cache + block * v_block + offset * v_offset + (own - num_kv_heads) * v_head + at
    tl.store(target, first, mask=is_v & inside)
    tl.store(target + half, second, mask=is_v & inside)


def _kernel(half: int) -> Kernel:
    vectors = half % 8 == 0
    block = max(32 if vectors else 128, triton.next_power_of_2(half))
    constants = {"HEADS": _HEADS, "BLOCK": block, "ALIGNED": vectors}
    return Kernel(_qk_norm_rope_write, constants, num_warps=4)


def builds() -> Iterator[Build]:
    """Every kernel of `qk_norm_rope_write`, for each kind of head."""
    integers = ("num_heads", "num_kv_heads", "half", "block_size")
    strides = ("k_block", "k_offset", "k_head", "v_block", "v_offset", "v_head")
    for pointer in DTYPES.values():
        for norm in (pointer, "constexpr"):
            for half in (32, 64, 128, 100):
                types = dict.fromkeys(("qkv", "q", "k_cache", "v_cache"), pointer)
                types |= {"q_norm": norm, "k_norm": norm, "angles": "*fp32", "slots": "*i64", "eps": "fp32"}
                yield Build(_kernel(half), types | dict.fromkeys((*integers, *strides), "i32"))


def qk_norm_rope_write(
    qkv: Tensor,
    angles: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
) -> Tensor:
    """`reference.qk_norm_rope_write`."""
    tokens, head_dim, num_kv_heads = qkv.shape[0], angles.shape[1], k_cache.shape[2]
    heads = qkv.shape[1] // head_dim
    num_heads = heads - 2 * num_kv_heads
    norms = (None, None) if q_norm is None or k_norm is None else (aligned(q_norm), aligned(k_norm))
    q = qkv.new_empty((tokens, num_heads, head_dim))
    _kernel(head_dim // 2).launch(
        (tokens, -(-heads // _HEADS)),
        *(aligned(qkv), aligned(angles), *norms, eps, q, k_cache, v_cache, slots.contiguous()),
        *(num_heads, num_kv_heads, head_dim // 2, k_cache.shape[1]),
        *(*k_cache.stride()[:3], *v_cache.stride()[:3]),
    )
    return q
