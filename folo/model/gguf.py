"""Checkpoints in llama.cpp's GGUF format, dequantised as they are read.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The header is parsed here and not with
`gguf.GGUFReader`, which makes an array object of every string of the vocabulary: for 49,000 tokens that is
2 seconds and 160 MB, against 0.1 seconds. Block formats are left to `gguf.quants`.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from folo.errors import LoadError
from folo.model.checkpoint import row_slabs
from folo.model.config import DecoderConfig, RopeConfig, positive_int, positive_number, token_ids

_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
_QUANTISED = ("Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K")
_SUPPORTED = ("F32", "F16", "BF16", *_QUANTISED)

# transformers' names to llama.cpp's (gguf-py/gguf/tensor_mapping.py)
_TOP_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: `shape` as in torch, outermost dimension first; `offset` in bytes."""

    shape: tuple[int, ...]
    type: str
    row_bytes: int
    offset: int


class GGUFFile:
    """A `Checkpoint` in one `.gguf` file.

    Raises LoadError if the file is truncated, corrupt, one part of several, or holds a tensor of a type
    that is not supported, or if the package `gguf` is not installed.
    """

    def __init__(self, path: Path) -> None:
        self._gguf = gguf = _import_gguf()
        self._path = path
        self._metadata, self._tensors = _read_header(path, gguf)
        if self._metadata.get("split.count", 1) != 1:
            raise LoadError(f"{path} is one part of a split GGUF file: merge it with llama-gguf-split first.")
        for name, tensor in self._tensors.items():
            if tensor.type not in _SUPPORTED:
                raise LoadError(
                    f"{path}: {name} has the type {tensor.type}; supported: {', '.join(_SUPPORTED)}."
                )
            if tensor.offset + tensor.row_bytes * tensor.shape[0] > os.path.getsize(path):
                raise LoadError(f"{path} is truncated: {name} lies beyond its end.")

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Without `rope_freqs.weight`, which is part of the configuration here."""
        return {name: tensor.shape for name, tensor in self._tensors.items() if name != "rope_freqs.weight"}

    @property
    def stored_dtype(self) -> torch.dtype:
        """bfloat16 if a matrix is quantised or BF16, else float16 if one is F16, else float32."""
        types = {tensor.type for tensor in self._tensors.values() if len(tensor.shape) > 1}
        if types & {"BF16", *_QUANTISED}:
            return torch.bfloat16
        return torch.float16 if "F16" in types else torch.float32

    def parts(self, name: str, shape: tuple[int, ...]) -> Mapping[str, tuple[int, ...]]:
        return {self._stored_name(name): shape}

    def quantized(self, module: str, shape: tuple[int, ...]) -> None:
        return None  # block formats are dequantised as they are read

    def _stored_name(self, name: str) -> str:
        module, kind = name.rsplit(".", 1)
        if module in _TOP_NAMES:
            return f"{_TOP_NAMES[module]}.{kind}"
        _, _, layer, part = module.split(".", 3)
        return f"blk.{layer}.{_LAYER_NAMES[part]}.{kind}"

    def config(self, dtype: torch.dtype) -> DecoderConfig:
        """From the metadata keys that the format defines; biases and tied embeddings from the tensors."""
        arch = self._metadata.get("general.architecture")
        if arch not in _ARCHITECTURES:
            raise LoadError(f"Unsupported GGUF architecture: {arch}. Supported: {', '.join(_ARCHITECTURES)}.")
        heads = positive_int(self._metadata, f"{arch}.attention.head_count")
        hidden = positive_int(self._metadata, f"{arch}.embedding_length")
        head_dim = positive_int(self._metadata, f"{arch}.attention.key_length", hidden // heads)
        context = positive_int(self._metadata, f"{arch}.context_length")
        self._refuse_unsupported(arch, head_dim, context)
        embed = self._tensors.get("token_embd.weight")
        if embed is None:
            raise LoadError("The checkpoint lacks the tensor token_embd.weight.")
        ends = (token_ids(self._metadata, f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot"))
        return DecoderConfig(
            architecture=_ARCHITECTURES[arch],
            vocab_size=embed.shape[0],
            hidden_size=hidden,
            intermediate_size=positive_int(self._metadata, f"{arch}.feed_forward_length"),
            num_layers=positive_int(self._metadata, f"{arch}.block_count"),
            num_heads=heads,
            num_kv_heads=positive_int(self._metadata, f"{arch}.attention.head_count_kv", heads),
            head_dim=head_dim,
            max_position_embeddings=context,
            rms_norm_eps=positive_number(self._metadata, f"{arch}.attention.layer_norm_rms_epsilon"),
            rope=RopeConfig(
                theta=positive_number(self._metadata, f"{arch}.rope.freq_base", 10000.0),
                freq_factors=self._rope_freq_factors(head_dim),
            ),
            qkv_bias="blk.0.attn_q.bias" in self._tensors,
            o_bias="blk.0.attn_output.bias" in self._tensors,
            mlp_bias="blk.0.ffn_gate.bias" in self._tensors,
            qk_norm=arch == "qwen3",
            tie_word_embeddings="output.weight" not in self._tensors,
            dtype=dtype,
            bos_token_id=self._metadata.get("tokenizer.ggml.bos_token_id"),
            eos_token_ids=tuple(dict.fromkeys(chain.from_iterable(ends))),
        )

    def read(self, name: str, out: Tensor) -> None:
        tensor = self._tensors[self._stored_name(name)]
        order = self._row_order(name, tensor)
        for rows in row_slabs(tensor.shape):
            slab = self._dequantise(tensor, rows).to(out.device, out.dtype)
            if order is None:
                out[rows] = slab
            else:
                out[order[rows].to(out.device)] = slab

    def _dequantise(self, tensor: StoredTensor, rows: slice) -> Tensor:
        """Rows of a tensor, float32. Read, not mapped: pages of a mapped file would stay resident."""
        raw = np.fromfile(
            self._path,
            dtype=np.uint8,
            count=(rows.stop - rows.start) * tensor.row_bytes,
            offset=tensor.offset + rows.start * tensor.row_bytes,
        ).reshape(-1, tensor.row_bytes)
        # The library takes 16 rows at a time, whatever their length: longer ones are fewer calls.
        long = raw.reshape(math.gcd(len(raw), 128), -1)
        values = self._gguf.dequantize(long, self._gguf.GGMLQuantizationType[tensor.type])
        return torch.from_numpy(values).reshape(-1, *tensor.shape[1:])

    def _row_order(self, name: str, tensor: StoredTensor) -> Tensor | None:
        """For each stored row of a llama Q or K projection, the row that it is in transformers.

        llama.cpp rotates neighbouring pairs of rows where transformers rotates the halves of a head, so its
        converter interleaves the halves (`LlamaModel.permute` in convert_hf_to_gguf.py).
        """
        is_projection = ".q_proj." in name or ".k_proj." in name
        if self._metadata["general.architecture"] != "llama" or not is_projection:
            return None
        rows = tensor.shape[0]
        heads = positive_int(self._metadata, "llama.attention.head_count")
        if ".k_proj." in name:
            heads = positive_int(self._metadata, "llama.attention.head_count_kv", heads)
        return torch.arange(rows).view(heads, 2, rows // heads // 2).transpose(1, 2).reshape(-1)

    def _rope_freq_factors(self, head_dim: int) -> tuple[float, ...]:
        tensor = self._tensors.get("rope_freqs.weight")
        if tensor is None:
            return ()
        if tensor.shape != (head_dim // 2,):
            raise LoadError(
                f"{self._path}: rope_freqs.weight has shape {tensor.shape}, not ({head_dim // 2},)."
            )
        factors = tuple(self._dequantise(tensor, slice(0, head_dim // 2)).tolist())
        if not all(0 < factor < math.inf for factor in factors):
            raise LoadError(f"{self._path}: rope_freqs.weight has to be finite and above 0: {factors}.")
        return factors

    def _refuse_unsupported(self, arch: str, head_dim: int, context: int) -> None:
        """Raises LoadError for metadata that would change the model's outputs if it were ignored."""
        scaling = self._metadata.get(f"{arch}.rope.scaling.type", "linear")  # as llama.cpp takes it
        linear = self._metadata.get(f"{arch}.rope.scale_linear")  # the factor's older name
        factor = self._metadata.get(f"{arch}.rope.scaling.factor", linear)
        if scaling not in ("none", "linear") or (scaling == "linear" and factor not in (None, 0, 1)):
            raise LoadError(f"{self._path}: rope scaling {scaling!r} is not supported (factor {factor}).")
        attention = self._metadata.get(f"{arch}.rope.scaling.attn_factor", 1)
        if attention != 1:
            raise LoadError(f"{self._path}: rope scaling with attn_factor {attention} is not supported.")
        rotary = positive_int(self._metadata, f"{arch}.rope.dimension_count", head_dim)
        if rotary != head_dim:
            raise LoadError(
                f"{self._path}: only {rotary} of {head_dim} dimensions are rotated: not supported."
            )
        value_length = positive_int(self._metadata, f"{arch}.attention.value_length", head_dim)
        if value_length != head_dim:
            raise LoadError(f"{self._path}: values of length {value_length} with keys of length {head_dim}.")
        window = positive_int(self._metadata, f"{arch}.attention.sliding_window", context)
        if window < context:
            raise LoadError(f"{self._path}: sliding window attention ({window}) is not supported.")
        if self._metadata.get(f"{arch}.expert_count"):
            raise LoadError(f"{self._path}: mixtures of experts are not supported.")


def read_metadata(path: Path) -> dict[str, Any]:
    """The metadata of a `.gguf` file alone. Raises LoadError as `GGUFFile` does."""
    return _read_header(path, _import_gguf())[0]


def _import_gguf() -> ModuleType:
    try:
        import gguf
    except ImportError as error:
        raise LoadError("Reading a GGUF file needs the gguf package: pip install folo[gguf]") from error
    return gguf


class _Header:
    """A cursor over the little-endian header. Raises LoadError where the file ends too early."""

    _SCALARS = dict(enumerate("BbHhIif?", start=0)) | {10: "Q", 11: "q", 12: "d"}
    _STRING, _ARRAY = 8, 9

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path = path
        self._file = file
        self._left = os.path.getsize(path)

    @property
    def position(self) -> int:
        return self._file.tell()

    def error(self, reason: str) -> LoadError:
        return LoadError(f"{self._path} is no GGUF file that can be read: {reason}.")

    def take(self, size: int) -> bytes:
        self._left -= size
        if self._left < 0:  # before reading: a corrupt size may be any number
            raise LoadError(f"{self._path} is truncated or corrupt: it ends inside its header.")
        return self._file.read(size)

    def numbers(self, kind: str, count: int) -> tuple[Any, ...]:
        return struct.unpack(f"<{count}{kind}", self.take(count * struct.calcsize(f"<{kind}")))

    def number(self, kind: str) -> Any:
        return self.numbers(kind, 1)[0]

    def string(self) -> str:
        raw = self.take(self.number("Q"))
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.error(f"{raw[:40]!r} is not UTF-8") from error

    def value(self) -> Any:
        kind = self.number("I")
        if kind == self._STRING:
            return self.string()
        if kind in self._SCALARS:
            return self.number(self._SCALARS[kind])
        if kind != self._ARRAY:
            raise self.error(f"it has a value of the unknown type {kind}")
        kind, count = self.number("I"), self.number("Q")
        if kind == self._STRING:
            return [self.string() for _ in range(count)]
        if kind in self._SCALARS:
            return list(self.numbers(self._SCALARS[kind], count))
        raise self.error(f"it has an array of the unknown type {kind}")


def _read_header(path: Path, gguf: ModuleType) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    """The metadata, and where each tensor lies."""
    metadata: dict[str, Any] = {}
    found: dict[str, StoredTensor] = {}
    with path.open("rb") as file:
        header = _Header(path, file)
        if header.take(4) != b"GGUF":
            raise header.error("it does not begin with 'GGUF'")
        version = header.number("I")
        if version not in (2, 3):
            raise header.error(f"its version is {version}, and 2 and 3 are supported")
        num_tensors, num_values = header.numbers("Q", 2)
        for _ in range(num_values):
            key = header.string()
            metadata[key] = header.value()
        for _ in range(num_tensors):
            name = header.string()
            if name in found:
                raise header.error(f"it has two tensors named {name}")
            found[name] = _tensor_info(header, name, gguf)
        alignment = metadata.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment <= 0:
            raise header.error(f"general.alignment is {alignment!r}")
        start = -(-header.position // alignment) * alignment
    return metadata, {name: replace(tensor, offset=start + tensor.offset) for name, tensor in found.items()}


def _tensor_info(header: _Header, name: str, gguf: ModuleType) -> StoredTensor:
    """One entry of the tensor table, with an offset from the start of the data."""
    shape = tuple(reversed(header.numbers("Q", header.number("I"))))
    type_id, offset = header.number("I"), header.number("Q")
    try:
        kind = gguf.GGMLQuantizationType(type_id)
    except ValueError as error:
        raise header.error(f"{name} has the unknown type {type_id}") from error
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    row = math.prod(shape[1:])
    if not shape or row % block:
        raise header.error(f"{name} has shape {shape}, which {kind.name} cannot hold")
    return StoredTensor(shape, kind.name, row // block * block_bytes, offset)
