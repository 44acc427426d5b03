"""A persistent hash map: every version stays valid, an update copies O(log n) small nodes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Generic, TypeVar, cast

K = TypeVar("K")
V = TypeVar("V")

_BITS = 5
_WIDTH = 1 << _BITS
_MASK = _WIDTH - 1
_LEAF = 16  # a leaf that grows beyond this is split in _WIDTH
_DEPTH = 60 // _BITS  # below this the hash has no bits left: leaves only grow
_HOLE: dict[Any, Any] = {}  # the empty leaf; never written, like every other node


class Map(Generic[K, V]):
    """A hash trie (Bagwell 2001): inner nodes are tuples of 32 children, leaves are small dicts.

    Nothing that a state's behaviour depends on may depend on the order of iteration: Python's
    string hashes differ from process to process.
    """

    __slots__ = ("_root", "length")

    def __init__(self) -> None:
        self._root: Any = _HOLE
        self.length = 0

    def _version(self, root: Any, length: int) -> Map[K, V]:
        version: Map[K, V] = Map.__new__(Map)
        version._root = root
        version.length = length
        return version

    def _leaf(self, key: K) -> dict[K, V]:
        node, bits = self._root, hash(key)
        while type(node) is tuple:
            node = node[bits & _MASK]
            bits >>= _BITS
        return node

    def get(self, key: K) -> V | None:
        return self._leaf(key).get(key)

    def __getitem__(self, key: K) -> V:
        return self._leaf(key)[key]

    def __contains__(self, key: K) -> bool:
        return key in self._leaf(key)

    def set(self, key: K, value: V) -> Map[K, V]:
        grown = key not in self._leaf(key)
        return self._version(_set(self._root, hash(key), key, value, 0), self.length + grown)

    def delete(self, key: K) -> Map[K, V]:
        """Without `key`; raises KeyError if it is not there."""
        if key not in self._leaf(key):
            raise KeyError(key)
        return self._version(_delete(self._root, hash(key), key), self.length - 1)

    def __len__(self) -> int:
        return self.length

    def items(self) -> Iterator[tuple[K, V]]:
        stack = [self._root]
        while stack:
            node = stack.pop()
            if type(node) is tuple:
                stack.extend(node)
            else:
                yield from cast("dict[K, V]", node).items()

    def __iter__(self) -> Iterator[K]:
        return (key for key, _ in self.items())

    def __reduce__(self) -> tuple[Any, ...]:
        # Where an entry stands is decided by its hash, which may be another in the process that reads this.
        return _of, (dict(self.items()),)

    def __repr__(self) -> str:
        return f"Map({dict(self.items())!r})"


def _of(entries: dict[K, V]) -> Map[K, V]:
    built = Map[K, V]()
    for key, value in entries.items():
        built = built.set(key, value)
    return built


def _set(node: Any, bits: int, key: Any, value: Any, depth: int) -> Any:
    if type(node) is tuple:
        children = list(node)
        at = bits & _MASK
        children[at] = _set(children[at], bits >> _BITS, key, value, depth + 1)
        return tuple(children)
    leaf = {**node, key: value}
    if len(leaf) <= _LEAF or depth >= _DEPTH:
        return leaf
    children = [_HOLE] * _WIDTH
    for k, v in leaf.items():
        at = (hash(k) >> (_BITS * depth)) & _MASK
        children[at] = {**children[at], k: v}
    return tuple(children)


def _delete(node: Any, bits: int, key: Any) -> Any:
    if type(node) is tuple:
        at = bits & _MASK
        child = _delete(node[at], bits >> _BITS, key)
        if not child and all(n is node[at] or not n for n in node):
            return _HOLE  # the last entry below this node is gone
        children = list(node)
        children[at] = child
        return tuple(children)
    return {k: v for k, v in node.items() if k != key}
