"""The ops of the forward pass and the sampler, as opaque custom ops.

The contract that every implementation keeps: **a row of the output depends, bit for bit, on that
row's inputs alone**, not on how many rows there are, where in the batch it stands, how the query
was chunked, where its KV blocks lie, or how many threads run. Being opaque, an op is not rewritten
by a compiler, whose generated arithmetic would round differently from eager.

Shapes, dtypes and sources stand at each function of `folo.ops.reference` and `folo.ops.sampler`.
"""

from folo.ops.library import (
    add_rms_norm,
    copy_blocks,
    decoder_layers,
    draw,
    gated_linear,
    is_own,
    linear,
    log_softmax,
    packable,
    packed,
    paged_attention,
    penalize,
    philox,
    pick_logprobs,
    qk_norm_rope_write,
    rms_norm,
    rope_angles,
    silu_mul,
    take_rows,
    warp,
)
from folo.ops.quantized import quantized

__all__ = [
    "add_rms_norm",
    "copy_blocks",
    "decoder_layers",
    "draw",
    "gated_linear",
    "is_own",
    "linear",
    "log_softmax",
    "packable",
    "packed",
    "paged_attention",
    "penalize",
    "philox",
    "pick_logprobs",
    "qk_norm_rope_write",
    "quantized",
    "rms_norm",
    "rope_angles",
    "silu_mul",
    "take_rows",
    "warp",
]
