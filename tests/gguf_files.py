"""Small random `.gguf` files, written with the gguf library, for tests to load and compare with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from checkpoints import SPECIAL_TOKENS, random_model, tiny_tokenizer
from torch import Tensor


def tiny_gguf(
    path: Path,
    architecture: str = "llama",
    *,
    kind: str = "F32",
    tokenizer: bool = False,
    metadata: dict[str, Any] | None = None,
    tensors: dict[str, np.ndarray] | None = None,
    **overrides: Any,
) -> dict[str, Tensor]:
    """Write a random `.gguf` file as llama.cpp's converter does, and return its state dict in float32.

    The model of `tiny_checkpoint`, with hidden size 256 and 256 inner, so that every block format fits.

    Args:
        architecture: "llama", "qwen2" or "qwen3".
        kind: the type of the matrices; vectors are F32. What is returned has been dequantised by `gguf`.
        tokenizer: write `tiny_tokenizer()` as a "gpt-2" one.
        metadata: keys to add or replace; a value of None takes the key out.
        tensors: float32 tensors to add, by llama.cpp's name.
        **overrides: keys of the transformers configuration class.
    """
    sizes = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64}
    model = random_model(architecture, **sizes | overrides)
    config = model.config
    values = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": config.rope_parameters["rope_theta"],
        "rope.dimension_count": config.head_dim,
    }
    keys = {f"{architecture}.{key}": value for key, value in values.items()}
    keys |= {"tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2}
    if tokenizer:
        keys |= _tokenizer_metadata()
    keys |= metadata or {}
    writer = gguf.GGUFWriter(path, keys.pop("general.architecture", architecture))
    for key, value in keys.items():
        _ADD[type(value)](writer, key, value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], config.num_hidden_layers)
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    expected: dict[str, Tensor] = {}
    for name, tensor in state.items():
        quantisation = gguf.GGMLQuantizationType[kind if tensor.ndim > 1 else "F32"]
        stored = _quantise(tensor, quantisation)
        expected[name] = torch.from_numpy(np.array(gguf.dequantize(stored, quantisation)))
        projection = name.split(".")[-2]
        if architecture == "llama" and projection in heads:
            stored = _interleave_halves(stored, heads[projection])
        gguf_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert gguf_name is not None
        writer.add_tensor(gguf_name, stored, raw_dtype=quantisation)
    for name, tensor in (tensors or {}).items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


_ADD: dict[type, Any] = {
    bool: gguf.GGUFWriter.add_bool,
    int: gguf.GGUFWriter.add_uint32,
    float: gguf.GGUFWriter.add_float32,
    str: gguf.GGUFWriter.add_string,
    list: gguf.GGUFWriter.add_array,
    type(None): lambda writer, key, value: None,
}


def _quantise(tensor: np.ndarray, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    """`[N, K]` to its blocks, uint8 `[N, bytes]`. `gguf` cannot make K-quants, so those are random blocks."""
    if kind.name not in ("Q4_K", "Q6_K"):
        return gguf.quantize(tensor, kind)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = np.random.default_rng(tensor.size).integers(0, 256, (tensor.size // block, size), dtype=np.uint8)
    scales = slice(0, 4) if kind.name == "Q4_K" else slice(size - 2, size)
    count = (scales.stop - scales.start) // 2
    blocks[:, scales] = np.full((len(blocks), count), 0.01, dtype=np.float16).view(np.uint8)
    return blocks.reshape(len(tensor), -1)


def _interleave_halves(rows: np.ndarray, heads: int) -> np.ndarray:
    """`LlamaModel.permute` of llama.cpp's convert_hf_to_gguf.py."""
    halves = rows.reshape(heads, 2, len(rows) // heads // 2, *rows.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows.shape)


def _tokenizer_metadata() -> dict[str, Any]:
    tokenizer = tiny_tokenizer()
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in SPECIAL_TOKENS else 1 for token in tokens],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in model["merges"]],
        "tokenizer.chat_template": tokenizer.chat_template,
    }
