"""The decoder as a pure function of its weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

from folo import ops
from folo.errors import ConfigError
from folo.inputs import Inputs
from folo.model.config import DecoderConfig
from folo.model.params import Layer, Linear, Params, in_groups, layers_with_next_norm
from folo.ops import kv_cache, reference
from folo.ops.attention import BACKENDS, attention_backend
from folo.ops.packed import Packed

# attend(layer, qkv [T, (Hq + 2 Hkv) E], angles [T, E]) -> [T, Hq E]
Attend = Callable[[Layer, Tensor, Tensor], Tensor]

_FEW_ROWS = 256  # tokens, at most, for one call of all layers: no interrupt gets through until it returns
_BLOCK = 16  # `forward` keeps K and V in blocks too: the attention op knows no other layout


def _linear(x: Tensor, weights: Linear, op: Any) -> Tensor:
    return op.linear(x, weights.weight, weights.bias)


def embedded(
    params: Params, token_ids: Tensor, positions: Tensor, inv_freq: Tensor, op: Any = ops
) -> tuple[Tensor, Tensor, Tensor]:
    """token_ids and positions int64 `[T]` -> the first layer's x, residual `[T, D]` and angles `[T, E]`.

    op: the module of ops: `folo.ops`, or `folo.ops.reference` for arithmetic that can be differentiated.
    """
    angles = op.rope_angles(positions, inv_freq)
    embed = params.embed
    residual = embed.rows(token_ids) if isinstance(embed, Packed) else embed[token_ids]
    return op.rms_norm(residual, params.layers[0].input_norm, params.config.rms_norm_eps), residual, angles


def decoder_layer(
    attend: Attend,
    layer: Layer,
    next_norm: Tensor,
    x: Tensor,
    residual: Tensor,
    angles: Tensor,
    eps: float,
    wanted: Tensor | None = None,
    op: Any = ops,
) -> tuple[Tensor, Tensor]:
    """x (normalised) and residual `[T, D]` -> those of the next layer, whose input norm is `next_norm`.

    wanted: the rows, int64 `[R]`, to keep after attention; None: all. For the last layer, whose output is
    needed only where logits are: of a prompt, usually for one token.
    """
    x = attend(layer, _linear(x, layer.qkv, op), angles)
    if wanted is not None:
        x, residual = op.take_rows(x, wanted), op.take_rows(residual, wanted)
    x, residual = op.add_rms_norm(_linear(x, layer.out, op), residual, layer.post_norm, eps)
    x = _linear(op.gated_linear(x, layer.gate_up.weight, layer.gate_up.bias), layer.down, op)
    return op.add_rms_norm(x, residual, next_norm, eps)


def logits(params: Params, hidden: Tensor, op: Any = ops) -> Tensor:
    """hidden `[R, D]` -> logits `[R, V]`, float32 (float64 for float64 params) for params of any dtype.

    They are never rounded to the params' dtype: in bfloat16 the top two tie once in twenty tokens.
    """
    head = Linear(params.embed) if params.lm_head is None else params.lm_head
    return op.linear(hidden, head.weight, head.bias, wide=True)


def layer_in_heap(
    config: DecoderConfig,
    attention: str,
    layer: Layer,
    next_norm: Tensor,
    x: Tensor,
    residual: Tensor,
    angles: Tensor,
    k: Tensor,
    v: Tensor,
    slots: Tensor,
    block_tables: Tensor,
    query_start: Tensor,
    seq_lens: Tensor,
    wanted: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`decoder_layer` over the heap: write this step's K and V, then attend to the whole context.

    k and v, one layer of `KVHeap`'s, are written in place, at `slots` only. attention: one of
    `folo.ops.attention.BACKENDS`. The unit that is compiled: one graph serves all layers but the last, if
    that goes on with `wanted` rows alone.
    """
    where = slots, block_tables, query_start, seq_lens
    if attention == "cpu" and (own := in_groups([(layer, next_norm)])):
        return ops.decoder_layers(x, residual, angles, *own, *_sizes(config), [k], [v], *where, wanted)
    # Tells a compiler these sizes, symbols to it otherwise: what it cannot prove equal it copies.
    assert x.shape[1] == residual.shape[1] == config.hidden_size
    assert (k.shape[2], angles.shape[1]) == (config.num_kv_heads, config.head_dim)
    eps, scale = config.rms_norm_eps, config.head_dim**-0.5

    def attend(layer: Layer, qkv: Tensor, angles: Tensor) -> Tensor:
        q = ops.qk_norm_rope_write(qkv, angles, layer.q_norm, layer.k_norm, eps, k, v, slots)
        op = BACKENDS[attention].op or ops.paged_attention
        return op(q, k, v, block_tables, query_start, seq_lens, scale).flatten(1)

    return decoder_layer(attend, layer, next_norm, x, residual, angles, eps, wanted)


def _sizes(config: DecoderConfig) -> tuple[int, int, float, float]:
    return config.num_heads, config.intermediate_size, config.rms_norm_eps, config.head_dim**-0.5


def hidden_in_heap(
    params: Params,
    k: Tensor,
    v: Tensor,
    inputs: Inputs,
    attention: str,
    layer_function: Any = layer_in_heap,
) -> Tensor:
    """The normalised hidden states of a step's `logits_rows`, `[R, D]`, over the k and v of a `KVHeap`."""
    config, wanted = params.config, inputs.logits_rows
    where = inputs.slots, inputs.block_tables, inputs.query_start, inputs.seq_lens
    x, residual, angles = embedded(params, inputs.token_ids, inputs.positions, params.inv_freq)
    if (
        layer_function is layer_in_heap
        and attention == "cpu"
        and inputs.token_ids.shape[0] <= _FEW_ROWS
        and not torch.compiler.is_compiling()
        and (own := params.own_layers)
    ):
        caches = k.unbind(), v.unbind()
        return ops.decoder_layers(x, residual, angles, *own, *_sizes(config), *caches, *where, wanted)[0]
    for index, (layer, next_norm) in enumerate(layers_with_next_norm(params)):
        rows = wanted if index == config.num_layers - 1 else None
        x, residual = layer_function(
            *(config, attention, layer, next_norm, x, residual, angles, k[index], v[index], *where, rows)
        )
    return x


def forward(params: Params, token_ids: Tensor) -> Tensor:
    """Logits of a whole sequence: token_ids `[T]` (any integer dtype) -> `[T, V]` float32.

    Bit for bit what the engine computes for the same tokens. Under `torch.func` transforms (grad,
    jvp, vmap, ...) or autograd on `params` it runs the reference ops, in plain differentiable torch:
    their last bits may differ from a kernel's. float64 params give float64 logits. `torch.compile` makes one
    graph of that for each length of prompt (`torch.compile(torch.func.grad(loss))`), whose last bits may
    differ once more; otherwise it leaves the kernels as they are.

    Raises:
        ConfigError: token_ids is no integer tensor, not one-dimensional and non-empty, longer than the
            model allows, or (outside of transforms) not of its vocabulary; or packed or quantised params
            under a transform.
    """
    config = params.config
    if (
        not isinstance(token_ids, Tensor)
        or token_ids.is_floating_point()
        or token_ids.is_complex()
        or token_ids.dtype == torch.bool
    ):
        kind = token_ids.dtype if isinstance(token_ids, Tensor) else type(token_ids).__name__
        raise ConfigError(f"token_ids must be an integer tensor, got {kind}: torch.tensor(ids) makes one")
    if token_ids.ndim != 1 or not token_ids.numel():
        raise ConfigError(f"token_ids must have shape [T] with T >= 1, got {tuple(token_ids.shape)}")
    if token_ids.shape[0] > config.max_position_embeddings:
        raise ConfigError(
            f"{token_ids.shape[0]} tokens exceed the model's {config.max_position_embeddings} positions"
        )
    inputs = _one_sequence(token_ids.to(params.device, torch.int64))
    if _differentiated(params):
        return _reference_logits(params, inputs)
    if torch.compiler.is_compiling():  # it would generate code for what the ops call, and round differently
        uncompiled: Any = torch.compiler.disable(_kernel_logits)
        return uncompiled(params, inputs)
    return _kernel_logits(params, inputs)


def _kernel_logits(params: Params, inputs: Inputs) -> Tensor:
    """The logits of one whole sequence, `[T, V]`, as the engine computes them."""
    config = params.config
    require_in_vocabulary(config, int(inputs.token_ids.min()), int(inputs.token_ids.max()))
    shape = config.num_layers, inputs.block_tables.shape[1], _BLOCK, config.num_kv_heads, config.head_dim
    k, v = kv_cache.zeros(shape, params.dtype, params.device)
    attention = attention_backend("auto", params.device, params.dtype, _BLOCK, config.head_dim)
    return logits(params, hidden_in_heap(params, k, v, inputs, attention))


def require_in_vocabulary(config: DecoderConfig, *ids: int) -> None:
    """Raises ConfigError for a token id that the model does not have."""
    for id in ids:
        if not 0 <= id < config.vocab_size:
            raise ConfigError(f"token id {id} is outside the model's vocabulary of {config.vocab_size}")


def _reference_logits(params: Params, inputs: Inputs) -> Tensor:
    """The logits of one whole sequence, `[T, V]`, in plain differentiable torch."""
    if params.quantized:
        raise ConfigError("quantised weights cannot be differentiated or transformed: load the dense model")
    if params.packed:
        raise ConfigError(
            "packed weights cannot be differentiated or transformed: folo.load(..., pack=False)"
        )
    config, op = params.config, reference
    # As the length of a range it is a constant to a compiler, not a symbol: the tiles depend on it.
    length = len(range(inputs.token_ids.shape[0]))

    def attend(layer: Layer, qkv: Tensor, angles: Tensor) -> Tensor:
        norms = layer.q_norm, layer.k_norm
        q, k, v = op.qk_norm_rope(qkv, angles, *norms, config.rms_norm_eps, config.num_kv_heads)
        pad = k.new_zeros((-k.shape[0] % _BLOCK, *k.shape[1:]))
        k, v = (torch.cat((x, pad)).unflatten(0, (-1, _BLOCK)) for x in (k, v))
        tables, scale = inputs.block_tables, config.head_dim**-0.5
        return op.attention_of(q, k, v, tables, [0, length], [length], scale).flatten(1)

    inv_freq = params.new_inv_freq()
    x, residual, angles = embedded(params, inputs.token_ids, inputs.positions, inv_freq, op)
    for layer, next_norm in layers_with_next_norm(params):
        x, residual = decoder_layer(attend, layer, next_norm, x, residual, angles, config.rms_norm_eps, op=op)
    return logits(params, x, op)


def _one_sequence(token_ids: Tensor) -> Inputs:
    length, device = token_ids.shape[0], token_ids.device
    positions = torch.arange(length, device=device)
    start = torch.tensor([0, length], dtype=torch.int32, device=device)
    tables = torch.arange(-(-length // _BLOCK), dtype=torch.int32, device=device)[None]
    none = positions[:0]
    return Inputs(token_ids, positions, positions, start, start[1:], tables, none, none, None, ())


def _differentiated(params: Params) -> bool:
    """Whether a torch.func transform or autograd is at work, which an opaque op would silently stop."""
    if torch._C._are_functorch_transforms_active():
        return True
    leaves = pytree.tree_leaves(params)
    if torch.is_grad_enabled() and any(leaf.requires_grad for leaf in leaves):
        return True
    return any(forward_ad.unpack_dual(leaf).tangent is not None for leaf in leaves)
