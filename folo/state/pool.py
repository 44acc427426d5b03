"""The block pool as a state sees it: what it uses, shares and could evict. A value like the rest."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from hashlib import blake2b

import numpy as np

from folo.state.heap import Block
from folo.state.log import Log
from folo.state.map import Map

ROOT = b""  # the parent of a sequence's first block


def block_digest(parent: bytes, token_ids: list[int], salt: str) -> bytes:
    """The content address of a full block: BLAKE2b over (parent's address, token ids, salt)."""
    digest = blake2b(parent, digest_size=16, key=b"folo.kv", person=b"block")
    digest.update(np.asarray(token_ids, "<i8").tobytes())
    digest.update(salt.encode("utf-8", "surrogatepass"))
    return digest.digest()


def extend_digests(digests: Log[bytes], tokens: Log[int], block_size: int, salt: str) -> Log[bytes]:
    """The content addresses of all full blocks of `tokens`, of which some are there already."""
    for number in range(len(digests), len(tokens) // block_size):
        parent = digests[number - 1] if number else ROOT
        ids = tokens[number * block_size : (number + 1) * block_size]
        digests = digests.append(block_digest(parent, ids, salt))
    return digests


@dataclass(frozen=True)
class Entry:
    """A full, computed block in the prefix index, with what its digest stands for."""

    block: Block
    parent: bytes
    token_ids: tuple[int, ...]


@dataclass(frozen=True)
class Pool:
    """Accounting over the blocks that one state refers to.

    A block is *used* while a block table holds it, *idle* while only the prefix index does; idle
    ones are evicted when a fresh block is needed and used + idle has reached `capacity`.
    """

    capacity: int
    used: int = 0
    sharers: Map[int, int] = field(default_factory=Map)  # block index -> tables that hold it, if > 1
    index: Map[bytes, Entry] = field(default_factory=Map)  # digest -> entry
    digests: Map[int, bytes] = field(default_factory=Map)  # block index -> digest, for indexed blocks
    idle: Map[int, int] = field(default_factory=Map)  # block index -> when it was released
    released: Map[int, int] = field(default_factory=Map)  # the inverse, for eviction in that order
    oldest: int = 0  # no idle block was released before this
    clock: int = 0

    @property
    def available(self) -> int:
        """How many fresh blocks could be taken, evicting what is idle."""
        return self.capacity - self.used

    def shared(self, block: Block) -> bool:
        return block.index in self.sharers

    def lookup(self, digest: bytes, parent: bytes, token_ids: list[int]) -> Block | None:
        """The cached block of this content; the tokens are compared, so a collision is a miss."""
        entry = self.index.get(digest)
        if entry is None or entry.parent != parent or entry.token_ids != tuple(token_ids):
            return None
        return entry.block

    def take(self, count: int) -> Pool:
        """Account for `count` fresh blocks, evicting idle ones where the capacity asks for it."""
        pool = replace(self, used=self.used + count)
        while pool.used + len(pool.idle) > pool.capacity and len(pool.idle):
            pool = pool._evict()
        return pool

    def _evict(self) -> Pool:
        # A chain is released last block first, so the oldest idle block has no indexed child.
        oldest = self.oldest
        while oldest not in self.released:
            oldest += 1
        block_index = self.released[oldest]
        return replace(
            self,
            index=self.index.delete(self.digests[block_index]),
            digests=self.digests.delete(block_index),
            idle=self.idle.delete(block_index),
            released=self.released.delete(oldest),
            oldest=oldest + 1,
        )

    def hold(self, block: Block) -> Pool:
        """One more table refers to a block that this pool knows."""
        i = block.index
        stamp = self.idle.get(i)
        if stamp is not None:
            idle, released = self.idle.delete(i), self.released.delete(stamp)
            oldest = stamp + 1 if stamp == self.oldest else self.oldest
            return replace(
                self,
                used=self.used + 1,
                idle=idle,
                released=released,
                oldest=oldest if len(idle) else self.clock,
            )
        return replace(self, sharers=self.sharers.set(i, (self.sharers.get(i) or 1) + 1))

    def release(self, blocks: Iterable[Block]) -> Pool:
        """One table less refers to each of the blocks; give a chain last block first."""
        pool = self
        for block in blocks:
            i = block.index
            count = pool.sharers.get(i)
            if count is not None:
                sharers = pool.sharers.delete(i) if count == 2 else pool.sharers.set(i, count - 1)
                pool = replace(pool, sharers=sharers)
            elif i in pool.digests:
                pool = replace(
                    pool,
                    used=pool.used - 1,
                    idle=pool.idle.set(i, pool.clock),
                    released=pool.released.set(pool.clock, i),
                    clock=pool.clock + 1,
                )
            else:
                pool = replace(pool, used=pool.used - 1)
        return pool

    def insert(self, digest: bytes, entry: Entry) -> Pool:
        """Index a full, computed block that a table holds."""
        return replace(
            self,
            index=self.index.set(digest, entry),
            digests=self.digests.set(entry.block.index, digest),
        )
