"""From `Params` to files: the directory that transformers' `save_pretrained` would write."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from folo.errors import ConfigError
from folo.files import write_tensors
from folo.model import gptq
from folo.model.config import GREEDY_DEFAULTS, SAMPLING_DEFAULTS, DecoderConfig
from folo.model.load import tensor_shapes
from folo.model.params import LINEARS, NORMS, Linear, Params
from folo.ops.packed import Packed
from folo.ops.quantized import Grouped, Quantized
from folo.ops.stacked import Stacked, Weight


def export(params: Params, path: str | os.PathLike[str]) -> None:
    """Write config.json, generation_config.json and model.safetensors into the directory `path`.

    It is made if it is not there. The weights are written as they are, quantised ones in AutoGPTQ's format
    "gptq": `folo.load` on the directory gives parameters of the same fingerprint. The tokenizer is not part
    of `params`: `folo.load_tokenizer(model).save_pretrained(path)` adds it.

    Raises:
        ConfigError: config.json cannot express this decoder, or layers that are quantised in more than one
            way; nothing is written.
        OSError: the files cannot be written.
    """
    decoder = params.described
    config, generation = _hf_config(decoder), _generation_config(decoder)
    if params.quantized:
        config["quantization_config"] = _quantization_config(params)
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    write_tensors(dict(named_tensors(params)), path / "model.safetensors", {"format": "pt"})
    # config.json last: before it stands there, nothing takes the directory for a checkpoint.
    for name, content in (("generation_config.json", generation), ("config.json", config)):
        (path / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def named_tensors(params: Params) -> Iterator[tuple[str, Tensor]]:
    """Every weight in plain layout and contiguous, by its name in transformers' state dict.

    Quantised ones by the names of `folo.model.gptq`. Copies where the layout differs, one at a time.
    """
    yield "model.embed_tokens.weight", _plain(params.embed)
    for index, layer in enumerate(params.layers):
        for field, module in NORMS.items():
            if (norm := getattr(layer, field)) is not None:
                yield f"model.layers.{index}.{module}.weight", norm
    yield "model.norm.weight", params.norm
    for names, linear in _linears(params):
        heights = list(names.values())
        for name, weight in zip(names, _split(linear.weight, heights), strict=True):
            if isinstance(weight, Grouped):
                yield from ((f"{name}.{kind}", tensor) for kind, tensor in gptq.tensors(weight))
            else:
                yield f"{name}.weight", weight.contiguous()
        if linear.bias is not None:
            for name, bias in zip(names, linear.bias.detach().split(heights), strict=True):
                yield f"{name}.bias", bias.contiguous()


def _linears(params: Params) -> Iterator[tuple[dict[str, int], Linear]]:
    """Every linear layer, with the modules that it is made of in transformers, and the outputs of each."""
    shapes = tensor_shapes(params.config)

    def outputs(modules: Iterable[str]) -> dict[str, int]:
        return {module: shapes[f"{module}.weight"][0] for module in modules}

    for index, layer in enumerate(params.layers):
        for field, modules in LINEARS.items():
            yield outputs(f"model.layers.{index}.{module}" for module in modules), getattr(layer, field)
    if params.lm_head is not None:
        yield outputs(["lm_head"]), params.lm_head


def _split(weight: Weight, heights: list[int]) -> Iterator[Tensor | Grouped]:
    if isinstance(weight, Stacked):
        for part in weight.parts:
            yield from _split(part, [part.shape[0]])
    elif isinstance(weight, Quantized):
        yield from weight.grouped().split(heights)
    else:
        yield from _plain(weight).split(heights)


def _plain(weight: Tensor | Packed) -> Tensor:
    return weight.plain() if isinstance(weight, Packed) else weight.detach()


def _quantization_config(params: Params) -> dict[str, Any]:
    """Its value in config.json. Raises ConfigError if it would not be the same for all quantised layers."""
    split = (_split(linear.weight, list(names.values())) for names, linear in _linears(params))
    found = gptq.described([part for parts in split for part in parts if isinstance(part, Grouped)])
    if found is None:
        raise ConfigError("the layers are quantised in more than one way: the format has one for all")
    return found | {"lm_head": params.lm_head is not None and isinstance(params.lm_head.weight, Quantized)}


def _hf_config(config: DecoderConfig) -> dict[str, Any]:
    """config.json, in the keys that transformers 4 and 5 both read.

    Raises ConfigError if reading it back would give another decoder.
    """
    rope = config.rope
    found: dict[str, Any] = {
        "architectures": [config.architecture],
        "model_type": config.architecture.removesuffix("ForCausalLM").lower(),
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
        "do_sample": any(name not in GREEDY_DEFAULTS.values() for name in sampling),
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_ids),
        **{key: sampling[name] for key, name in SAMPLING_DEFAULTS.items() if name in sampling},
    }
