"""An immutable sequence with O(1) append: versions share one growing list."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar, overload

T = TypeVar("T")


class Log(Generic[T]):
    """The first `len(self)` items of a list that only ever grows.

    Appending to the version that stands at the list's end extends the list in place, which no
    other version can see; appending to an older one copies first, because the next place is taken
    (the rule by which the KV heap writes its slots). So a linear history costs O(1) an item, and
    branching from any point in it stays valid.
    """

    __slots__ = ("_items", "_length")

    def __init__(self, items: Iterable[T] = ()) -> None:
        self._items = list(items)
        self._length = len(self._items)

    def _version(self, items: list[T]) -> Log[T]:
        log: Log[T] = Log.__new__(Log)
        log._items = items
        log._length = len(items)
        return log

    def append(self, item: T) -> Log[T]:
        items = self._items
        if len(items) != self._length:
            items = items[: self._length]
        items.append(item)
        return self._version(items)

    def extend(self, new: Iterable[T]) -> Log[T]:
        items = self._items
        if len(items) != self._length:
            items = items[: self._length]
        items.extend(new)
        return self._version(items)

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, key: int) -> T: ...
    @overload
    def __getitem__(self, key: slice) -> list[T]: ...
    def __getitem__(self, key: int | slice) -> T | list[T]:
        if isinstance(key, slice):
            start, stop, step = key.indices(self._length)
            return self._items[start:stop:step]
        if not -self._length <= key < self._length:
            raise IndexError(f"index {key} is outside a log of {self._length} items")
        return self._items[key if key >= 0 else self._length + key]

    def __iter__(self) -> Iterator[T]:
        return iter(self._items[: self._length])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Log) and self[:] == other[:]

    __hash__ = None  # pyright: ignore[reportAssignmentType]

    def __repr__(self) -> str:
        return f"Log({self[:]!r})"
