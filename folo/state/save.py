"""A state as a file: one safetensors file, written whole or not at all.

Format: https://huggingface.co/docs/safetensors. Tensors, with L layers and n blocks that the state refers to
(in the order of the tables, then those that are only cached, the longest unused first):

    k, v            model dtype [L, n, block_size, Hkv, E]; slots that no sequence has filled are zero
    document        uint8, the rest as JSON (`folo.state.document`)

Metadata: format, version, params (fingerprint), dtype, what decided the bits (the attention backend,
`folo.ops.arithmetic`), and a SHA-256 over all of it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from folo.files import beside, write_tensors
from folo.ops.arithmetic import arithmetic
from folo.state.document import describe
from folo.state.engine import EngineState
from folo.state.flight import landed_or_before

FORMAT, VERSION = "folo-state", "3"
_HOST = torch.device("cpu")  # whatever the caller's default device is


def save(state: EngineState, path: str | os.PathLike[str]) -> None:
    """Write a state to `path`, atomically: the file there is always the old one, or the whole new one.

    The weights are not in it, nor is the tokenizer. Equal states give equal tensors and SHA-256.

    Raises:
        RequestError: a request has a logits processor without a name (`folo.sampling.named`).
        OSError: the file cannot be written; nothing is left behind.
    """
    state, path = landed_or_before(state), Path(os.path.realpath(path))  # a link's target is replaced
    if not path.name or (path.exists() and not path.is_file()):  # a rename would replace a device, say
        raise OSError(f"{path} is no regular file: give the name of one, or a new name")
    if not path.parent.is_dir():  # before K and V are gathered, and with this name in the message
        raise FileNotFoundError(f"{path} cannot be written: {path.parent} is no directory; make it first")
    tensors = _tensors(state)
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "params": state.params.fingerprint,
        "dtype": str(state.params.dtype).removeprefix("torch."),
        "attention": state.attention,
        **arithmetic(state.params.device),
    }
    metadata["sha256"] = checksum(metadata, tensors)
    partial = beside(path)
    try:
        write_tensors(tensors, partial, metadata)
        _to_disk(partial)
        os.replace(partial, path)
        _to_disk(path.absolute().parent)
    finally:
        with suppress(FileNotFoundError):
            partial.unlink()


def checksum(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over metadata and tensors, names, dtypes and shapes included."""
    digest = sha256(json.dumps(dict(metadata), sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if tensor.numel():  # torch views no empty tensor as bytes
            digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _to_disk(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _tensors(state: EngineState) -> dict[str, Tensor]:
    blocks, size = state.blocks(), state.cache.block_size
    document = describe(state, blocks)
    filled = torch.tensor([entry["filled"] for entry in document["blocks"]], dtype=torch.int64, device=_HOST)
    indices = torch.tensor([block.index for block in blocks], dtype=torch.int64, device=_HOST)
    empty = torch.arange(size, device=_HOST)[None, :] >= filled[:, None]
    k, v = (part.cpu() for part in state.heap.read(indices.to(state.heap.k.device)))
    for part in (k, v):
        part.masked_fill_(empty[None, :, :, None, None], 0)
    text = json.dumps(document).encode()
    return {"k": k, "v": v, "document": torch.from_numpy(np.frombuffer(text, np.uint8).copy())}
