"""Loading a transformers directory gives transformers' tensors, configuration and rotary frequencies."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import ARCHITECTURES, plain, state_dict, tiny_checkpoint
from gguf_files import tiny_gguf
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from folo.errors import ConfigError, LoadError
from folo.model.config import CLASS_DEFAULTS, DecoderConfig, RopeConfig
from folo.model.load import load

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
REQUIRED: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def read(generation: dict[str, Any] | None = None, **changes: Any) -> DecoderConfig:
    return DecoderConfig.from_hf(REQUIRED | changes, generation, torch.float32)


def assert_loads_the_same(path: Path, expected: dict[str, torch.Tensor], **options: Any) -> None:
    loaded = state_dict(load(path, use_tqdm=False, **options))
    assert loaded.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(loaded[name], tensor), name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_are_those_of_transformers(tmp_path: Path, architecture: str, dtype: torch.dtype) -> None:
    model = tiny_checkpoint(tmp_path, architecture, dtype=dtype)
    assert_loads_the_same(tmp_path, {name: t.to(dtype) for name, t in model.state_dict().items()})


@pytest.mark.parametrize(
    "overrides",
    [
        {"attention_bias": True, "mlp_bias": True},
        {"num_key_value_heads": 4},
        {"num_attention_heads": 6, "num_key_value_heads": 2, "hidden_size": 96},
        {"num_key_value_heads": 1},
        {"head_dim": 8},
    ],
    ids=str,
)
def test_biases_and_head_layouts(tmp_path: Path, overrides: dict[str, Any]) -> None:
    assert_loads_the_same(tmp_path, tiny_checkpoint(tmp_path, "llama", **overrides).state_dict())


def test_tied_embeddings_have_no_head(tmp_path: Path) -> None:
    model = tiny_checkpoint(tmp_path, tie_word_embeddings=True)
    params = load(tmp_path, use_tqdm=False)
    assert params.lm_head is None
    assert torch.equal(plain(params.embed), model.state_dict()["lm_head.weight"])


def test_shards_load_as_one(tmp_path: Path) -> None:
    model = tiny_checkpoint(tmp_path, "qwen3", max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert_loads_the_same(tmp_path, model.state_dict())


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ("auto", torch.bfloat16),
        ("float32", torch.float32),
        ("float16", torch.float16),
        (torch.float64, torch.float64),
    ],
)
def test_dtype_is_converted(tmp_path: Path, asked: str | torch.dtype, expected: torch.dtype) -> None:
    model = tiny_checkpoint(tmp_path, dtype=torch.bfloat16)
    assert load(tmp_path, asked, use_tqdm=False).config.dtype == expected
    assert_loads_the_same(tmp_path, {n: t.to(expected) for n, t in model.state_dict().items()}, dtype=asked)


def test_dtype_of_an_older_config(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path, dtype=torch.float16)
    config = json.loads((tmp_path / "config.json").read_text())
    config["torch_dtype"] = config.pop("dtype")
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load(tmp_path, use_tqdm=False).dtype == torch.float16
    del config["torch_dtype"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load(tmp_path, use_tqdm=False).dtype == torch.float16, "that of the weights"


def test_stored_tensors_without_a_use_are_ignored(tmp_path: Path) -> None:
    model = tiny_checkpoint(tmp_path, tie_word_embeddings=True)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(tensors, tmp_path / "model.safetensors")
    assert load(tmp_path, use_tqdm=False).lm_head is None


@pytest.mark.parametrize("max_shard_size", ["1GB", "100KB"])
@pytest.mark.parametrize("change", [lambda t: t[:-1], lambda t: t + t.eq(t[-1, -1])], ids=["shape", "value"])
def test_a_stored_head_of_its_own_is_not_dropped(
    tmp_path: Path, max_shard_size: str, change: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    """transformers takes it, though tie_word_embeddings is true."""
    model = tiny_checkpoint(tmp_path, max_shard_size=max_shard_size, vocab_size=20_000)
    head, embed = "lm_head.weight", "model.embed_tokens.weight"
    config = json.loads((tmp_path / "config.json").read_text()) | {"tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    file = next(file for file in tmp_path.glob("*.safetensors") if head in load_file(file))
    equal = model.state_dict()[embed]
    save_file(load_file(file) | {head: equal.clone()}, file)
    assert load(tmp_path, use_tqdm=False).lm_head is None
    save_file(load_file(file) | {head: change(equal).contiguous()}, file)
    with pytest.raises(
        LoadError, match=f"tie_word_embeddings is true, but {head} differs from {embed}: set it"
    ):
        load(tmp_path, use_tqdm=False)


@pytest.mark.parametrize("dtype", ["int8", "float", torch.int64, torch.float8_e4m3fn])
def test_dtype_that_is_none(tmp_path: Path, dtype: str | torch.dtype) -> None:
    tiny_checkpoint(tmp_path)
    with pytest.raises(ConfigError, match="dtype is"):
        load(tmp_path, dtype, use_tqdm=False)


@pytest.mark.parametrize("name", ["", "model.gguf"])
def test_the_callers_default_device_has_no_say(tmp_path: Path, name: str) -> None:
    if name:
        tiny_gguf(tmp_path / name)
    else:
        tiny_checkpoint(tmp_path)
    expected = load(tmp_path / name, use_tqdm=False)
    with torch.device("meta"):
        params = load(tmp_path / name, device="cpu", use_tqdm=False)
        assert torch.equal(params.inv_freq, expected.inv_freq)
        assert params.fingerprint == expected.fingerprint


@pytest.mark.parametrize("device", ["abacus", "xpu", "meta", None])
def test_device_that_is_none(tmp_path: Path, device: Any) -> None:
    tiny_checkpoint(tmp_path)
    with pytest.raises(ConfigError, match=f"device is {device!r}"):
        load(tmp_path, device=device, use_tqdm=False)
    assert load(tmp_path, device="cpu", use_tqdm=False).device.type == "cpu"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_config_is_that_of_transformers(tmp_path: Path, architecture: str) -> None:
    model = tiny_checkpoint(
        tmp_path, architecture, rope_parameters={"rope_theta": 5e5, "rope_type": "default"}
    )
    config, hf = load(tmp_path, use_tqdm=False).config, model.config
    assert [config.architecture] == hf.architectures
    assert config.vocab_size == hf.vocab_size
    assert config.num_layers == hf.num_hidden_layers
    assert (config.num_heads, config.num_kv_heads) == (hf.num_attention_heads, hf.num_key_value_heads)
    assert config.head_dim == getattr(hf, "head_dim", 16)
    assert config.max_position_embeddings == hf.max_position_embeddings
    assert config.rms_norm_eps == hf.rms_norm_eps
    assert config.rope == RopeConfig(theta=5e5)
    assert (config.qkv_bias, config.qk_norm) == (architecture == "qwen2", architecture == "qwen3")
    assert (config.bos_token_id, config.eos_token_ids) == (1, (2,))


@pytest.mark.parametrize("name", CLASS_DEFAULTS)
def test_absent_keys_have_the_defaults_of_transformers(name: str) -> None:
    import transformers

    required = {key: value for key, value in REQUIRED.items() if key != "architectures"} | {
        "num_attention_heads": 32,
        "hidden_size": 2048,
    }
    hf = getattr(transformers, name.replace("ForCausalLM", "Config"))(**required)
    window = {"sliding_window": None} if name == "MistralForCausalLM" else {}
    ours = DecoderConfig.from_hf({"architectures": [name]} | required | window, None, torch.float32)
    assert ours.num_kv_heads == hf.num_key_value_heads
    assert ours.head_dim == getattr(hf, "head_dim", 64)
    assert ours.max_position_embeddings == hf.max_position_embeddings
    assert ours.rms_norm_eps == hf.rms_norm_eps
    assert ours.rope.theta == hf.rope_parameters["rope_theta"]
    assert ours.tie_word_embeddings == hf.tie_word_embeddings
    assert ours.bos_token_id == hf.bos_token_id
    assert ours.eos_token_ids == (() if hf.eos_token_id is None else (hf.eos_token_id,))


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 10000.0, "rope_type": "default"},
        {"rope_theta": 500000.0, "rope_type": "default"},
        {"rope_theta": 500000.0, **LLAMA3},
        {"rope_theta": 500000.0, **LLAMA3, "factor": 32.0, "original_max_position_embeddings": 8192},
    ],
    ids=str,
)
@pytest.mark.parametrize("head_dim", [16, 64, 128])
def test_inv_freq_has_the_bits_of_transformers(rope: dict[str, Any], head_dim: int) -> None:
    hf = LlamaConfig(head_dim=head_dim, rope_parameters=dict(rope))
    ours = read(head_dim=head_dim, rope_parameters=rope).inv_freq()
    theirs = LlamaRotaryEmbedding(hf).inv_freq
    assert isinstance(theirs, torch.Tensor)
    assert ours.dtype == torch.float32
    assert torch.equal(ours, theirs)


def test_rope_of_older_and_newer_configs_is_the_same() -> None:
    newer = read(rope_parameters={"rope_theta": 5e5, **LLAMA3})
    older = read(rope_theta=5e5, rope_scaling=LLAMA3)
    oldest = read(
        rope_theta=5e5, rope_scaling={("type" if k == "rope_type" else k): v for k, v in LLAMA3.items()}
    )
    assert newer == older == oldest
    assert newer.rope == RopeConfig("llama3", 5e5, 8.0, 1.0, 4.0, 64)
    assert read(rope_theta=5e5, rope_scaling=None).rope == RopeConfig(theta=5e5)


def test_eos_ids_of_both_configs_are_joined() -> None:
    assert read({"eos_token_id": [7, 5]}, eos_token_id=[5, 9]).eos_token_ids == (7, 5, 9)
    assert read({"eos_token_id": 7}, eos_token_id=9).eos_token_ids == (7, 9)
    assert read({"eos_token_id": 7}).eos_token_ids == (7,), "the class default is not added to what is said"
    assert read(eos_token_id=None).eos_token_ids == ()


def test_sampling_defaults_come_from_the_generation_config() -> None:
    generation = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": None, "max_length": 4}
    assert read(generation).sampling_defaults == (("temperature", 0.6), ("top_p", 0.9))
    greedy = {"do_sample": False, "temperature": 0.6, "repetition_penalty": 1.1}
    assert read(greedy).sampling_defaults == (("repetition_penalty", 1.1),)
    assert read().sampling_defaults == ()
    assert read({"temperature": 0.6}).sampling_defaults == (("temperature", 0.6),)
    for sample in (True, False):
        generation = {"do_sample": sample, "max_new_tokens": 2048}
        assert read(generation).sampling_defaults == (("max_tokens", 2048),)
    with pytest.raises(LoadError, match="do_sample is 'false': it must be a bool"):
        read({"do_sample": "false", "temperature": 0.6})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel. Supported: LlamaForCausalLM, Mistral"),
        ({"architectures": None}, "none named"),
        ({"vocab_size": None}, "required key 'vocab_size'"),
        ({"num_attention_heads": "4"}, "num_attention_heads is '4'"),
        ({"num_attention_heads": 4, "num_key_value_heads": 3}, "4 attention heads cannot share 3 KV heads"),
        ({"head_dim": 15}, "head_dim is 15"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps is 'small'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false': it must be a bool"),
        ({"attention_bias": "false"}, "attention_bias is 'false'"),
        ({"mlp_bias": 0.0}, "mlp_bias is 0.0"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "Rope type 'linear'"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "Rope type 'yarn'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "required key 'low_freq_factor'"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "differ between layers"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "Sliding window"),
        ({"layer_types": ["full_attention", "chunked_attention"]}, r"layer_types is .*'chunked_attention'\]"),
        ({"layer_types": ["full_attention"]}, "'full_attention' for each of 2 layers"),
        ({"layer_types": [None, None]}, r"layer_types is \[None, None\]"),
        ({"architectures": ["MistralForCausalLM"]}, r"Sliding window attention \(sliding_window 4096\)"),
        ({"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True}, "sliding_window 4096"),
    ],
    ids=str,
)
def test_unsupported_configs_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(LoadError, match=message):
        read(**changes)


def test_sliding_window_without_effect_is_accepted() -> None:
    mistral = {"architectures": ["MistralForCausalLM"], "num_key_value_heads": 2}
    assert read(**mistral, sliding_window=4096, max_position_embeddings=4096).num_kv_heads == 2
    qwen = {"architectures": ["Qwen2ForCausalLM"], "num_key_value_heads": 2}
    assert read(**qwen, sliding_window=16, use_sliding_window=False).qkv_bias
    assert read(**qwen, sliding_window=None, use_sliding_window=True).qkv_bias
    assert read(**qwen, layer_types=["full_attention"] * 2).qkv_bias


_MEASURE = """
import sys, threading, time, torch
from folo.model.load import load
import gguf

def resident():
    lines = open("/proc/self/status").read().splitlines()
    sizes = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith(("RssAnon", "VmHWM"))}
    return int(sizes["RssAnon"]) * 1024, int(sizes["VmHWM"]) * 1024

def watch():
    global peak
    while not done:
        peak = max(peak, resident()[0])
        time.sleep(0.002)

anon, high = resident()
peak, done = anon, False
thread = threading.Thread(target=watch)
thread.start()
params = load(sys.argv[1], sys.argv[2], use_tqdm=False)
done = True
thread.join()
tensors = [t for t in torch.utils._pytree.tree_leaves(params) if t is not None]
print(sum(t.nbytes for t in tensors), peak - anon, resident()[1] - high)
"""


def peak_of_loading(path: Path, dtype: str) -> tuple[int, int, int]:
    """Bytes of the parameters, and by how much loading them raised RssAnon, and VmHWM (file pages too)."""
    command = [sys.executable, "-c", _MEASURE, str(path), dtype]
    size, anon, resident = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return int(size), int(anon), int(resident)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_loading_holds_little_beside_the_parameters(tmp_path: Path) -> None:
    tiny_checkpoint(
        tmp_path,
        dtype=torch.bfloat16,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=4,
        num_attention_heads=16,
        vocab_size=80000,
    )
    for dtype in ("bfloat16", "float16"):  # as stored, and converted
        size, anon, resident = peak_of_loading(tmp_path, dtype)
        assert size > 250e6
        assert anon <= 1.3 * size + 64e6
        assert resident <= 1.3 * size + 64e6, "pages of the mapped file count too"
