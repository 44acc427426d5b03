"""`export`: what it writes is what transformers would have written, and reads back as the same parameters."""

from __future__ import annotations

import os
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import ARCHITECTURES, tiny_checkpoint
from safetensors import SafetensorError
from torch.utils import _pytree as pytree
from transformers import AutoModelForCausalLM

import folo
from folo.bench.peers import llamacpp_peer
from folo.model.export import export, named_tensors

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize(
    ("architecture", "overrides"),
    [
        *((name, {}) for name in ARCHITECTURES),
        ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
        ("llama", {"rope_parameters": LLAMA3}),
    ],
)
def test_transformers_loads_the_same_model(
    architecture: str, overrides: dict[str, Any], pack: bool, tmp_path: Path
) -> None:
    generation = {"temperature": 0.7, "top_k": 20, "eos_token_id": [2, 7], "max_new_tokens": 9}
    model = tiny_checkpoint(tmp_path / "a", architecture, generation=generation, **overrides)
    params = folo.load(tmp_path / "a", pack=pack, use_tqdm=False)
    export(params, tmp_path / "b")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "b").eval()
    expected = model.state_dict()
    assert again.state_dict().keys() == expected.keys()
    for name, weight in again.state_dict().items():
        assert torch.equal(weight, expected[name]), name
    ids = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
    back = folo.load(tmp_path / "b", use_tqdm=False)
    assert back.config == params.config
    assert back.fingerprint == params.fingerprint


def test_half_dtypes_are_kept(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path / "a", dtype=torch.bfloat16)
    params = folo.load(tmp_path / "a", use_tqdm=False)
    export(params, tmp_path / "b")
    back = folo.load(tmp_path / "b", use_tqdm=False)
    assert back.dtype == torch.bfloat16
    assert back.fingerprint == params.fingerprint


def test_weights_that_were_mapped_to_another_dtype_come_back_in_it(tmp_path: Path) -> None:
    """As those of a training, which keeps them in float32."""
    tiny_checkpoint(tmp_path / "a", dtype=torch.bfloat16)
    loaded = folo.load(tmp_path / "a", pack=False, use_tqdm=False)
    params = pytree.tree_map(lambda weight: weight.float() * 1.001, loaded)
    export(params, tmp_path / "b")
    back = folo.load(tmp_path / "b", use_tqdm=False)
    assert back.dtype == torch.float32
    assert back.fingerprint == params.fingerprint


def test_whoever_may_read_the_configuration_may_read_the_weights(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path / "a")
    params = folo.load(tmp_path / "a", use_tqdm=False)
    before = os.umask(0o027)
    try:
        export(params, tmp_path / "b")
        folo.save(folo.init(params, folo.CacheConfig(num_blocks=8)), tmp_path / "b" / "state.folo")
    finally:
        os.umask(before)
    modes = {file.name: stat.filemode(file.stat().st_mode) for file in (tmp_path / "b").iterdir()}
    assert modes.keys() == {"config.json", "generation_config.json", "model.safetensors", "state.folo"}
    assert set(modes.values()) == {"-rw-r-----"}


def test_a_disk_that_is_full_is_an_os_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise SafetensorError("I/O error: No space left on device")

    tiny_checkpoint(tmp_path / "a")
    params = folo.load(tmp_path / "a", use_tqdm=False)
    monkeypatch.setattr("folo.files.save_file", fail)
    with pytest.raises(OSError, match=r"model\.safetensors cannot be written: I/O error: No space"):
        export(params, tmp_path / "b")
    assert not (tmp_path / "b" / "config.json").exists()


def test_what_config_json_cannot_say_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path / "a")
    params = folo.load(tmp_path / "a", use_tqdm=False)
    odd = replace(params, config=replace(params.config, qk_norm=True))
    with pytest.raises(folo.ConfigError, match="qk_norm is True for a LlamaForCausalLM"):
        export(odd, tmp_path / "b")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_gguf_for_llama_cpp_holds_the_same_weights(tmp_path: Path, dtype: torch.dtype) -> None:
    """llama.cpp's conventions, as folo's own reader of GGUF files knows them."""
    tiny_checkpoint(tmp_path / "a", dtype=dtype)
    params = folo.load(tmp_path / "a", use_tqdm=False)
    export(params, tmp_path / "b")
    name = str(dtype).removeprefix("torch.")
    back = folo.load(llamacpp_peer.converted(str(tmp_path / "b"), name), use_tqdm=False)
    assert back.dtype == dtype
    expected = dict(named_tensors(params))
    for name, weight in named_tensors(back):
        assert torch.equal(weight, expected.pop(name)), name
    assert not expected
