"""Arrays between host and device: many at once, in one copy, and without waiting for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

_ALIGNMENT = 64  # bytes: what a kernel is compiled for may depend on a pointer's alignment
T = TypeVar("T")


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def upload(tree: T, device: torch.device) -> T:
    """A tree of host tensors, on the device; on a CPU the tree itself."""
    return tree if device.type == "cpu" else Fixed(tree, device).tree


def download(tree: T) -> Callable[[], T]:
    """Begin to copy a tree of tensors to the host; the function returned waits for it, as often as called."""
    if not any(tensor.is_cuda for tensor in _tensors(tree)):
        return lambda: tree

    def copied(tensor: Tensor) -> Tensor:
        host = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
        return host.copy_(tensor, non_blocking=True)

    host = pytree.tree_map_only(Tensor, copied, tree)
    done = torch.cuda.Event()
    done.record()

    def wait() -> Any:
        done.synchronize()
        return host

    return wait


class Fixed(Generic[T]):
    """Device tensors at fixed addresses, which hold a tree of host tensors until another is filled in.

    They are views of one buffer, which one copy fills. `tree` is what a captured graph reads.
    """

    def __init__(self, tree: T, device: torch.device) -> None:
        self._places: list[slice] = []
        end = 0
        for tensor in _tensors(tree):
            self._places.append(slice(end, end + tensor.nbytes))
            end += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        self._buffer = torch.empty(end, dtype=torch.uint8, device=device)
        places = iter(self._places)

        def view(leaf: Tensor) -> Tensor:
            return self._buffer[next(places)].view(leaf.dtype).view(leaf.shape)

        self.tree: T = pytree.tree_map_only(Tensor, view, tree)
        self.fill(tree)

    def fill(self, tree: T) -> T:
        """Copy in host tensors of the same shapes and dtypes; returns the tree of device tensors.

        The copy does not block; torch keeps the page-locked memory that it reads until it is done.
        """
        cuda = self._buffer.is_cuda
        host = torch.empty(self._buffer.shape, dtype=torch.uint8, device="cpu", pin_memory=cuda)
        for tensor, place in zip(_tensors(tree), self._places, strict=True):
            host[place].view(tensor.dtype).copy_(tensor.reshape(-1))
        self._buffer.copy_(host, non_blocking=True)
        return self.tree
