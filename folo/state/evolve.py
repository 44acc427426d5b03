"""A frozen dataclass with some of its fields changed."""

from __future__ import annotations

from typing import Any, TypeVar

T = TypeVar("T")

_new, _set = object.__new__, object.__setattr__


def evolve(value: T, **changes: Any) -> T:
    """`dataclasses.replace` for values without slots, at a fifth of its cost.

    A step changes every running sequence, so this is what a step's host time is made of. Nothing is
    validated, no __post_init__ runs, and cached properties are copied: it is for fields that the state's own
    transitions computed.
    """
    changed, fields = draft(value)
    fields.update(changes)
    return changed


def draft(value: T) -> tuple[T, dict[str, Any]]:
    """A copy of a value, and its `__dict__`, to be changed only before the copy is shared."""
    copy = _new(type(value))
    fields = value.__dict__.copy()
    _set(copy, "__dict__", fields)
    return copy, fields
