"""The KV heap: the one thing in folo that is physically mutable, and never shows in a result."""

from __future__ import annotations

import gc
from functools import partial
from itertools import islice
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor

from folo.errors import OutOfBlocksError
from folo.ops import kv_cache


class Content(NamedTuple):
    """The content of a full block: K and V of `token_ids`, preceded by the block with digest `parent`."""

    digest: bytes
    parent: bytes
    token_ids: tuple[int, ...]


class Block:
    """One physical block of the heap, alive as long as anything refers to it.

    States and prefix indexes share blocks by sharing the object. `claimed` counts its slots that a
    step has ever set out to write: raised before the write, never lowered, so a slot is written
    once. A step that would write at a claimed slot takes a fresh block instead (copy-on-write).
    `content` is noted once, when the block is full and computed: a fact about it from then on.
    """

    __slots__ = ("__weakref__", "claimed", "content", "index")

    def __init__(self, index: int) -> None:
        self.index = index
        self.claimed = 0
        self.content: Content | None = None

    def __repr__(self) -> str:
        return f"Block({self.index}, claimed={self.claimed})"


class KVHeap:
    """Preallocated K and V blocks at fixed addresses, and the list of the free ones.

    `k` and `v`: `[num_layers, num_blocks, ...]`, as `folo.ops.kv_cache` lays them; zero at first, so that no
    kernel ever meets a NaN that nobody wrote.
    """

    def __init__(
        self,
        shape: tuple[int, int, int, int, int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        with torch.inference_mode(False):  # an inference tensor could not be written outside that mode
            self.k, self.v = kv_cache.zeros(shape, dtype, device)
        self.num_blocks = shape[1]
        # Last in, first out: warm blocks are reused. A dict used as a stack (only its keys count): a dead
        # block's weakref callback puts its index back by C code alone, whereas an interrupt in a Python
        # __del__ would lose the block.
        self._free: dict[int, Any] = dict.fromkeys(range(shape[1] - 1, -1, -1))
        self._alive: dict[int, ref[Block]] = {}

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self) -> Block:
        """A free block. Raises OutOfBlocksError if every block is referred to by something."""
        if not self._free:
            gc.collect()  # states can hang in reference cycles: a traceback and its frames, for one
        taken: dict[int, Any] = {}
        try:
            # From one dict into the other by C alone, too: wherever an interrupt comes, the index is in one
            # of them, or that of a block that lives.
            taken.update(islice(iter(self._free.popitem, None), 1))
            (index,) = taken
            block = Block(index)
            self._watch(block)
            taken.clear()
            return block
        except KeyError:
            raise OutOfBlocksError(f"all {self.num_blocks} blocks of the KV heap are in use") from None
        finally:
            if taken:
                # The interrupt's traceback may hold the Block: forget its weakref, or its late death would
                # free an index that another Block has by then.
                for index in taken:
                    self._alive.pop(index, None)
                self._free.update(taken)

    def _watch(self, block: Block) -> None:
        self._alive[block.index] = ref(block, partial(self._free.setdefault, block.index))

    def __getstate__(self) -> dict[str, Any]:
        blocks = [block for watched in self._alive.values() if (block := watched())]
        return {**self.__dict__, "_alive": blocks, "_free": dict.fromkeys(self._free)}

    def __setstate__(self, fields: dict[str, Any]) -> None:
        self.__dict__.update(fields, _alive={})
        for block in fields["_alive"]:
            self._watch(block)

    def read(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """K and V of whole blocks, indices int64 `[B]` -> `[num_layers, B, block_size, heads, head_dim]`."""
        return kv_cache.read(self.k, self.v, *self._slots(blocks))

    def write(self, blocks: Tensor, k: Tensor, v: Tensor) -> None:
        """Write K and V of whole blocks, shaped as `read` returns them."""
        kv_cache.write(self.k, self.v, *self._slots(blocks), k, v)

    def _slots(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        return blocks[:, None], torch.arange(self.k.shape[2], device=blocks.device)
