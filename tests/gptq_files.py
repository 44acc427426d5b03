"""GPTQ checkpoints, packed as the format is described: in numpy, one code at a time."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from checkpoints import tiny_checkpoint
from safetensors.numpy import load_file, save_file
from torch import Tensor

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Style:
    """What a checkpoint may be like."""

    bits: int = 4
    group_size: int = 32
    sym: bool = False
    desc_act: bool = False
    version: int = 1

    @property
    def config(self) -> dict[str, Any]:
        return {
            "quant_method": "gptq",
            "checkpoint_format": "gptq" if self.version == 1 else "gptq_v2",
            "bits": self.bits,
            "group_size": self.group_size,
            "sym": self.sym,
            "desc_act": self.desc_act,
        }


def pack_words(codes: Array, bits: int) -> Array:
    """`[C, R]` -> int32 `[C * bits / 32, R]`: along the first dimension, low bits first."""
    per = 32 // bits
    words = np.zeros((codes.shape[0] // per, codes.shape[1]), dtype=np.uint32)
    for c in range(codes.shape[0]):
        words[c // per] |= codes[c].astype(np.uint32) << np.uint32(bits * (c % per))
    return words.view(np.int32)


def random_layer(n: int, k: int, style: Style, seed: int) -> tuple[dict[str, Array], Array]:
    """The tensors of a layer, by kind, and the float64 weight `[N, K]` that they stand for."""
    rng = np.random.default_rng(seed)
    group_size = k if style.group_size == -1 else style.group_size
    num_groups = -(-k // group_size)
    g_idx = np.arange(k) // group_size
    if style.desc_act:
        g_idx = rng.permutation(g_idx)
    codes = rng.integers(0, 2**style.bits, (k, n))
    zeros = rng.integers(0, 2**style.bits, (num_groups, n))
    if style.sym:
        zeros[:] = 2 ** (style.bits - 1)
    scales = (rng.uniform(0.5, 1.5, (num_groups, n)) * 0.2 / 2**style.bits).astype(np.float16)
    weight = (codes - zeros[g_idx]) * scales[g_idx].astype(np.float64)
    stored = zeros if style.version == 2 else (zeros - 1) % 2**style.bits
    tensors = {
        "qweight": pack_words(codes, style.bits),
        "qzeros": np.ascontiguousarray(pack_words(stored.T, style.bits).T),
        "scales": scales,
        "g_idx": g_idx.astype(np.int32),
    }
    return tensors, np.ascontiguousarray(weight.T)


def unpack_words(words: Array, bits: int) -> Array:
    """What `pack_words` packed: int32 `[C * bits / 32, R]` -> `[C, R]`."""
    per = 32 // bits
    rows = [(words.view(np.uint32)[c // per] >> np.uint32(bits * (c % per))) for c in range(len(words) * per)]
    return np.stack(rows).astype(np.int64) & (2**bits - 1)


def weight_of(tensors: dict[str, Array], module: str, bits: int) -> Array:
    """The float64 weight `[N, K]` that a layer's tensors in format "gptq" stand for."""
    codes = unpack_words(tensors[f"{module}.qweight"], bits)
    qzeros = np.ascontiguousarray(tensors[f"{module}.qzeros"].T)
    zeros = (unpack_words(qzeros, bits).T + 1) & (2**bits - 1)
    g_idx = tensors[f"{module}.g_idx"]
    return ((codes - zeros[g_idx]) * tensors[f"{module}.scales"][g_idx].astype(np.float64)).T


def gptq_checkpoint(
    path: Path, style: Style = Style(), skip: tuple[str, ...] = (), lm_head: bool = False, **options: Any
) -> dict[str, Tensor]:
    """A random model of `tiny_checkpoint` with its linear layers in GPTQ's format -> its state dict, float64.

    skip: parts of names of layers that stay dense. options: of `tiny_checkpoint`.
    """
    tiny_checkpoint(path, **options)
    tensors = load_file(path / "model.safetensors")
    exact = {name: torch.from_numpy(tensor.astype(np.float64)) for name, tensor in tensors.items()}
    for seed, name in enumerate(sorted(tensors)):
        module, _, kind = name.rpartition(".")
        is_linear = module.endswith("_proj") or (lm_head and module == "lm_head")
        if kind != "weight" or not is_linear or any(part in name for part in skip):
            continue
        # Layers of one input have one order of columns, as GPTQ leaves them.
        seed = 1 if module.endswith(("q_proj", "k_proj", "v_proj")) else seed
        seed = 2 if module.endswith(("gate_proj", "up_proj")) else seed
        n, k = tensors.pop(name).shape
        layer, weight = random_layer(n, k, style, seed)
        tensors |= {f"{module}.{part}": tensor for part, tensor in layer.items()}
        exact[name] = torch.from_numpy(weight)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    set_config(path, style.config | {"lm_head": lm_head})
    return exact


def set_config(path: Path, quantization: dict[str, Any] | None) -> None:
    """Put it into config.json."""
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = quantization
    (path / "config.json").write_text(json.dumps(config))
