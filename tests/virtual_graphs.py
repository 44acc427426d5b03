"""CUDA graphs of a virtual device: calls that are recorded, not run, and replayed on the same memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple
from weakref import WeakSet, ref

from graphs import spoil
from torch import Tensor


class Memory:
    """What tensors and their views share, alive as long as one of them is."""

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes


class Call(NamedTuple):
    run: Callable[[], object]
    touched: list[ref[Memory]]


class Pool:
    """Memory that graphs share: none of it is of use once another of them was replayed."""

    def __init__(self) -> None:
        self.graphs = WeakSet[Graph]()
        self.opened = False


class Graph:
    """In place of torch.cuda.CUDAGraph."""

    def __init__(self) -> None:
        self._calls: list[Call] = []
        self._own: list[tuple[Memory, Tensor]] = []
        self._pool = Pool()

    def begin(self, pool: Pool) -> None:
        if pool.opened and not pool.graphs:
            raise RuntimeError("the pool ended with the last of its graphs")
        pool.opened = True
        pool.graphs.add(self)
        self._pool = pool

    def allocated(self, memory: Memory, host: Tensor) -> None:
        """Memory that the graph was given while it was captured: it stays the graph's."""
        self._own.append((memory, host))

    def record(self, run: Callable[[], object], touched: Iterable[Memory]) -> None:
        self._calls.append(Call(run, [ref(memory) for memory in touched]))

    def replay(self) -> None:
        for graph in self._pool.graphs:
            for _, host in graph._own:
                spoil(host)
        for call in self._calls:
            if any(memory() is None for memory in call.touched):
                raise RuntimeError("a graph is replayed on memory that was freed after its capture")
            call.run()
