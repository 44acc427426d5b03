"""Frozen dataclasses as nodes of torch's pytrees."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from torch.utils import _pytree as pytree


def register(cls: type, context: tuple[str, ...] = ()) -> None:
    """Register `cls` as a node: its fields are children, except `context`, which every tree keeps.

    A field that is None is context too: torch's pytree would call it a leaf, which
    `tree_map(torch.Tensor.double, params)` and `torch.func.grad` would then trip over.
    """
    names = [field.name for field in fields(cls) if field.name not in context]

    def flatten_with_keys(value: Any) -> tuple[list[Any], Any]:
        present = [name for name in names if getattr(value, name) is not None]
        extra = {name: getattr(value, name) for name in (*names, *context) if name not in present}
        return [(pytree.GetAttrKey(name), getattr(value, name)) for name in present], tuple(extra.items())

    def flatten(value: Any) -> tuple[list[Any], Any]:
        children, extra = flatten_with_keys(value)
        return [child for _, child in children], extra

    def unflatten(children: Any, extra: Any) -> Any:
        rest = dict(extra)
        present = (name for name in names if name not in rest)
        return cls(**dict(zip(present, children, strict=True)), **rest)

    pytree.register_pytree_node(
        cls,
        flatten,
        unflatten,
        serialized_type_name=f"folo.{cls.__name__}",
        flatten_with_keys_fn=flatten_with_keys,
    )
