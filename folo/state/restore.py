"""A state from a file, in any process: verified, then goes on bit for bit."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from folo.config import CacheConfig, SchedulerConfig, require_kind
from folo.errors import ConfigError, IntegrityError, ParamsMismatchError, RestoreError
from folo.ops.arithmetic import arithmetic
from folo.sampling import Transform
from folo.state.check import check
from folo.state.document import Document, rebuild
from folo.state.engine import EngineState, init, require_params
from folo.state.evolve import evolve
from folo.state.heap import Block, Content
from folo.state.lifecycle import preempt, vacate
from folo.state.map import Map
from folo.state.pool import Pool
from folo.state.save import FORMAT, VERSION, checksum
from folo.state.sequence import BlockTable

if TYPE_CHECKING:
    from folo.model.params import Params


def restore(
    params: Params,
    path: str | os.PathLike[str],
    cache: CacheConfig | None = None,
    transforms: Mapping[str, Transform] | None = None,
    recompute: bool = False,
    tokenizer: Any = None,
) -> EngineState:
    """The state that `folo.save` wrote, over a new KV heap. Nothing in the file is ever executed.

    Args:
        params: the weights it was saved with.
        cache: another heap. In a smaller one, cached blocks are dropped, then sequences preempted; no
            sequence can be longer than it.
        transforms: the logits processors that its requests refer to, by name.
        recompute: drop all K and V and compute them again here: needed with another instruction set,
            backend or build (the bits may differ from there on), or with another block size.
        tokenizer: as for `folo.init`.

    Raises:
        RestoreError: the file is missing, truncated, altered or of an unknown version; it was written
            under another instruction set, backend, torch or kernel build; a tokenizer or transform that it
            needs was not given; `cache` has another block size, or a heap too small for a sequence.
        ParamsMismatchError: it was saved with other weights.
        ConfigError: see `folo.init`; `transforms` is no mapping.
    """
    require_params(params)
    transforms = {} if transforms is None else transforms
    if not isinstance(transforms, Mapping):
        raise ConfigError(f"transforms={transforms!r}: expected a dict, {{name: function}}")
    metadata, tensors = _read(Path(path))
    _compare(params, metadata, path, recompute)
    document: Document = json.loads(tensors["document"].numpy().tobytes())
    saved, scheduler = CacheConfig(**document["cache"]), SchedulerConfig(**document["scheduler"])
    cache = saved if cache is None else cache
    require_kind("cache", cache, CacheConfig)
    if cache.block_size != saved.block_size and not recompute:
        raise RestoreError(
            f"block_size={cache.block_size}, but the K and V of {path} lie in blocks of {saved.block_size}; "
            f"keep that, or give recompute=True"
        )
    # The backend that it was made with: one that may break invariance was accepted then, so it is again now.
    attention = "auto" if recompute else metadata.get("attention", "auto")
    longest = scheduler.max_model_len
    scheduler = replace(scheduler, max_model_len=None)  # this heap may hold less
    state = init(params, cache, scheduler, tokenizer, document["seed"], attention, deterministic=False)
    if longest is not None:
        scheduler = replace(scheduler, max_model_len=min(longest, state.max_model_len))
        state = evolve(state, scheduler=scheduler)
    blocks = _stand_ins(document, state.cache.enable_prefix_caching)
    state = rebuild(state, document, blocks, transforms)
    state = vacate(state) if recompute else _housed(_fitted(_pooled(state, blocks)), tensors)
    try:
        check(state)
    except IntegrityError as error:
        raise RestoreError(f"{path} contradicts itself: {error}") from error
    return state


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The metadata and tensors of a file, checked against its SHA-256. Raises RestoreError."""
    try:
        with safe_open(path, "pt") as file:
            metadata = dict(file.metadata() or {})
            if metadata.get("format") != FORMAT:
                raise RestoreError(f"{path} is not a state that folo saved")
            if metadata.get("version") != VERSION:
                raise RestoreError(
                    f"{path} has format version {metadata.get('version')!r}; this folo reads {VERSION!r}"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (OSError, SafetensorError) as error:
        raise RestoreError(f"{path} cannot be read: {error}") from error
    expected = metadata.pop("sha256", None)
    if checksum(metadata, tensors) != expected:
        raise RestoreError(f"{path} was altered or damaged: its SHA-256 differs from the one written with it")
    return metadata, tensors


def _compare(params: Params, metadata: Mapping[str, str], path: object, recompute: bool) -> None:
    if metadata["params"] != params.fingerprint:
        raise ParamsMismatchError(
            f"{path} was saved with other weights (fingerprint {metadata['params'][:12]}..., these have "
            f"{params.fingerprint[:12]}...): load those, in {metadata['dtype']}"
        )
    for name, value in arithmetic(params.device).items():
        saved = metadata.get(name, "unknown")
        if saved != value and not recompute:
            raise RestoreError(
                f"{path} was saved under {name.replace('_', ' ')} {saved!r}, this is {value!r}: "
                f"its K and V may differ in the last bits; recompute=True computes them again here"
            )


def _stand_ins(document: Document, caching: bool) -> list[Block]:
    """The file's blocks under the numbers that they have there, in no heap yet."""
    blocks = [Block(number) for number in range(len(document["blocks"]))]
    for block, entry in zip(blocks, document["blocks"], strict=True):
        block.claimed = entry["filled"]
        if caching and (content := entry.get("content")):
            digest, parent = bytes.fromhex(content["digest"]), bytes.fromhex(content["parent"])
            block.content = Content(digest, parent, tuple(content["token_ids"]))
    return blocks


def _pooled(state: EngineState, blocks: list[Block]) -> EngineState:
    """The accounting of blocks in the order of `EngineState.blocks`: more, perhaps, than the capacity."""
    held = {block.index for s in state.running for block in s.table.blocks}
    pool, idle, released = state.pool, Map[int, int](), Map[int, Block]()
    for clock, block in enumerate(blocks):
        if block.content is not None:
            pool = pool.insert(block, block.content)
        if block.content is not None or block.index in held:
            idle, released = idle.set(block.index, clock), released.set(clock, block)
    pool = evolve(pool, idle=idle, released=released, clock=len(blocks))
    for sequence in state.running:
        pool = pool.hold(sequence.table.blocks)
    return evolve(state, pool=pool)


def _fitted(state: EngineState) -> EngineState:
    """What is cached beyond the capacity goes; if that is not enough, the last sequences are preempted."""
    while state.pool.used > state.pool.capacity:
        state = preempt(state, 1)
    return evolve(state, pool=state.pool.evict())


def _housed(state: EngineState, tensors: Mapping[str, Tensor]) -> EngineState:
    """With blocks of the state's heap in place of the stand-ins, and their K and V in it."""
    stand_ins = state.blocks()
    blocks = [state.heap.allocate() for _ in stand_ins]
    for block, stand_in in zip(blocks, stand_ins, strict=True):
        block.claimed, block.content = stand_in.claimed, stand_in.content
    numbers, places = [block.index for block in stand_ins], [block.index for block in blocks]
    k, v = (tensors[name][:, numbers].to(state.heap.k.device) for name in ("k", "v"))
    state.heap.write(torch.tensor(places, dtype=torch.int64, device=k.device), k, v)
    home = dict(zip(numbers, blocks, strict=True))
    tables = (BlockTable.of(tuple(home[block.index] for block in s.table.blocks)) for s in state.running)
    running = tuple(evolve(s, table=table) for s, table in zip(state.running, tables, strict=True))
    return _pooled(evolve(state, running=running, pool=Pool(state.pool.capacity)), blocks)
