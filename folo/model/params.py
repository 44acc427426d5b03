"""Model weights as a frozen pytree: tensors are leaves, the architecture is context."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from folo import ops
from folo.model.config import DecoderConfig
from folo.ops.packed import Packed
from folo.ops.quantized import Quantized
from folo.ops.stacked import Weight
from folo.ops.tree import register


@dataclass(frozen=True, eq=False)
class Linear:
    """`x @ weight.T + bias`. weight `[N, K]`, bias `[N]` or None, in the model's dtype.

    The weight may be in another layout (`Packed`, `Stacked`), or of integers with scales (`Quantized`).
    """

    weight: Weight
    bias: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Layer:
    """One decoder layer. D = hidden, Hq/Hkv = query/KV heads, E = head_dim, I = intermediate."""

    input_norm: Tensor  # [D]
    qkv: Linear  # weight [(Hq + 2 Hkv) E, D], rows: all queries, then keys, then values
    q_norm: Tensor | None  # [E]
    k_norm: Tensor | None  # [E]
    out: Linear  # weight [D, Hq E]
    post_norm: Tensor  # [D]
    gate_up: Linear  # weight [2 I, D], rows: gate, then up
    down: Linear  # weight [D, I]


NORMS = {
    "input_norm": "input_layernorm",
    "post_norm": "post_attention_layernorm",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
}
LINEARS = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "out": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
"""The modules of a `Layer` in transformers, by its fields; those of one linear layer read the same input.

A norm that the model lacks is None.
"""


def in_groups(layers: Iterable[tuple[Layer, Tensor]]) -> tuple[list[Tensor], list[int]] | None:
    """`layers_with_next_norm` as `ops.decoder_layers` takes them: the tensors, group after group, and the
    size of each group; None if it does not take one of the weights."""
    groups: list[list[Tensor]] = []
    for layer, next_norm in layers:
        weights = [linear.weight for linear in (layer.qkv, layer.out, layer.gate_up, layer.down)]
        qkv, out, gate_up, down = (weight.parts if ops.is_own(weight) else [] for weight in weights)
        if not (qkv and out and gate_up and down):
            return None
        groups += [qkv, _optional(layer.qkv.bias), _optional(layer.q_norm), _optional(layer.k_norm)]
        groups += [out, _optional(layer.out.bias), [layer.post_norm]]
        groups += [gate_up, _optional(layer.gate_up.bias), down, _optional(layer.down.bias), [next_norm]]
    return [tensor for group in groups for tensor in group], [len(group) for group in groups]


def _optional(tensor: Tensor | None) -> list[Tensor]:
    return [] if tensor is None else [tensor]


@dataclass(frozen=True, eq=False)
class Params:
    """All weights of one decoder. Never changed in place; `torch.func` transforms take it as a pytree.

    Its repr is the architecture: the weights, even abbreviated, would be a megabyte of text in a message.
    """

    embed: Tensor | Packed = field(repr=False)  # [V, D]; packed where it is the output layer's weight too
    layers: tuple[Layer, ...] = field(repr=False)
    norm: Tensor = field(repr=False)  # [D]
    lm_head: Linear | None = field(repr=False)  # None: tied to `embed`
    config: DecoderConfig

    @property
    def dtype(self) -> torch.dtype:
        return self.embed.dtype

    @property
    def device(self) -> torch.device:
        return self.embed.device

    @property
    def packed(self) -> bool:
        """Whether weights are in a backend's own layout, which nothing can be differentiated through."""
        return any(isinstance(weight, Packed) for weight in _weights(self))

    @property
    def quantized(self) -> bool:
        """Whether weights are integers with scales, which nothing can be differentiated through."""
        return any(isinstance(weight, Quantized) for weight in _weights(self))

    @property
    def described(self) -> DecoderConfig:
        """`config` with the weights' dtype, which a map over the tree may have changed."""
        return replace(self.config, dtype=self.dtype)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the architecture and every weight's name, dtype, shape and bytes. Reads them all.

        Packed weights have the fingerprint of the plain ones; quantised ones count with all their tensors.
        """
        digest = sha256(repr(self.described).encode())
        for path, leaf in pytree.tree_leaves_with_path(self, is_leaf=_is_packed):
            leaf: Tensor = leaf.plain() if isinstance(leaf, Packed) else leaf
            digest.update(f"{pytree.keystr(path)} {leaf.dtype} {tuple(leaf.shape)}".encode())
            digest.update(leaf.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    @cached_property
    def inv_freq(self) -> Tensor:
        """`new_inv_freq`, computed once.

        A compiled graph takes the frequencies as an input, so they have to exist before it is made: a
        compiler's own code would round them differently.
        """
        assert not torch.compiler.is_compiling(), "read params.inv_freq once before compiling"
        with torch.inference_mode(False):  # later readers may be in another mode than the first
            return self.new_inv_freq()

    def new_inv_freq(self) -> Tensor:
        """Rotary frequencies, float32 (float64 for float64 weights) `[E/2]`, on the weights' device."""
        kind = torch.float64 if self.dtype == torch.float64 else torch.float32
        return self.config.inv_freq().to(self.device, kind)

    @cached_property
    def own_layers(self) -> tuple[list[Tensor], list[int]] | None:
        """All layers as `ops.decoder_layers` takes them; None if it does not take all."""
        return in_groups(layers_with_next_norm(self))

    @property
    def num_parameters(self) -> int:
        return sum(math.prod(weight.shape) for weight in _weights(self))

    @property
    def num_bytes(self) -> int:
        """Bytes of the weights in memory, without the padding of packed ones."""
        return sum(_num_bytes(weight) for weight in _weights(self))


def layers_with_next_norm(params: Params) -> Iterator[tuple[Layer, Tensor]]:
    """Each layer, and the norm of the one after it, which closes the layer."""
    following = (*(layer.input_norm for layer in params.layers[1:]), params.norm)
    return zip(params.layers, following, strict=True)


def _is_packed(value: Any) -> bool:
    return isinstance(value, Packed)


def _weights(params: Params) -> list[Tensor | Packed | Quantized]:
    return pytree.tree_leaves(params, is_leaf=lambda value: isinstance(value, Packed | Quantized))


def _num_bytes(weight: Tensor | Packed | Quantized) -> int:
    if isinstance(weight, Quantized):
        return weight.num_bytes
    return math.prod(weight.shape) * weight.dtype.itemsize


register(Linear)
register(Layer)
register(Params, context=("config",))
