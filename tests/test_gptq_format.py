"""GPTQ checkpoints of an independent packer are loaded as what they stand for, and written again."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import tiny_checkpoint
from gptq_files import Style, gptq_checkpoint, pack_words, random_layer, set_config, weight_of
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file as load_numpy
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM

import folo
from folo import cli, ops
from folo.model.export import export
from folo.ops.packed import Packed
from folo.ops.quantized import BITS, Grouped, Quantized, quantized
from folo.ops.stacked import Stacked, Weight

STYLES = [Style(*values) for values in product(BITS, (32, 48, -1), (False, True), (False, True), (1, 2))]
IDS = torch.arange(3, 43)


def load(path: Path, **options: Any) -> folo.Params:
    return folo.load(path, use_tqdm=False, **options)


def plain(weight: Weight) -> Tensor:
    """Float64 `[N, K]`."""
    if isinstance(weight, Stacked):
        return torch.cat([plain(part) for part in weight.parts])
    if isinstance(weight, Quantized):
        return weight.plain(torch.float64)
    return (weight.plain() if isinstance(weight, Packed) else weight).double()


def check_weights(params: folo.Params, exact: dict[str, Tensor]) -> None:
    for index, layer in enumerate(params.layers):
        for linear, names in (
            (layer.qkv, ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            (layer.out, ("self_attn.o_proj",)),
            (layer.gate_up, ("mlp.gate_proj", "mlp.up_proj")),
            (layer.down, ("mlp.down_proj",)),
        ):
            expected = torch.cat([exact[f"model.layers.{index}.{name}.weight"] for name in names])
            assert torch.equal(plain(linear.weight), expected), names
    if params.lm_head is not None:
        assert torch.equal(plain(params.lm_head.weight), exact["lm_head.weight"])


def check_logits(params: folo.Params, path: Path, exact: dict[str, Tensor]) -> None:
    """Those of transformers, with the weights that the codes stand for, in float64."""
    config = AutoConfig.from_pretrained(path)
    delattr(config, "quantization_config")
    model = AutoModelForCausalLM.from_config(config).double().eval()
    model.load_state_dict(exact)
    with torch.no_grad():
        expected = model(IDS[None]).logits[0]
    got = folo.model.forward(params, IDS)
    assert float((got.double() - expected).abs().max() / expected.abs().max()) < 1e-5


@pytest.mark.parametrize("style", STYLES, ids=str)
def test_a_checkpoint_is_what_its_words_say(style: Style, tmp_path: Path) -> None:
    exact = gptq_checkpoint(tmp_path, style)
    params = load(tmp_path)
    check_weights(params, exact)
    assert params.quantized
    assert all(isinstance(layer.qkv.weight, Quantized) for layer in params.layers)
    assert params.num_parameters == sum(weight.numel() for weight in exact.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_has_no_say(dtype: torch.dtype, tmp_path: Path) -> None:
    exact = gptq_checkpoint(tmp_path)
    with torch.autocast("cpu", dtype):
        params = load(tmp_path)
    check_weights(params, exact)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("desc_act", [False, True])
def test_logits_are_those_of_the_dequantised_model(architecture: str, desc_act: bool, tmp_path: Path) -> None:
    exact = gptq_checkpoint(tmp_path, Style(desc_act=desc_act), architecture=architecture)
    check_logits(load(tmp_path), tmp_path, exact)


@pytest.mark.parametrize("style", STYLES[::5], ids=str)
def test_written_and_read_again_nothing_has_changed(style: Style, tmp_path: Path) -> None:
    exact = gptq_checkpoint(tmp_path / "a", style, lm_head=True, vocab_size=304)
    params = load(tmp_path / "a")
    export(params, tmp_path / "b")
    back = load(tmp_path / "b")
    check_weights(back, exact)
    assert back.fingerprint == params.fingerprint
    export(back, tmp_path / "c")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "b" / name).read_bytes() == (tmp_path / "c" / name).read_bytes()
    found = json.loads((tmp_path / "b" / "config.json").read_text())["quantization_config"]
    assert found["checkpoint_format"] == "gptq"
    for key in ("bits", "group_size", "sym", "lm_head"):
        assert found[key] == (style.config | {"lm_head": True})[key]
    if style.group_size != -1:
        assert found["desc_act"] == style.desc_act


@pytest.mark.parametrize("style", [Style(), Style(bits=8, group_size=48, desc_act=True)], ids=str)
def test_what_is_written_is_in_the_format(style: Style, tmp_path: Path) -> None:
    """Read by numpy, from the format's description."""
    exact = gptq_checkpoint(tmp_path / "a", style)
    export(load(tmp_path / "a"), tmp_path / "b")
    tensors = load_numpy(tmp_path / "b" / "model.safetensors")
    modules = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
    assert len(modules) == 2 * 7
    for module in modules:
        found = weight_of(tensors, module, style.bits)
        assert torch.equal(torch.from_numpy(found), exact[f"{module}.weight"]), module
        assert tensors[f"{module}.scales"].dtype == np.float16
        assert tensors[f"{module}.g_idx"].dtype == tensors[f"{module}.qweight"].dtype == np.int32


def test_the_fingerprint_is_of_every_part(tmp_path: Path) -> None:
    gptq_checkpoint(tmp_path, Style(desc_act=True))
    before = load(tmp_path).fingerprint
    assert load(tmp_path).fingerprint == before
    tensors = load_file(tmp_path / "model.safetensors")
    for kind in ("qweight", "qzeros", "scales"):
        name = f"model.layers.1.mlp.down_proj.{kind}"
        changed = tensors[name].clone()
        changed.view(torch.int16 if kind == "scales" else torch.int32)[0, 0] ^= 1
        save_file(tensors | {name: changed}, tmp_path / "model.safetensors")
        assert load(tmp_path).fingerprint != before


class TestWhatIsQuantised:
    def test_layers_that_are_stored_dense_stay_dense(self, tmp_path: Path) -> None:
        exact = gptq_checkpoint(tmp_path, Style(), skip=("layers.0.self_attn.k_proj", "layers.1.mlp"))
        params = load(tmp_path)
        check_weights(params, exact)
        mixed = params.layers[0].qkv.weight
        assert isinstance(mixed, Stacked)
        assert [isinstance(part, Quantized) for part in mixed.parts] == [True, False, True]
        assert not isinstance(params.layers[1].down.weight, Quantized)
        check_logits(params, tmp_path, exact)
        export(params, tmp_path / "b")
        assert load(tmp_path / "b").fingerprint == params.fingerprint

    def test_lm_head(self, tmp_path: Path) -> None:
        exact = gptq_checkpoint(tmp_path, Style(bits=8), lm_head=True, vocab_size=304)
        params = load(tmp_path)
        assert params.lm_head is not None
        assert isinstance(params.lm_head.weight, Quantized)
        check_weights(params, exact)
        check_logits(params, tmp_path, exact)

    def test_lm_head_of_a_tied_model(self, tmp_path: Path) -> None:
        gptq_checkpoint(tmp_path, Style(), vocab_size=304, tie_word_embeddings=True)
        layer, weight = random_layer(304, 64, Style(), 9)
        tensors = load_file(tmp_path / "model.safetensors")
        tensors |= {f"lm_head.{kind}": torch.from_numpy(tensor) for kind, tensor in layer.items()}
        save_file(tensors, tmp_path / "model.safetensors")
        params = load(tmp_path)
        assert params.lm_head is not None
        assert torch.equal(plain(params.lm_head.weight), torch.from_numpy(weight))

    def test_projections_of_one_input_may_have_orders_of_their_own(self, tmp_path: Path) -> None:
        style = Style(desc_act=True)
        exact = gptq_checkpoint(tmp_path, style)
        layer, weight = random_layer(32, 64, style, 99)
        module, tensors = "model.layers.1.self_attn.v_proj", load_file(tmp_path / "model.safetensors")
        tensors |= {f"{module}.{kind}": torch.from_numpy(tensor) for kind, tensor in layer.items()}
        save_file(tensors, tmp_path / "model.safetensors")
        exact[f"{module}.weight"] = torch.from_numpy(weight)
        params = load(tmp_path)
        assert isinstance(params.layers[0].qkv.weight, Quantized)
        assert isinstance(params.layers[1].qkv.weight, Stacked)
        check_weights(params, exact)
        check_logits(params, tmp_path, exact)

    def test_biases_that_the_architecture_lacks(self, tmp_path: Path) -> None:
        exact = gptq_checkpoint(tmp_path, Style(), attention_bias=True, mlp_bias=True)
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(
            json.dumps(config | {"attention_bias": False, "mlp_bias": False})
        )
        params = load(tmp_path)
        assert params.layers[0].down.bias is not None
        (tmp_path / "config.json").write_text(json.dumps(config))
        check_logits(params, tmp_path, exact)

    def test_a_rule_gives_some_layers_other_bits(self, tmp_path: Path) -> None:
        exact = gptq_checkpoint(tmp_path, Style(bits=4), skip=("mlp",))
        tensors = load_file(tmp_path / "model.safetensors")
        for module in (f"model.layers.{index}.mlp.down_proj" for index in range(2)):
            del tensors[f"{module}.weight"]
            layer, weight = random_layer(64, 128, Style(bits=8, group_size=64), 5)
            tensors |= {f"{module}.{kind}": torch.from_numpy(tensor) for kind, tensor in layer.items()}
            exact[f"{module}.weight"] = torch.from_numpy(weight)
        save_file(tensors, tmp_path / "model.safetensors")
        rules = {r"-:.*gate_proj": {}, r"+:.*\.down_proj": {"bits": 8, "group_size": 64}}
        set_config(tmp_path, Style(bits=4).config | {"dynamic": rules})
        params = load(tmp_path)
        check_weights(params, exact)
        with pytest.raises(folo.ConfigError, match="quantised in more than one way"):
            export(params, tmp_path / "b")
        assert not (tmp_path / "b").exists()


def test_info_says_what_the_weights_take(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gptq_checkpoint(tmp_path, Style(group_size=64))
    params = load(tmp_path)
    assert cli.main(["info", str(tmp_path)]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("weights"))
    starts = [leaf.numel() for leaf in tree_leaves(params) if leaf.dtype == torch.int32 and leaf.ndim == 1]
    size = (params.num_bytes - 4 * sum(starts)) / 2**10
    assert line.removeprefix("weights").strip() == f"{size:.1f} KiB in float32, layers quantised"


@pytest.mark.parametrize("name", ["quantize_config.json", "quant_config.json"])
def test_the_scheme_may_stand_in_a_file_of_its_own(name: str, tmp_path: Path) -> None:
    exact = gptq_checkpoint(tmp_path)
    set_config(tmp_path, None)
    content = {"bits": 4, "group_size": 32, "method": "gptq", "format": "gptq", "pack_dtype": "int32"}
    (tmp_path / name).write_text(json.dumps(content))
    check_weights(load(tmp_path), exact)


def test_g_idx_may_be_left_out(tmp_path: Path) -> None:
    exact = gptq_checkpoint(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not name.endswith("g_idx")}
    save_file(kept, tmp_path / "model.safetensors")
    check_weights(load(tmp_path), exact)


@st.composite
def grouped(draw: st.DrawFn) -> Grouped:
    """Any weight, with any group for any column, groups of no column among them."""
    bits, n, k = draw(st.sampled_from(BITS)), draw(st.integers(1, 40)), draw(st.integers(1, 100))
    num_groups = draw(st.integers(1, 5))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    groups = rng.integers(0, num_groups, k)
    groups = np.sort(groups) if draw(st.booleans()) else groups
    return Grouped(
        torch.from_numpy(rng.integers(0, 2**bits, (n, k)).astype(np.uint8)),
        torch.from_numpy(rng.uniform(0.1, 2, (num_groups, n)).astype(np.float16)),
        torch.from_numpy(rng.integers(0, 2**bits, (num_groups, n)).astype(np.uint8)),
        torch.from_numpy(groups),
        bits,
        -1,
    )


@given(grouped())
def test_the_layout_keeps_the_weight(weight: Grouped) -> None:
    laid_out = quantized(weight)
    back = laid_out.grouped()
    assert torch.equal(back.codes, weight.codes)
    assert torch.equal(back.groups, weight.groups)
    used = weight.groups.unique()
    for found, right in ((back.scales, weight.scales), (back.zeros, weight.zeros)):
        assert found.shape == right.shape
        assert torch.equal(found[used], right[used])
    difference = weight.codes.double() - weight.zeros.t().double()[:, weight.groups]
    exact = difference * weight.scales.t().double()[:, weight.groups]
    assert torch.equal(laid_out.plain(torch.float64), exact)
    assert torch.equal(laid_out.plain().double(), exact)
    x = torch.randn(3, exact.shape[1], generator=torch.Generator().manual_seed(0))
    expected = x.double() @ exact.t()
    bound = 1e-6 * (x.abs().double() @ exact.abs().t()) + 1e-30
    assert ((ops.linear(x, laid_out).double() - expected).abs() <= bound).all()


def test_words_are_packed_low_bits_first() -> None:
    codes = np.arange(16).reshape(16, 1) % 16
    assert pack_words(codes, 4)[:, 0].view(np.uint32).tolist() == [0x76543210, 0xFEDCBA98]


class TestErrors:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        gptq_checkpoint(tmp_path)
        return tmp_path

    def refuses(self, path: Path, message: str) -> None:
        with pytest.raises(folo.LoadError, match=message):
            load(path)

    def rewrite(self, path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
        tensors = load_file(path / "model.safetensors")
        change(tensors)
        save_file(tensors, path / "model.safetensors")

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"quant_method": "awq"}, r"quantization_config \(awq\): only gptq is supported"),
            ({"dynamic": ["a"]}, r"dynamic is \['a'\]: it must be a dict"),
            ({"dynamic": {"+:(": {}}}, r"dynamic has the pattern '\(', which is none"),
            ({"dynamic": {".*": 4}}, r"\.\* is 4: it must be a dict"),
            ({"quant_method": None}, r"quantization_config \(unnamed\)"),
            ({"checkpoint_format": "marlin"}, "The GPTQ format 'marlin' is not supported"),
            ({"bits": 3}, "bits is 3: only 2, 4, 8 are supported"),
            ({"bits": "4"}, "bits is '4'"),
            ({"bits": None}, "bits is None"),
            ({"bits": 4.0}, "bits is 4.0: only 2, 4, 8 are supported"),
            ({"group_size": 0}, "group_size is 0"),
            ({"group_size": True}, "group_size is True"),
            ({"pack_dtype": "int16"}, "pack_dtype is 'int16'"),
            ({"group_size": 64}, r"qzeros has shape \[2, 8\]; the configuration says \[1, 8\]"),
            ({"bits": 8}, r"qweight has shape \[8, 64\]; the configuration says \[16, 64\]"),
        ],
    )
    def test_configuration(self, path: Path, changes: dict[str, Any], message: str) -> None:
        set_config(path, Style().config | changes)
        self.refuses(path, message)

    @pytest.mark.parametrize("wrong", [-1, 2])
    def test_g_idx_out_of_range(self, path: Path, wrong: int) -> None:
        name = "model.layers.1.self_attn.o_proj.g_idx"
        self.rewrite(path, lambda tensors: tensors[name].__setitem__(3, wrong))
        self.refuses(path, f"model.layers.1.self_attn.o_proj.g_idx holds {wrong}: there are 2 groups")

    @pytest.mark.parametrize("kind", ["qweight", "qzeros", "scales", "g_idx"])
    def test_shapes(self, path: Path, kind: str) -> None:
        name = f"model.layers.0.mlp.down_proj.{kind}"
        self.rewrite(path, lambda tensors: tensors.update({name: tensors[name][1:].clone()}))
        self.refuses(path, f"{name} has shape")

    @pytest.mark.parametrize("kind", ["qzeros", "scales"])
    def test_tensors_that_are_missing(self, path: Path, kind: str) -> None:
        self.rewrite(path, lambda tensors: tensors.pop(f"model.layers.0.mlp.down_proj.{kind}"))
        self.refuses(path, f"lacks the tensor model.layers.0.mlp.down_proj.{kind}")

    def test_layer_that_is_missing(self, path: Path) -> None:
        self.rewrite(path, lambda tensors: tensors.pop("model.layers.0.mlp.down_proj.qweight"))
        self.refuses(path, "lacks the tensor model.layers.0.mlp.down_proj.weight")

    def test_words_of_another_type(self, path: Path) -> None:
        name = "model.layers.0.mlp.down_proj.qweight"
        self.rewrite(path, lambda tensors: tensors.update({name: tensors[name].long()}))
        self.refuses(path, "qweight is stored as I64, not as int32")

    def test_scales_that_float16_cannot_hold(self, path: Path) -> None:
        name = "model.layers.0.mlp.down_proj.scales"
        self.rewrite(path, lambda tensors: tensors.update({name: tensors[name].float() * 1e9}))
        self.refuses(path, "scales holds what is no finite float16")

    def test_words_without_a_scheme(self, path: Path) -> None:
        set_config(path, None)
        self.refuses(path, "is stored as I32, not as floats")

    def test_layers_that_do_not_fill_words(self, tmp_path: Path) -> None:
        tiny_checkpoint(tmp_path, vocab_size=301)
        tensors = load_file(tmp_path / "model.safetensors")
        del tensors["lm_head.weight"]
        tensors["lm_head.qweight"] = torch.zeros(8, 301, dtype=torch.int32)
        save_file(tensors, tmp_path / "model.safetensors")
        set_config(tmp_path, Style().config)
        self.refuses(tmp_path, "301 outputs does not fill words of 8 codes")

    def test_derivatives_are_refused(self, path: Path) -> None:
        params = load(path, pack=False)
        params.norm.requires_grad_()
        with pytest.raises(folo.ConfigError, match="quantised weights cannot be differentiated"):
            folo.model.forward(params, IDS)
