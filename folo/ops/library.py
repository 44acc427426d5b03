"""Registration of the ops with torch.library: schema, implementations, shape function.

Each op has the reference for all devices, the CPU's kernels where they can be compiled, and those of
Triton for CUDA. The reference alone is there too, as `folo_reference::*`: opaque to a compiler, like the
op itself.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeGuard

import torch
from torch import Tensor

from folo.ops import cpu, cuda, reference, sampler
from folo.ops.memory import Arena
from folo.ops.packed import DTYPES, Packed, pack
from folo.ops.quantized import Quantized
from folo.ops.stacked import Stacked, Weight

_LIBRARIES = torch.library.Library("folo_reference", "DEF"), torch.library.Library("folo", "DEF")


def _op(
    schema: str, implementation: Callable[..., Any] | None, shape: Callable[..., Any]
) -> Callable[..., Any]:
    """Define `folo::<schema>`; `shape` returns empty outputs, for tracing without data."""
    name = schema.partition("(")[0]
    for lib in _LIBRARIES:
        lib.define(schema)
        if implementation is not None:
            lib.impl(name, partial(_exactly, implementation), "CompositeExplicitAutograd")
        torch.library.register_fake(f"{lib.ns}::{name}", shape, lib=lib)
    return getattr(torch.ops.folo, name).default


def _exactly(implementation: Callable[..., Any], *arguments: Any) -> Any:
    """Call it in the dtypes of its arguments, even under torch.autocast."""
    with torch._C._DisableAutocast():
        return implementation(*arguments)


def _rows(logits: Tensor, dtype: torch.dtype) -> Tensor:
    return logits.new_empty(logits.shape[:1], dtype=dtype)


def _wanted(x: Tensor, rows: Tensor | None) -> Tensor:
    return x.new_empty((x.shape[0] if rows is None else rows.shape[0], x.shape[1]))


def _products(x: Tensor, n: int, wide: bool = False) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32) if wide else x.dtype
    return x.new_empty((x.shape[0], n), dtype=dtype)


_linear = _op(
    "linear(Tensor x, Tensor weight, Tensor? bias=None, bool wide=False) -> Tensor",
    reference.linear,
    lambda x, weight, bias=None, wide=False: _products(x, weight.shape[0], wide),
)
_packed_linear = _op(
    "packed_linear(Tensor x, Tensor packed, int n, Tensor? bias=None, bool wide=False) -> Tensor",
    lambda x, data, n, *rest: reference.linear(x, Packed(data, (n, x.shape[1])).plain(), *rest),
    lambda x, packed, n, bias=None, wide=False: _products(x, n, wide),
)
_packed_gated_linear = _op(
    "packed_gated_linear(Tensor x, Tensor packed, int n, Tensor? bias=None) -> Tensor",
    lambda x, data, n, bias=None: reference.gated_linear(x, Packed(data, (n, x.shape[1])).plain(), bias),
    lambda x, packed, n, bias=None: _products(x, n // 2),
)
_quantized_linear = _op(
    "quantized_linear(Tensor x, Tensor codes, Tensor scales, Tensor zeros, Tensor? columns, int n, "
    "Tensor? bias=None, bool wide=False) -> Tensor",
    reference.quantized_linear,
    lambda x, codes, scales, zeros, columns, n, bias=None, wide=False: _products(x, n, wide),
)
_op("pack(Tensor weight) -> Tensor", pack, pack)
# No arithmetic, but as plain torch it would be the only thing that a compiler has to generate code for.
_join = _op(
    "join(Tensor[] parts) -> Tensor",
    lambda parts: torch.cat(parts, 1),
    lambda parts: parts[0].new_empty((parts[0].shape[0], sum(part.shape[1] for part in parts))),
)
take_rows = _op(
    "take_rows(Tensor x, Tensor rows) -> Tensor",
    reference.take_rows,
    lambda x, rows: _wanted(x, rows),
)


def linear(x: Tensor, weight: Weight, bias: Tensor | None = None, wide: bool = False) -> Tensor:
    """`reference.linear` for any weight: plain or packed (with the same bits), quantised, or in parts."""
    if isinstance(weight, Packed):
        return _packed_linear(x, *weight.parts, weight.shape[0], bias, wide)
    if isinstance(weight, Quantized):
        codes, scales, zeros, *columns = weight.parts
        return _quantized_linear(
            x, codes, scales, zeros, columns[0] if columns else None, weight.shape[0], bias, wide
        )
    if isinstance(weight, Stacked):
        biases = [None] * len(weight.parts) if bias is None else bias.split(weight.heights)
        return _join([linear(x, *part, wide) for part in zip(weight.parts, biases, strict=True)])
    return _linear(x, weight, bias, wide)


def gated_linear(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """`silu_mul(linear(x, weight, bias))`. A packed weight saves a pass, and changes no bit."""
    if isinstance(weight, Packed):
        return _packed_gated_linear(x, *weight.parts, weight.shape[0], bias)
    return silu_mul(linear(x, weight, bias))


def packable(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the kernels that run there have a layout of their own for weights of this dtype."""
    return device.type == "cpu" and dtype in DTYPES and cpu.instruction_set() != cpu.REFERENCE


def packed(weight: Tensor, arena: Arena | None = None) -> Tensor | Packed:
    """A copy of a weight `[N, K]` in the kernels' layout; the weight itself if it is not `packable`.

    arena: where the copy lies, for weights that stay.
    """
    if not packable(weight.dtype, weight.device):
        return weight
    return Packed(pack(weight, arena), (weight.shape[0], weight.shape[1]))


def is_own(weight: Weight) -> TypeGuard[Packed | Quantized]:
    """Whether `decoder_layers` takes the weight: it lies in a layout of the CPU's kernels."""
    return _HAS_KERNELS and isinstance(weight, (Packed, Quantized)) and weight.device.type == "cpu"


rms_norm = _op(
    "rms_norm(Tensor x, Tensor weight, float eps) -> Tensor",
    reference.rms_norm,
    lambda x, weight, eps: torch.empty_like(x),
)
add_rms_norm = _op(
    "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor)",
    reference.add_rms_norm,
    lambda x, residual, weight, eps: (torch.empty_like(x), torch.empty_like(x)),
)
silu_mul = _op(
    "silu_mul(Tensor gate_up) -> Tensor",
    reference.silu_mul,
    lambda gate_up: gate_up.new_empty((gate_up.shape[0], gate_up.shape[1] // 2)),
)
rope_angles = _op(
    "rope_angles(Tensor positions, Tensor inv_freq) -> Tensor",
    reference.rope_angles,
    lambda positions, inv_freq: inv_freq.new_empty((positions.shape[0], 2 * inv_freq.shape[0])),
)
qk_norm_rope_write = _op(
    "qk_norm_rope_write(Tensor qkv, Tensor angles, Tensor? q_norm, Tensor? k_norm, float eps, "
    "Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slots) -> Tensor",
    reference.qk_norm_rope_write,
    lambda qkv, angles, q_norm, k_norm, eps, k_cache, v_cache, slots: qkv.new_empty(
        (qkv.shape[0], qkv.shape[1] // angles.shape[1] - 2 * k_cache.shape[2], angles.shape[1])
    ),
)
paged_attention = _op(
    "paged_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_tables, Tensor query_start, "
    "Tensor seq_lens, float scale) -> Tensor",
    reference.paged_attention,
    lambda q, *_: q.new_empty(q.shape),
)
decoder_layers = _op(
    "decoder_layers(Tensor x, Tensor residual, Tensor angles, Tensor[] weights, int[] sizes, int num_heads, "
    "int inner, float eps, float scale, Tensor(a!)[] k_caches, Tensor(b!)[] v_caches, Tensor slots, "
    "Tensor block_tables, Tensor query_start, Tensor seq_lens, Tensor? wanted) -> (Tensor, Tensor)",
    None,  # the kernels' own: weights are the `parts` of their layouts
    lambda x, residual, *rest: (_wanted(x, rest[-1]), _wanted(residual, rest[-1])),
)
copy_blocks = _op(
    "copy_blocks(Tensor(a!) k, Tensor(b!) v, Tensor source, Tensor target) -> ()",
    reference.copy_blocks,
    lambda k, v, source, target: None,
)
philox = _op(
    "philox(Tensor seed, Tensor position, Tensor sample_index, int purpose) -> Tensor",
    sampler.philox,
    lambda seed, position, sample_index, purpose: _rows(seed, torch.float32),
)
penalize = _op(
    "penalize(Tensor logits, Tensor history, Tensor history_start, Tensor prompt_len, Tensor repetition, "
    "Tensor presence, Tensor frequency, Tensor bias_row, Tensor bias_id, Tensor bias_value) -> Tensor",
    sampler.penalize,
    lambda logits, *_: torch.empty_like(logits),
)
warp = _op(
    "warp(Tensor logits, Tensor temperature, Tensor min_p, Tensor top_k, Tensor top_p, bool truncate=True) "
    "-> Tensor",
    sampler.warp,
    lambda logits, *_: torch.empty_like(logits),
)
draw = _op(
    "draw(Tensor logits, Tensor greedy, Tensor u) -> Tensor",
    sampler.draw,
    lambda logits, greedy, u: _rows(logits, torch.int64),
)
log_softmax = _op(
    "log_softmax(Tensor logits) -> Tensor",
    sampler.log_softmax,
    lambda logits: torch.empty_like(logits),
)
pick_logprobs = _op(
    "pick_logprobs(Tensor logits, Tensor ids, int k) -> (Tensor, Tensor, Tensor, Tensor)",
    sampler.pick_logprobs,
    lambda logits, ids, k: (
        _rows(logits, torch.float32),
        _rows(logits, torch.int64),
        logits.new_empty((logits.shape[0], k), dtype=torch.int64),
        logits.new_empty((logits.shape[0], k)),
    ),
)

_HAS_KERNELS = cpu.load()
cuda.load(_LIBRARIES[1])
