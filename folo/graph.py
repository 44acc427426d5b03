"""The device function as graphs: decodes of a padded batch are captured once and replayed.

A replay launches all kernels of a step in one call, which is most of what a step costs the host. It reads and
writes fixed addresses: so inputs are copied in, and results are copied out before anyone sees them.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple, Protocol
from weakref import WeakKeyDictionary, WeakSet

import torch
import torch.nn.functional as F
from torch import Tensor

from folo import ops
from folo.inputs import NO_LOGPROBS, Inputs, Rows
from folo.model import device
from folo.model.params import Params
from folo.padding import bucket, decode_sizes, padded, padded_rows, table_width
from folo.state.engine import EngineState
from folo.state.heap import KVHeap
from folo.transfer import Fixed, upload

Replay = Callable[[], None]


class Recorder(Protocol):
    """Captures what a function launches."""

    def capture(self, function: Callable[[], Tensor]) -> tuple[Replay, Tensor]:
        """Run `function`, which reads tensors at fixed addresses -> how to run it again, and its output.

        A replay writes the same output tensor.
        """
        ...


class _Device:
    """What a device's graphs share: the stream that captures them, and their memory pool."""

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()
        self.pool: Any = None
        self.alive = WeakSet[torch.cuda.CUDAGraph]()


class CudaGraphs:
    """CUDA graphs of the current device.

    Those of a device share a memory pool, so that they have to be replayed one after the other.
    """

    def __init__(self) -> None:
        self._devices: dict[int, _Device] = {}

    def capture(self, function: Callable[[], Tensor]) -> tuple[Replay, Tensor]:
        if (number := torch.cuda.current_device()) not in self._devices:
            self._devices[number] = _Device()  # torch's capture stream is on one device
        own = self._devices[number]
        if not own.alive:  # a pool dies with its last graph, and torch adds no other to it
            own.pool = torch.cuda.graph_pool_handle()
        function()  # kernels are compiled and loaded, which cannot be captured
        graph = torch.cuda.CUDAGraph()
        with _uncollected(), torch.cuda.graph(graph, pool=own.pool, stream=own.stream):
            output = function()
        own.alive.add(graph)
        return graph.replay, output


@contextmanager
def _uncollected() -> Iterator[None]:
    """No garbage collection: a graph that one finds and destroys would break the capture of another."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class Kind(NamedTuple):
    """What a graph was captured for. sampling: it ends with token ids; otherwise with hidden states."""

    width: int  # of the block tables
    sampling: bool
    warped: bool = False
    truncated: bool = False


class _Graph(NamedTuple):
    inputs: Fixed[Inputs]
    replay: Replay
    output: Tensor


class Graphs:
    """The device function over replayed graphs: what `folo.step` computes, bit for bit.

    Graphs belong to this object, by heap: they die with the heap, and are captured anew for other params.
    """

    def __init__(self, recorder: Recorder, layer_function: Any) -> None:
        self._recorder, self._layer = recorder, layer_function
        self._captured: WeakKeyDictionary[KVHeap, tuple[Params, dict[Kind, dict[int, _Graph]]]]
        self._captured = WeakKeyDictionary()

    def decode(
        self, params: Params, state: EngineState, inputs: Inputs, previous: Tensor | None, kind: Kind
    ) -> Tensor:
        """Decode one token of each sequence: ids int64 `[S]` if `kind.sampling`, else hidden states `[S, D]`.

        Args:
            inputs: on the host.
            previous: the ids of the step in flight, int64 `[P]`, which `inputs.source` indexes; None without.
        """
        count, heap = inputs.seq_lens.shape[0], state.heap
        if inputs.copy_source.numel():
            source, target = upload((inputs.copy_source, inputs.copy_target), params.device)
            ops.copy_blocks(heap.k, heap.v, source, target)
        graphs = self._graphs(params, state, kind)
        graph = graphs[size := min(size for size in graphs if size >= count)]
        fixed = graph.inputs.fill(_fitted(inputs, size, kind))
        if previous is not None:
            device.resolve(fixed, previous)
        graph.replay()
        return graph.output[:count].clone()

    def _graphs(self, params: Params, state: EngineState, kind: Kind) -> dict[int, _Graph]:
        heap = state.heap
        of, graphs = self._captured.get(heap, (params, {}))
        if of is not params:
            graphs = {}
        self._captured[heap] = params, graphs
        captured, sizes = graphs.setdefault(kind, {}), decode_sizes(state.scheduler.max_num_seqs)
        for size in reversed(sizes):  # the smaller ones find room in the memory that the largest took
            if size not in captured:
                captured[size] = self._capture(params, heap.k, heap.v, state.attention, kind, size)
        return captured

    def _capture(self, params: Params, k: Tensor, v: Tensor, attention: str, kind: Kind, size: int) -> _Graph:
        fixed = Fixed(_fitted(_NOTHING, size, kind), params.device)

        def function() -> Tensor:
            hidden = device.run(params, k, v, fixed.tree, attention, self._layer)
            if not kind.sampling:
                return hidden
            tiles = device.tiles_of(hidden, fixed.tree.rows)
            return torch.cat([device.sample(*device.row_logits(params, *t), t[1]).ids for t in tiles])

        return _Graph(fixed, *self._recorder.capture(function))


def kind_of(inputs: Inputs, widest: int) -> Kind:
    """The graph that these decodes take; `widest`: the most columns that block tables can have."""
    width, tiles = table_width(inputs.block_tables.shape[1], widest), inputs.rows
    if any(tile.penalties is not None or tile.num_logprobs != NO_LOGPROBS for tile in tiles):
        return Kind(width, sampling=False)
    return Kind(width, True, any(t.warped for t in tiles), any(t.truncated for t in tiles))


def _fitted(inputs: Inputs, size: int, kind: Kind) -> Inputs:
    """Padded, and without what no graph reads: copies are made before, other rows are sampled after."""
    rows = padded_rows(inputs.rows, size, kind.warped, kind.truncated) if kind.sampling else ()
    if inputs.source is None:
        inputs = replace(inputs, source=torch.full_like(inputs.token_ids, -1))
    none = inputs.copy_source[:0]
    return replace(padded(inputs, size, size, kind.width), rows=rows, copy_source=none, copy_target=none)


def bucketed(inputs: Inputs, widest: int) -> Inputs:
    """Padded to one of few shapes, for what is compiled for shapes; its tiles of rows stay as they are."""
    width = table_width(inputs.block_tables.shape[1], widest)
    if (wanted := inputs.logits_rows) is not None:  # two at least: one would be compiled apart
        extra = bucket(max(2, wanted.shape[0])) - wanted.shape[0]
        inputs = replace(inputs, logits_rows=F.pad(wanted, (0, extra)))
    return padded(inputs, bucket(inputs.token_ids.shape[0]), bucket(inputs.seq_lens.shape[0] + 1), width)


def _nothing() -> Inputs:
    whole, real = torch.zeros(0, dtype=torch.int64), torch.zeros(0)
    lengths, tables = torch.zeros(0, dtype=torch.int32), torch.zeros((0, 0), dtype=torch.int32)
    start = torch.zeros(1, dtype=torch.int32)
    rows = Rows(
        *(whole, real, real, whole, real, whole, whole, whole, torch.zeros(0, dtype=torch.bool)),
        *(None, False, False, NO_LOGPROBS),
    )
    return Inputs(whole, whole, whole, start, lengths, tables, whole, whole, None, (rows,))


_NOTHING = _nothing()  # what a capture runs: padding alone
