"""GGUF files load as the transformers model that they were made from, in every supported block format."""

from __future__ import annotations

import importlib.util
import math
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from checkpoints import random_model, state_dict
from gguf_files import tiny_gguf

from folo.errors import LoadError
from folo.model.config import RopeConfig
from folo.model.gguf import GGUFFile, read_metadata
from folo.model.load import load
from folo.model.locate import locate


def assert_loads_as(
    path: Path, expected: dict[str, torch.Tensor], dtype: torch.dtype = torch.float32
) -> None:
    loaded = state_dict(load(path, dtype, use_tqdm=False))
    assert loaded.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(loaded[name], tensor.to(dtype)), name


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_tensors_are_those_that_gguf_dequantises(tmp_path: Path, architecture: str, kind: str) -> None:
    path = tmp_path / "model.gguf"
    expected = tiny_gguf(path, architecture, kind=kind)
    assert all(tensor.isfinite().all() for tensor in expected.values())
    assert_loads_as(path, expected)
    assert_loads_as(path, expected, torch.bfloat16)


def test_float32_file_is_the_transformers_model(tmp_path: Path) -> None:
    tiny_gguf(tmp_path / "model.gguf", hidden_size=64, head_dim=16)
    model = random_model("llama", hidden_size=64, head_dim=16, intermediate_size=256)
    assert_loads_as(tmp_path / "model.gguf", model.state_dict())


def test_biases_are_permuted_with_their_rows(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    expected = tiny_gguf(path, attention_bias=True, mlp_bias=True)
    assert "model.layers.1.self_attn.k_proj.bias" in expected
    assert_loads_as(path, expected)


def test_tensors_larger_than_a_slab(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    assert_loads_as(path, tiny_gguf(path, kind="Q8_0", vocab_size=9000, num_attention_heads=128))


def test_absent_output_means_tied_embeddings(tmp_path: Path) -> None:
    tiny_gguf(tmp_path / "model.gguf", tie_word_embeddings=True)
    params = load(tmp_path / "model.gguf", use_tqdm=False)
    assert params.config.tie_word_embeddings
    assert params.lm_head is None


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_config_comes_from_the_metadata(tmp_path: Path, architecture: str) -> None:
    path = tmp_path / "model.gguf"
    rope = {"rope_theta": 5e5, "rope_type": "default"}
    tiny_gguf(path, architecture, rope_parameters=rope, metadata={"tokenizer.ggml.eot_token_id": 7})
    config = load(path, use_tqdm=False).config
    hf = random_model(architecture).config
    assert [config.architecture] == [type(random_model(architecture)).__name__]
    assert (config.vocab_size, config.hidden_size, config.intermediate_size) == (hf.vocab_size, 256, 256)
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim) == (2, 4, 2, 64)
    assert config.max_position_embeddings == 256
    assert config.rms_norm_eps == pytest.approx(1e-6)
    assert config.rope.theta == 5e5
    assert (config.qkv_bias, config.qk_norm) == (architecture == "qwen2", architecture == "qwen3")
    assert (config.bos_token_id, config.eos_token_ids) == (1, (2, 7))
    assert not config.tie_word_embeddings


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("F32", torch.float32), ("F16", torch.float16), ("BF16", torch.bfloat16), ("Q8_0", torch.bfloat16)],
)
def test_dtype_follows_the_stored_type(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    tiny_gguf(tmp_path / "model.gguf", kind=kind)
    assert load(tmp_path / "model.gguf", use_tqdm=False).dtype == dtype


def test_rope_factors_divide_the_frequencies(tmp_path: Path) -> None:
    factors = np.linspace(1, 8, 32, dtype=np.float32)
    tiny_gguf(tmp_path / "plain.gguf")
    tiny_gguf(tmp_path / "scaled.gguf", tensors={"rope_freqs.weight": factors})
    plain = load(tmp_path / "plain.gguf", use_tqdm=False).config.inv_freq()
    scaled = load(tmp_path / "scaled.gguf", use_tqdm=False).config.inv_freq()
    assert torch.equal(scaled, plain / torch.from_numpy(factors))
    tiny_gguf(tmp_path / "wrong.gguf", tensors={"rope_freqs.weight": factors[:8]})
    with pytest.raises(LoadError, match=r"rope_freqs.weight has shape \(8,\), not \(32,\)"):
        load(tmp_path / "wrong.gguf", use_tqdm=False)
    for factor in (0, math.nan, math.inf):
        factors[5] = factor
        tiny_gguf(tmp_path / "wrong.gguf", tensors={"rope_freqs.weight": factors})
        with pytest.raises(LoadError, match=r"rope_freqs\.weight has to be finite"):
            load(tmp_path / "wrong.gguf", use_tqdm=False)


@pytest.mark.parametrize(
    "scaling",
    [
        {"factor": 0.0},
        {"factor": 1.0, "attn_factor": 1.0},
        {"type": "linear", "factor": 1.0},
        {"type": "none", "factor": 4.0},
    ],
    ids=str,
)
def test_rope_scaling_without_effect_in_llama_cpp_is_accepted(
    tmp_path: Path, scaling: dict[str, Any]
) -> None:
    metadata = {f"llama.rope.scaling.{key}": value for key, value in scaling.items()}
    tiny_gguf(tmp_path / "model.gguf", metadata=metadata)
    assert load(tmp_path / "model.gguf", use_tqdm=False).config.rope == RopeConfig(theta=10000.0)


@pytest.fixture
def plain_arrays(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library makes an array of every string, and as a part of a mapped file each takes twice as long."""
    monkeypatch.setattr(np, "memmap", lambda path, mode, dtype=np.uint8: np.fromfile(path, dtype))


@pytest.mark.usefixtures("plain_arrays")
def test_header_holds_what_the_gguf_library_reads() -> None:
    path = locate(None)
    metadata, reader = read_metadata(path), gguf.GGUFReader(path)
    assert (
        metadata.items()
        == {
            name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")
        }.items()
    )
    shapes = {tensor.name: tuple(reversed(tensor.shape.tolist())) for tensor in reader.tensors}
    assert GGUFFile(path).shapes == shapes


def test_default_model_is_smollm2() -> None:
    params = load(use_tqdm=False)
    config = params.config
    assert (config.hidden_size, config.num_layers, config.vocab_size) == (576, 30, 49152)
    assert (config.num_heads, config.num_kv_heads, config.rope.theta) == (9, 3, 1e5)
    assert (config.eos_token_ids, config.tie_word_embeddings, params.dtype) == ((2,), True, torch.bfloat16)


@pytest.mark.skipif(not importlib.util.find_spec("accelerate"), reason="transformers needs it to read GGUF")
@pytest.mark.usefixtures("plain_arrays")
def test_default_model_has_the_tensors_that_transformers_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    # transformers asks for it once for each of its modules, 400 in all
    monkeypatch.setattr(gguf, "get_tensor_name_map", cache(gguf.get_tensor_name_map))
    path = locate(None)
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    expected = model.state_dict()
    del expected["lm_head.weight"]
    assert_loads_as(path, expected)
