"""A state as a file: one safetensors file, written whole or not at all.

Format: https://huggingface.co/docs/safetensors. Tensors, with L layers, n blocks that the state refers to
(in the order of the tables, then those that are only cached, the longest unused first) and S sequences
(running, waiting, ended):

    k, v            model dtype [L, n, block_size, Hkv, E]; slots that no sequence has filled are zero
    tokens          int64, the sequences' tokens one after the other;  token_start int64[S + 1]
    tables          int32, their block numbers likewise;               table_start int64[S + 1]
    filled          int32[n], slots of each block that hold a token
    cached          int32[c], the blocks in the prefix index
    cached_digest   uint8[c, 16];  cached_tokens int64[c, block_size]
    cached_parent   int32[c], the predecessor's place in `cached`, -1 for none
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
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from folo.files import beside, write_tensors
from folo.ops.arithmetic import arithmetic
from folo.state.document import describe, sequences_of
from folo.state.engine import EngineState
from folo.state.flight import landed_or_before
from folo.state.heap import Block, KVHeap
from folo.state.pool import DIGEST_SIZE

FORMAT, VERSION = "folo-state", "2"
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
    sequences, size = sequences_of(state), state.cache.block_size
    blocks = state.blocks()
    number = {block.index: n for n, block in enumerate(blocks)}
    filled, cached = state.filled(), [block for block in blocks if state.pool.cached(block)]
    filled |= {block.index: size for block in cached}
    num_filled = torch.tensor([filled[block.index] for block in blocks], dtype=torch.int32, device=_HOST)
    tables = [[number[block.index] for block in s.table.blocks] for s in sequences]
    indices = torch.tensor([block.index for block in blocks], dtype=torch.int64, device=_HOST)
    empty = torch.arange(size, device=_HOST)[None, :] >= num_filled[:, None]
    document = json.dumps(describe(state)).encode()
    return {
        **_gather(state.heap, indices, empty),
        **_ragged("tokens", "token_start", [s.tokens[:] for s in sequences], np.int64),
        **_ragged("tables", "table_start", tables, np.int32),
        "filled": num_filled,
        **_cached(cached, number, size),
        "document": torch.from_numpy(np.frombuffer(document, np.uint8).copy()),
    }


def _gather(heap: KVHeap, indices: Tensor, empty: Tensor) -> dict[str, Tensor]:
    k, v = (part.cpu() for part in heap.read(indices.to(heap.k.device)))
    for part in (k, v):
        part.masked_fill_(empty[None, :, :, None, None], 0)
    return {"k": k, "v": v}


def _ragged(name: str, start: str, lists: list[list[int]], dtype: Any) -> dict[str, Tensor]:
    flat = np.array([item for items in lists for item in items], dtype)
    starts = np.array([0, *accumulate(len(items) for items in lists)], np.int64)
    return {name: torch.from_numpy(flat), start: torch.from_numpy(starts)}


def _cached(blocks: list[Block], number: Mapping[int, int], size: int) -> dict[str, Tensor]:
    contents = [block.content for block in blocks if block.content is not None]
    place = {content.digest: n for n, content in enumerate(contents)}
    digests = np.frombuffer(b"".join(content.digest for content in contents), np.uint8)
    parents = [place[content.parent] if content.parent else -1 for content in contents]
    tokens = np.array([content.token_ids for content in contents], np.int64)
    return {
        "cached": torch.tensor([number[block.index] for block in blocks], dtype=torch.int32, device=_HOST),
        "cached_digest": torch.from_numpy(digests.reshape(len(blocks), DIGEST_SIZE).copy()),
        "cached_parent": torch.tensor(parents, dtype=torch.int32, device=_HOST),
        "cached_tokens": torch.from_numpy(tokens.reshape(len(blocks), size)),
    }
