"""The architecture of a decoder, as one frozen value: what `params.config` holds."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from folo.errors import LoadError

# What transformers' configuration classes assume where config.json is silent; the rest is the same for all.
CLASS_DEFAULTS: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {"max_position_embeddings": 2048, "bos_token_id": 1},
    "MistralForCausalLM": {
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "bos_token_id": 1,
        "sliding_window": 4096,
    },
    "Qwen2ForCausalLM": {
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
        "sliding_window": 4096,
    },
    "Qwen3ForCausalLM": {
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "sliding_window": 4096,
    },
}

_DEFAULT_EOS = {
    "LlamaForCausalLM": [2],
    "MistralForCausalLM": [2],
    "Qwen2ForCausalLM": [],
    "Qwen3ForCausalLM": [],
}
# generation_config.json's keys, and folo's names for them. Greedy decoding uses GREEDY_DEFAULTS alone.
GREEDY_DEFAULTS = {"repetition_penalty": "repetition_penalty", "max_new_tokens": "max_tokens"}
SAMPLING_DEFAULTS = GREEDY_DEFAULTS | {key: key for key in ("temperature", "top_k", "top_p", "min_p")}
_MOST_LAYERS = 10_000  # a corrupt file may claim any number, and merely to name their weights takes memory


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding: `theta`, and the llama3 frequency scaling if `type == "llama3"`.

    `freq_factors`, E/2 of them or none, divide the frequencies. In this form a GGUF file holds a scaling
    (its tensor `rope_freqs.weight`), computed when the file was made.
    """

    type: str = "default"
    theta: float = 10000.0
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192
    freq_factors: tuple[float, ...] = ()


@dataclass(frozen=True)
class DecoderConfig:
    """Llama, Mistral, Qwen2 and Qwen3 are one decoder with these switches."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: RopeConfig
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tie_word_embeddings: bool
    dtype: torch.dtype
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    sampling_defaults: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        if self.num_layers > _MOST_LAYERS:
            raise LoadError(f"{self.num_layers} layers are not supported: at most {_MOST_LAYERS} are.")
        if self.num_heads % self.num_kv_heads:
            raise LoadError(
                f"{self.num_heads} attention heads cannot share {self.num_kv_heads} KV heads evenly."
            )
        if self.head_dim % 2:
            raise LoadError(f"head_dim is {self.head_dim}: rotary embeddings need an even one.")

    @classmethod
    def from_hf(
        cls, config: Mapping[str, Any], generation: Mapping[str, Any] | None, dtype: torch.dtype
    ) -> DecoderConfig:
        """The decoder that a checkpoint's `config.json` describes, with weights in `dtype`.

        Keys that are absent have the defaults of transformers' configuration class. `generation` is
        `generation_config.json`: its end-of-sequence ids join those of `config`, and its sampling values and
        `max_new_tokens` become `sampling_defaults`, as with vLLM's `--generation-config auto`. With
        `"do_sample": false`, only `max_new_tokens` and the repetition penalty are kept: transformers, too,
        ignores the others.

        Raises:
            LoadError: the architecture or a setting is not supported; or a required key is missing or
                makes no sense.
        """
        architecture = _architecture(config)
        config = {**CLASS_DEFAULTS[architecture], **config}
        generation = generation or {}
        _refuse_unsupported(config, architecture)
        qwen2, qwen3 = architecture == "Qwen2ForCausalLM", architecture == "Qwen3ForCausalLM"
        llama = architecture == "LlamaForCausalLM"
        hidden, heads = positive_int(config, "hidden_size"), positive_int(config, "num_attention_heads")
        head_dim = positive_int(config, "head_dim", hidden // heads)
        max_position = positive_int(config, "max_position_embeddings")
        attention_bias = (llama or qwen3) and flag(config, "attention_bias")
        return cls(
            architecture=architecture,
            vocab_size=positive_int(config, "vocab_size"),
            hidden_size=hidden,
            intermediate_size=positive_int(config, "intermediate_size"),
            num_layers=positive_int(config, "num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=positive_int(config, "num_key_value_heads", heads),
            head_dim=head_dim,
            max_position_embeddings=max_position,
            rms_norm_eps=positive_number(config, "rms_norm_eps", 1e-6),
            rope=_rope(config, max_position),
            qkv_bias=attention_bias or qwen2,
            o_bias=attention_bias,
            mlp_bias=llama and flag(config, "mlp_bias"),
            qk_norm=qwen3,
            tie_word_embeddings=flag(config, "tie_word_embeddings"),
            dtype=dtype,
            bos_token_id=config.get("bos_token_id"),
            eos_token_ids=_eos_token_ids(config, generation),
            sampling_defaults=_sampling_defaults(generation),
        )

    @property
    def kv_per_token(self) -> int:
        """Elements of one token's K and V, in all layers together."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim

    def inv_freq(self) -> Tensor:
        """Rotary frequencies in radians per position, float32 `[head_dim / 2]`, on the CPU.

        The arithmetic is transformers': `compute_default_rope_parameters` of the models, and
        `_compute_llama3_parameters` in `modeling_rope_utils.py`. Factors divide as in llama.cpp's
        `ggml_rope_ext`.
        """
        rope = self.rope
        even = torch.arange(0, self.head_dim, 2, dtype=torch.int64, device="cpu")
        exponent = even.float() / self.head_dim
        inv_freq = 1.0 / (rope.theta**exponent)
        if rope.freq_factors:
            inv_freq = inv_freq / torch.tensor(rope.freq_factors, dtype=torch.float32, device="cpu")
        return _llama3_scaled(inv_freq, rope) if rope.type == "llama3" else inv_freq


def _llama3_scaled(inv_freq: Tensor, rope: RopeConfig) -> Tensor:
    """`[E / 2]`: long wavelengths slowed down by `factor`, short ones kept, those between interpolated."""
    wavelength = 2 * math.pi / inv_freq
    is_long = wavelength > rope.original_max_position / rope.low_freq_factor
    is_short = wavelength < rope.original_max_position / rope.high_freq_factor
    smooth = (rope.original_max_position / wavelength - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    between = (1 - smooth) * inv_freq / rope.factor + smooth * inv_freq
    return torch.where(is_long, inv_freq / rope.factor, torch.where(is_short, inv_freq, between))


def _architecture(config: Mapping[str, Any]) -> str:
    names = typed(config, "architectures", list) or ["none named"]
    for name in CLASS_DEFAULTS:
        if name in names:
            return name
    raise LoadError(
        f"Unsupported architecture: {', '.join(map(str, names))}. Supported: {', '.join(CLASS_DEFAULTS)}."
    )


def _refuse_unsupported(config: Mapping[str, Any], architecture: str) -> None:
    """Raises LoadError for settings that would change the model's outputs if they were ignored."""
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        raise LoadError(f"hidden_act is {activation!r}: only 'silu' is supported.")
    window = config.get("sliding_window")
    if architecture == "MistralForCausalLM":
        context = positive_int(config, "max_position_embeddings")
        slides = positive_int(config, "sliding_window", context) < context
    else:
        slides = architecture.startswith("Qwen") and flag(config, "use_sliding_window") and window is not None
    types = typed(config, "layer_types", list)
    if slides or "sliding_attention" in (types or ()):
        raise LoadError(f"Sliding window attention (sliding_window {window}) is not supported.")
    layers = positive_int(config, "num_hidden_layers")
    if types is not None and (len(types) != layers or any(kind != "full_attention" for kind in types)):
        raise LoadError(f"layer_types is {types!r}: it must be 'full_attention' for each of {layers} layers.")


def _rope(config: Mapping[str, Any], max_position: int) -> RopeConfig:
    """Read `rope_parameters` (transformers 5), or `rope_scaling` and `rope_theta` (older)."""
    rope = typed(config, "rope_scaling", dict) or typed(config, "rope_parameters", dict) or {}
    if any(isinstance(value, Mapping) for value in rope.values()):
        raise LoadError(
            f"Rotary embeddings that differ between layers ({', '.join(rope)}) are not supported."
        )
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ("default", "llama3"):
        raise LoadError(f"Rope type {kind!r} is not supported: only 'default' and 'llama3' are.")
    partial = rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    if partial != 1.0:
        raise LoadError(f"partial_rotary_factor is {partial}: only 1.0 is supported.")
    theta = positive_number(rope, "rope_theta", positive_number(config, "rope_theta", 10000.0))
    if kind == "default":
        return RopeConfig(theta=theta)
    original = "original_max_position_embeddings"
    return RopeConfig(
        type=kind,
        theta=theta,
        factor=positive_number(rope, "factor"),
        low_freq_factor=positive_number(rope, "low_freq_factor"),
        high_freq_factor=positive_number(rope, "high_freq_factor"),
        original_max_position=positive_int(config, original, positive_int(rope, original, max_position)),
    )


def _eos_token_ids(config: Mapping[str, Any], generation: Mapping[str, Any]) -> tuple[int, ...]:
    """Generation's ids, then those that only `config` has; the class default if both lack the key."""
    ids = [*token_ids(generation, "eos_token_id"), *token_ids(config, "eos_token_id")]
    if not ids and "eos_token_id" not in config:
        ids = _DEFAULT_EOS[_architecture(config)]
    return tuple(dict.fromkeys(ids))


def _sampling_defaults(generation: Mapping[str, Any]) -> tuple[tuple[str, float], ...]:
    greedy = typed(generation, "do_sample", bool) is False
    names = GREEDY_DEFAULTS if greedy else SAMPLING_DEFAULTS
    given = ((name, generation.get(key)) for key, name in names.items())
    return tuple(sorted((name, value) for name, value in given if value is not None))


def _required(config: Mapping[str, Any], key: str) -> Any:
    if config.get(key) is None:
        raise LoadError(f"The configuration lacks the required key {key!r}.")
    return config[key]


def typed(config: Mapping[str, Any], key: str, kind: type) -> Any:
    """`config[key]`, or None. Raises LoadError naming the key if it is of another kind."""
    value = config.get(key)
    if value is not None and not isinstance(value, kind):
        raise LoadError(f"{key} is {value!r}: it must be a {kind.__name__}.")
    return value


def flag(config: Mapping[str, Any], key: str) -> bool:
    """`config[key]`; False where it is absent or null. Raises LoadError naming the key if it is no bool."""
    return bool(typed(config, key, bool))


def token_ids(config: Mapping[str, Any], key: str) -> list[int]:
    """`config[key]` as a list: one token id, several, or none. Raises LoadError naming the key."""
    value = config.get(key)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if any(isinstance(token, bool) or not isinstance(token, int) for token in ids):
        raise LoadError(f"{key} is {value!r}: it must be a token id or a list of them.")
    return ids


def positive_int(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """`config[key]`, or `default` where it is absent or null. Raises LoadError naming the key."""
    value = default if config.get(key) is None and default is not None else _required(config, key)
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise LoadError(f"{key} is {value!r}: it must be a positive integer.")
    return value


def positive_number(config: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """`config[key]`, or `default` where it is absent or null. Raises LoadError naming the key."""
    value = default if config.get(key) is None and default is not None else _required(config, key)
    known = isinstance(value, int | float) and not isinstance(value, bool)
    if not known or not 0 < value <= sys.float_info.max:
        raise LoadError(f"{key} is {value!r}: it must be a positive number.")
    return float(value)
