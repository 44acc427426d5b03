"""From `Params` to files: the directory that transformers' `save_pretrained` would write."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from folo.errors import ConfigError
from folo.model.config import DecoderConfig
from folo.model.params import Linear, Params
from folo.ops.packed import Packed

_MODEL_TYPES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}


def export(params: Params, path: str | os.PathLike[str]) -> None:
    """Write config.json, generation_config.json and model.safetensors into the directory `path`.

    It is made if it is not there. The weights are written as they are: `folo.load` on the directory gives
    parameters of the same fingerprint. The tokenizer is not part of `params`:
    `folo.load_tokenizer(model).save_pretrained(path)` adds it.

    Raises:
        ConfigError: config.json has no words for this decoder; nothing is written.
        OSError: the files cannot be written.
    """
    config, generation = _hf_config(params.config), _generation_config(params.config)
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    save_file(dict(named_tensors(params)), path / "model.safetensors", metadata={"format": "pt"})
    # config.json last: before it stands there, nothing takes the directory for a checkpoint.
    for name, content in (("generation_config.json", generation), ("config.json", config)):
        (path / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def named_tensors(params: Params) -> Iterator[tuple[str, Tensor]]:
    """Every weight in plain layout and contiguous, by its name in transformers' state dict.

    Copies where the layout differs, one at a time.
    """
    config = params.config
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    inner = config.intermediate_size

    def linear(prefix: str, weights: Linear, parts: dict[str, int]) -> Iterator[tuple[str, Tensor]]:
        for kind, tensor in (("weight", weights.weight), ("bias", weights.bias)):
            if tensor is not None:
                for name, part in zip(parts, _plain(tensor).split(list(parts.values())), strict=True):
                    yield f"{prefix}.{name}.{kind}", part.contiguous()

    yield "model.embed_tokens.weight", _plain(params.embed)
    for index, layer in enumerate(params.layers):
        prefix = f"model.layers.{index}"
        yield f"{prefix}.input_layernorm.weight", layer.input_norm
        yield f"{prefix}.post_attention_layernorm.weight", layer.post_norm
        attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
        yield from linear(attention, layer.qkv, {"q_proj": queries, "k_proj": keys, "v_proj": keys})
        yield from linear(attention, layer.out, {"o_proj": config.hidden_size})
        if layer.q_norm is not None and layer.k_norm is not None:
            yield f"{attention}.q_norm.weight", layer.q_norm
            yield f"{attention}.k_norm.weight", layer.k_norm
        yield from linear(mlp, layer.gate_up, {"gate_proj": inner, "up_proj": inner})
        yield from linear(mlp, layer.down, {"down_proj": config.hidden_size})
    yield "model.norm.weight", params.norm
    if params.lm_head is not None:
        yield "lm_head.weight", _plain(params.lm_head.weight)


def _plain(weight: Tensor | Packed) -> Tensor:
    return weight.plain() if isinstance(weight, Packed) else weight.detach()


def _hf_config(config: DecoderConfig) -> dict[str, Any]:
    """config.json, in the keys that transformers 4 and 5 both read.

    Raises ConfigError if reading it back would give another decoder.
    """
    rope = config.rope
    found: dict[str, Any] = {
        "architectures": [config.architecture],
        "model_type": _MODEL_TYPES[config.architecture],
        "dtype": str(config.dtype).removeprefix("torch."),
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": rope.theta,
        "attention_bias": config.o_bias,
        "mlp_bias": config.mlp_bias,
        "sliding_window": None,
        "tie_word_embeddings": config.tie_word_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_ids),
    }
    if rope.type == "llama3":
        found["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": rope.factor,
            "low_freq_factor": rope.low_freq_factor,
            "high_freq_factor": rope.high_freq_factor,
            "original_max_position_embeddings": rope.original_max_position,
        }
    again = DecoderConfig.from_hf(found, _generation_config(config), config.dtype)
    for name in DecoderConfig.__dataclass_fields__:
        if getattr(again, name) != getattr(config, name):
            raise ConfigError(
                f"config.json cannot say that {name} is {getattr(config, name)!r} for a {config.architecture}"
            )
    return found


def _generation_config(config: DecoderConfig) -> dict[str, Any]:
    sampling = dict(config.sampling_defaults)
    return {
        "do_sample": any(name != "repetition_penalty" for name in sampling),
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_ids),
        **sampling,
    }
