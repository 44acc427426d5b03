"""What folo writes is read by GPTQModel, through transformers, as what it is.

Optional: `pip install gptqmodel optimum`.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import tiny_checkpoint
from transformers import AutoModelForCausalLM, GPTQConfig

import folo
from folo import quant
from folo.ops.quantized import BITS, Quantized
from folo.quant.write import write

if find_spec("gptqmodel") is None:
    pytest.skip("needs gptqmodel", allow_module_level=True)

# GPTQModel and what it imports warn of much that is not folo's.
pytestmark = pytest.mark.filterwarnings("ignore")

CALIBRATION = [[(7 * n + 3 * s) % 297 + 3 for n in range(48)] for s in range(6)]
IDS = torch.arange(3, 43)
CONFIGS = [
    quant.QuantConfig(bits, group_size, sym, desc_act)
    for bits, group_size, sym, desc_act in product(BITS, (32, 128, -1), (True, False), (False, True))
]


def quantised(path: Path, config: quant.QuantConfig, architecture: str = "llama") -> folo.Params:
    """A random model in float32, quantised, at `path / "few"` too. Biases are what float16 can hold, in which
    GPTQModel keeps them."""
    tiny_checkpoint(path / "dense", architecture, dtype=torch.float16, tokenizer=True)
    dense = folo.load(path / "dense", dtype="float32", device="cpu", use_tqdm=False)
    params = quant.quantize(dense, CALIBRATION, config, use_tqdm=False)
    write(params, folo.load_tokenizer(str(path / "dense")), path / "few")
    return params


def read(path: Path) -> Any:
    """By GPTQModel's kernel in torch: that for AVX-512, which it would choose, takes no short last group."""
    model = AutoModelForCausalLM.from_pretrained(
        path / "few",
        quantization_config=GPTQConfig(bits=4, backend="torch"),  # bits, as all else, are the checkpoint's
        dtype=torch.float32,
        device_map="cpu",
    )
    return model.eval()


def linears(params: folo.Params, model: Any) -> Iterator[tuple[Quantized, list[Any]]]:
    """folo's weights, each with the reader's modules that are rows of it."""
    for layer, other in zip(params.layers, model.model.layers, strict=True):
        attention, mlp = other.self_attn, other.mlp
        for linear, modules in (
            (layer.qkv, [attention.q_proj, attention.k_proj, attention.v_proj]),
            (layer.out, [attention.o_proj]),
            (layer.gate_up, [mlp.gate_proj, mlp.up_proj]),
            (layer.down, [mlp.down_proj]),
        ):
            assert isinstance(linear.weight, Quantized)
            yield linear.weight, modules


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_gptqmodel_has_the_same_weights(config: quant.QuantConfig, tmp_path: Path) -> None:
    """Bit for bit, once folo's are rounded to float16: GPTQModel multiplies in the scales' dtype."""
    params = quantised(tmp_path, config)
    for weight, modules in linears(params, read(tmp_path)):
        found = torch.cat([module.dequantize_weight() for module in modules], 1).t()
        assert found.dtype == torch.float16
        assert torch.equal(found, weight.plain(torch.float64).half())


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("desc_act", [False, True])
def test_logits_are_transformers_with_gptqmodel(architecture: str, desc_act: bool, tmp_path: Path) -> None:
    """With the scales widened, so that the weights are the same in float32."""
    params = quantised(tmp_path, quant.QuantConfig(group_size=32, desc_act=desc_act), architecture)
    model = read(tmp_path)
    for _, modules in linears(params, model):
        for module in modules:
            module.scales = module.scales.float()
    with torch.no_grad():
        expected = model(IDS[None]).logits[0]
    got = folo.model.forward(params, IDS)
    assert float((got - expected).abs().max() / expected.abs().max()) < 1e-5
