"""Checkpoints as transformers saves them: a directory of config.json and safetensors files.

Format: https://huggingface.co/docs/safetensors. Weights in pickle files are refused: unpickling runs code.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from folo.errors import LoadError
from folo.model import gptq
from folo.model.checkpoint import row_slabs
from folo.model.config import DecoderConfig, typed
from folo.ops.quantized import Grouped

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_INTEGERS = (".qweight", ".qzeros", ".g_idx")  # of a GPTQ checkpoint, all int32
_FIRST = "model.layers.0"
_EMBED, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_PICKLES = (".bin", ".pt", ".pth")


class SafetensorsDirectory:
    """A `Checkpoint` of one `model.safetensors`, or of the shards that its index lists.

    Its linear layers may be in GPTQ's format: those that have a `qweight`, not a `weight`.

    Raises LoadError if a file is missing, damaged, or a pickle.
    """

    def __init__(self, path: Path) -> None:
        self._config = read_json(path / "config.json")
        generation = path / "generation_config.json"
        self._generation = read_json(generation) if generation.exists() else None
        self._scheme = gptq.find_scheme(path, self._config, read_json)
        self._files: dict[str, Path] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        for file in _weight_files(path):
            self._read_header(file)

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._shapes

    @property
    def stored_dtype(self) -> torch.dtype:
        """What config.json says; if it says nothing, the dtype of the first floating tensor, or float32."""
        name = typed(self._config, "dtype", str) or typed(self._config, "torch_dtype", str)
        if name is None:
            floats = (dtype for dtype in self._dtypes.values() if dtype.is_floating_point)
            return next(floats, torch.float32)
        known = {str(dtype).removeprefix("torch."): dtype for dtype in _DTYPES.values()}
        if name not in known:
            raise LoadError(f"config.json names the dtype {name!r}: pass dtype='float32' or another to load.")
        return known[name]

    def parts(self, name: str, shape: tuple[int, ...]) -> Mapping[str, tuple[int, ...]]:
        module, _, kind = name.rpartition(".")
        scheme = self._scheme_of(module)
        if scheme is None or kind != "weight":
            return {name: shape}
        parts: dict[str, tuple[int, ...]] = scheme.parts(shape[0], shape[1])
        if f"{module}.g_idx" in self._files:
            parts["g_idx"] = shape[1:]
        return {f"{module}.{kind}": part for kind, part in parts.items()}

    def config(self, dtype: torch.dtype) -> DecoderConfig:
        """From config.json; with GPTQ, also biases and an untied output layer that a quantiser added."""
        config = DecoderConfig.from_hf(self._config, self._generation, dtype)
        self._refuse_other_head(config)
        if self._scheme is None:
            return config

        def biased(module: str, usual: bool) -> bool:
            return usual or f"{_FIRST}.{module}.bias" in self._files

        return replace(
            config,
            qkv_bias=biased("self_attn.q_proj", config.qkv_bias),
            o_bias=biased("self_attn.o_proj", config.o_bias),
            mlp_bias=biased("mlp.gate_proj", config.mlp_bias),
            tie_word_embeddings=config.tie_word_embeddings and "lm_head.qweight" not in self._files,
        )

    def _refuse_other_head(self, config: DecoderConfig) -> None:
        """Raises LoadError if a tied output layer is not the embedding: transformers takes what is stored."""
        shape = (config.vocab_size, config.hidden_size)
        if not config.tie_word_embeddings or _HEAD not in self._files or self._shapes.get(_EMBED) != shape:
            return
        if self._shapes[_HEAD] != shape or not all(
            bool((self._rows(_HEAD, rows) == self._rows(_EMBED, rows)).all()) for rows in row_slabs(shape)
        ):
            raise LoadError(
                f"tie_word_embeddings is true, but {_HEAD} differs from {_EMBED}: "
                "set it to false in config.json."
            )

    def quantized(self, module: str, shape: tuple[int, ...]) -> Grouped | None:
        scheme = self._scheme_of(module)
        if scheme is None:
            return None

        def tensor(kind: str) -> Tensor | None:
            name = f"{module}.{kind}"
            if name not in self._files:
                return None
            out = torch.empty(self._shapes[name], dtype=self._dtypes[name])
            self.read(name, out)
            return out

        return gptq.read(scheme, module, shape[1], tensor)

    def _scheme_of(self, module: str) -> gptq.Scheme | None:
        """How this module's weight is quantised, if it is."""
        if self._scheme is None or f"{module}.qweight" not in self._files:
            return None
        return self._scheme.at(module)

    def read(self, name: str, out: Tensor) -> None:
        for rows in row_slabs(tuple(out.shape)):
            out[rows] = self._rows(name, rows).to(out.device)

    def _rows(self, name: str, rows: slice) -> Tensor:
        # Opened anew for each slab: the file is memory-mapped, and until it is unmapped the pages that
        # were read stay resident, a second copy of the weights.
        with safe_open(self._files[name], framework="pt") as file:
            return file.get_slice(name)[rows]

    def _read_header(self, path: Path) -> None:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (not a mapping)
                    view = file.get_slice(name)
                    integers = self._scheme is not None and name.endswith(_INTEGERS)
                    known = {"I32": torch.int32} if integers else _DTYPES
                    if view.get_dtype() not in known:
                        kind = "int32" if integers else "floats"
                        raise LoadError(f"{path}: {name} is stored as {view.get_dtype()}, not as {kind}.")
                    if name in self._files:
                        raise LoadError(
                            f"{name} is in {self._files[name].name} and in {path.name}: keep one."
                        )
                    self._files[name] = path
                    self._shapes[name] = tuple(view.get_shape())
                    self._dtypes[name] = known[view.get_dtype()]
        except (SafetensorError, OSError) as error:
            raise LoadError(f"{path} is truncated or corrupt: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises LoadError if there is no such file or it holds none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise LoadError(f"{path.parent} has no {path.name}.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise LoadError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise LoadError(f"{path} holds no JSON object.")
    return value


def _weight_files(path: Path) -> list[Path]:
    single, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if single.exists():
        return [single]
    if not index.exists():
        pickles = sorted(file.name for file in path.iterdir() if file.suffix in _PICKLES)
        if pickles:
            raise LoadError(
                f"{path} has its weights in pickle files only ({', '.join(pickles)}). Loading a pickle can "
                "run any code, so folo reads safetensors: convert them with transformers' save_pretrained."
            )
        raise LoadError(f"{path} has neither model.safetensors nor model.safetensors.index.json.")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise LoadError(f"{index} has no weight_map of tensor names to files.")
    shards = sorted(set(weight_map.values()))
    for shard in shards:
        if shard in ("", "..") or Path(shard).name != shard:
            raise LoadError(f"{index} names the shard {shard!r}, which is not a plain file name.")
        if not os.path.exists(path / shard):  # Path.exists raises where a name is too long
            raise LoadError(f"{index} names the shard {shard}, which is missing.")
    return [path / shard for shard in shards]
