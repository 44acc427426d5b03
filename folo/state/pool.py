"""The block pool as a state sees it: what it uses, shares and could evict. A value like the rest."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from hashlib import blake2b
from struct import pack

from folo.state.evolve import evolve
from folo.state.heap import Block, Content
from folo.state.log import Log
from folo.state.map import Map

ROOT = b""  # the parent of a sequence's first block
DIGEST_SIZE = 16  # bytes


def block_digest(parent: bytes, token_ids: list[int], salt: str) -> bytes:
    """The content address of a full block: BLAKE2b over (parent's address, token ids, salt)."""
    digest = blake2b(parent, digest_size=DIGEST_SIZE, key=b"folo.kv", person=b"block")
    digest.update(pack(f"<{len(token_ids)}q", *token_ids))
    digest.update(salt.encode("utf-8", "surrogatepass"))
    return digest.digest()


def extend_digests(digests: Log[bytes], tokens: Log[int], block_size: int, salt: str) -> Log[bytes]:
    """The content addresses of all full blocks of `tokens`; `digests` has those of the first ones."""
    for number in range(len(digests), len(tokens) // block_size):
        parent = digests[number - 1] if number else ROOT
        ids = tokens[number * block_size : (number + 1) * block_size]
        digests = digests.append(block_digest(parent, ids, salt))
    return digests


@dataclass(frozen=True)
class Pool:
    """Accounting over the blocks that one state refers to.

    A block is *used* while a block table holds it, *idle* while only the prefix index does; idle
    ones are evicted when used + idle exceeds `capacity`.

    Tables that share blocks share a prefix: together they form a tree, in which every used block has
    one predecessor. So sharing is counted only where ways part: `branches` maps a block with more than
    one way on to the number of them, where a way on is a block that follows in some table, or the end
    of a table. Sharing a table of any length is one count at its end. Here are the tables of blocks
    0 1 2, 0 1 3 and 0 1:

        0 -- 1 -+- 2        used = 4, branches = {1: 3}
                +- 3        a fourth that ends after 1 (`hold`): {1: 4}
                +- end      0 1 3 is given up (`release`): used = 3, {1: 2}
    """

    capacity: int
    used: int = 0
    branches: Map[int, int] = field(default_factory=Map)  # block index -> ways on, if more than one
    index: Map[bytes, Block] = field(default_factory=Map)  # digest -> full, computed block
    idle: Map[int, int] = field(default_factory=Map)  # block index -> stamp: when it was released
    released: Map[int, Block] = field(default_factory=Map)  # stamp -> block, for eviction in that order
    oldest: int = 0  # no stamp of an idle block is below this
    clock: int = 0  # the next stamp

    @property
    def available(self) -> int:
        """How many fresh blocks could be taken, evicting what is idle."""
        return self.capacity - self.used

    def shared(self, tail: Block) -> bool:
        """Whether more than one table ends in, or goes through, a table's last block."""
        return tail.index in self.branches

    def cached(self, block: Block) -> bool:
        """Whether this very block stands in the prefix index."""
        content = block.content
        return content is not None and self.index.get(content.digest) is block

    def lookup(self, digest: bytes, parent: bytes, token_ids: list[int]) -> Block | None:
        """The cached block of this content; the tokens are compared, so a collision is a miss."""
        block = self.index.get(digest)
        if block is None or block.content != (digest, parent, tuple(token_ids)):
            return None
        return block

    def take(self, count: int) -> Pool:
        """Account for `count` fresh blocks at the ends of tables."""
        return evolve(self, used=self.used + count)

    def hold(self, blocks: Items[Block]) -> Pool:
        """Account for one more table of these blocks, each of them used or idle."""
        used, idle, released = self.used, self.idle, self.released
        branches = self.branches
        for block in reversed(blocks):
            i = block.index
            stamp = idle.get(i)
            if stamp is None:  # used, and so are all blocks before it
                branches = branches.set(i, (branches.get(i) or 1) + 1)
                break
            idle, released, used = idle.delete(i), released.delete(stamp), used + 1
        oldest = self.oldest if len(idle) else self.clock
        return evolve(self, used=used, branches=branches, idle=idle, released=released, oldest=oldest)

    def release(self, blocks: Items[Block]) -> Pool:
        """Account for one table less of these blocks. What no other table holds is idle if cached, else gone.

        The last block is released first, so that it is evicted before the blocks that it follows.
        """
        used, idle, released, clock = self.used, self.idle, self.released, self.clock
        branches = self.branches
        for block in reversed(blocks):
            i = block.index
            ways = branches.get(i)
            if ways is not None:
                branches = branches.delete(i) if ways == 2 else branches.set(i, ways - 1)
                break
            used -= 1
            if self.cached(block):
                idle, released, clock = idle.set(i, clock), released.set(clock, block), clock + 1
        return evolve(self, used=used, branches=branches, idle=idle, released=released, clock=clock)

    def part(self, blocks: Items[Block]) -> Pool:
        """A table takes a fresh block in place of its last one."""
        return self.take(1).hold(blocks[:-1]).release(blocks)

    def insert(self, block: Block, content: Content) -> Pool:
        """Index a full, computed block that a table holds."""
        return evolve(self, index=self.index.set(content.digest, block))

    def evict(self) -> Pool:
        """Let go of the idle blocks that exceed the capacity, those released first before others."""
        excess = min(self.used + len(self.idle) - self.capacity, len(self.idle))
        if excess <= 0:
            return self
        index, idle, released, oldest = self.index, self.idle, self.released, self.oldest
        for _ in range(excess):
            while (block := released.get(oldest)) is None:
                oldest += 1
            assert block.content is not None, "only full, computed blocks are indexed"
            index, idle = index.delete(block.content.digest), idle.delete(block.index)
            released, oldest = released.delete(oldest), oldest + 1
        return evolve(self, index=index, idle=idle, released=released, oldest=oldest)
