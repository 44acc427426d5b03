"""How CUDA graphs are captured, as far as it shows without a GPU: torch's part is played by stand-ins."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

import pytest
import torch
from torch import Tensor

from folo.graph import CudaGraphs


class Graph:
    """In place of torch.cuda.CUDAGraph."""

    def replay(self) -> None:
        pass


@pytest.fixture
def pools(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The pools that graphs are captured into, each on one stream."""
    used, handles, streams = list[int](), count(), dict[int, object]()

    @contextmanager
    def graph(_: Graph, pool: int, stream: object) -> Iterator[None]:
        assert streams.setdefault(pool, stream) is stream
        used.append(pool)
        yield

    stand_ins = {"CUDAGraph": Graph, "graph": graph, "graph_pool_handle": lambda: next(handles)}
    stand_ins |= {"Stream": object, "current_device": lambda: 0}
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    return used


def test_graphs_share_a_pool_until_the_last_of_them_is_gone(pools: list[int]) -> None:
    graphs = CudaGraphs()
    held: list[Any] = [graphs.capture(lambda: torch.zeros(1)) for _ in range(2)]
    del held[0]
    held.append(graphs.capture(lambda: torch.zeros(1)))
    held.clear()
    graphs.capture(lambda: torch.zeros(1))
    assert pools == [0, 0, 0, 1]


def test_each_device_has_a_pool_and_a_stream_of_its_own(
    pools: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs, held = CudaGraphs(), []
    for device in (1, 0, 1):
        monkeypatch.setattr(torch.cuda, "current_device", lambda device=device: device)
        held.append(graphs.capture(lambda: torch.zeros(1)))
    assert pools == [0, 1, 0]


def test_nothing_is_collected_during_a_capture(pools: list[int]) -> None:
    enabled = list[bool]()

    def function() -> Tensor:
        enabled.append(gc.isenabled())
        if len(enabled) == 4:
            raise RuntimeError("in a capture")
        return torch.zeros(1)

    graphs = CudaGraphs()
    graphs.capture(function)
    assert enabled == [True, False], "warming up, capturing"
    with pytest.raises(RuntimeError, match="in a capture"):
        graphs.capture(function)
    assert gc.isenabled()
