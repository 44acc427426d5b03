"""An immutable sequence with O(1) append: versions share one growing list."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar, overload

T = TypeVar("T")

_new = object.__new__


class Log(Generic[T]):
    """The first `len(self)` items of a list that only ever grows.

    Appending to the version that stands at the list's end extends the list in place, which no
    other version can see; appending to an older one copies first, because the next place is taken
    (the rule by which the KV heap writes its slots). So a linear history costs O(1) an item, and
    branching from any point in it stays valid.
    """

    __slots__ = ("_items", "length")

    def __init__(self, items: Iterable[T] = ()) -> None:
        self._items = list(items)
        self.length = len(self._items)

    def append(self, item: T) -> Log[T]:
        items = self._items
        if len(items) != self.length:
            items = items[: self.length]
        items.append(item)
        log = _new(Log)  # `_version` inlined: this runs for every token of every step
        log._items = items
        log.length = self.length + 1
        return log

    def extend(self, new: Iterable[T]) -> Log[T]:
        items = self._items
        if len(items) != self.length:
            items = items[: self.length]
        items.extend(new)
        return _version(items, len(items))

    def longer(self) -> Log[T]:
        """One item longer; that item is not known yet and must not be read."""
        return _version(self._items, self.length + 1)

    def continued_by(self, other: Log[T]) -> bool:
        """Whether `other` is a version of the same list and as long at least, so begins with this: O(1)."""
        return self._items is other._items and self.length <= other.length

    def first(self, length: int) -> Log[T]:
        """The first `length` items, at most all of them, in O(1)."""
        return _version(self._items, min(length, self.length))

    def __len__(self) -> int:
        return self.length

    @overload
    def __getitem__(self, key: int) -> T: ...
    @overload
    def __getitem__(self, key: slice) -> list[T]: ...
    def __getitem__(self, key: int | slice) -> T | list[T]:
        if isinstance(key, slice):
            start, stop, step = key.indices(self.length)
            return self._items[start:stop:step]
        if not -self.length <= key < self.length:
            raise IndexError(f"index {key} is outside a log of {self.length} items")
        return self._items[key if key >= 0 else self.length + key]

    def __iter__(self) -> Iterator[T]:
        return iter(self._items[: self.length])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Log) and self[:] == other[:]

    __hash__ = None  # pyright: ignore[reportAssignmentType]

    def __repr__(self) -> str:
        return f"Log({self[:]!r})"


def _version(items: list[T], length: int) -> Log[T]:
    log: Log[T] = Log.__new__(Log)
    log._items = items
    log.length = length
    return log


def gather(logs: Iterable[Log[T]], places: Iterable[int]) -> list[T]:
    """One item of each log, as `log[place]` without its checks: places are known to lie within."""
    return [log._items[place] for log, place in zip(logs, places, strict=True)]
