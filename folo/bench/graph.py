"""`folo bench graph`: a decode step run eagerly, compiled, and replayed as a CUDA graph.

For batches of 1 to 256 sequences and contexts of 128 to 8k tokens, on one model: the time from one step to
the next while steps follow each other (p50 and p99, by the device's clock); the host's time for one, its
waits for the device left out; how many launches it makes; what capturing took; and the share of the floor,
which is the time to read the weights and the context once, at the rate of a copy measured in the same run.
No step waits for its tokens, in any of the three modes.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

import torch
from torch import profiler
from tqdm import tqdm

import folo
from folo.bench import report
from folo.bench.growth import decoding
from folo.errors import ConfigError
from folo.graph import CudaGraphs, Recorder
from folo.model.forward import layer_in_heap
from folo.state.flight import landed
from folo.step import launched, replayed

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
CONTEXTS = (128, 512, 1024, 2048, 4096, 8192)
MODES = ("eager", "inductor", "graph")
_STEPS, _WARM = 60, 4
MOST_STEPS = 2 * _STEPS  # more than `measure` takes
_MOST = 0.6  # of the device's memory: cells beyond it do not fit
_COPIED = 1 << 30  # bytes
_IDLE = 0.3  # seconds of work until an idle GPU runs at its full clock rate
_LAUNCHES = ("cudaLaunch", "cuLaunch", "cudaGraphLaunch")


@dataclass(frozen=True)
class Cell:
    """One mode at one size. Seconds, except where named otherwise; None: it was not measured."""

    mode: str
    batch: int
    context: int
    p50: float
    p99: float
    host: float
    capture: float  # the first step, in which graphs are captured and kernels compiled
    capture_bytes: int | None
    floor: float
    launches: int | None = None  # of kernels and graphs, in one step

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return self.batch / self.p50

    @property
    def share(self) -> float:
        """The floor over the median time: how near a step comes to it."""
        return self.floor / self.p50


class Clock:
    """Marks in the work of a device, and the seconds between them."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[Any] = []

    def mark(self) -> None:
        if self._cuda:
            self._marks.append(torch.cuda.Event(enable_timing=True))
            self._marks[-1].record()
        else:
            self._marks.append(time.perf_counter())

    def between(self) -> list[float]:
        """Seconds from each mark to the next."""
        self.wait()
        pairs = zip(self._marks, self._marks[1:], strict=False)
        return [1e-3 * a.elapsed_time(b) if self._cuda else b - a for a, b in pairs]

    def wait(self) -> None:
        if self._cuda:
            torch.cuda.synchronize()


def copy_rate(device: torch.device) -> float:
    """Bytes a second that a large copy reads and writes."""
    source = torch.ones(_COPIED // 8, dtype=torch.int64, device=device)
    target, clock, begin = torch.empty_like(source), Clock(device), time.perf_counter()
    while time.perf_counter() - begin < _IDLE:
        target.copy_(source)
        clock.wait()
    for _ in range(6):
        clock.mark()
        target.copy_(source)
    return 2 * _COPIED / min(clock.between()[1:])


def read_bytes(params: folo.Params, batch: int, context: int) -> int:
    """What a decode step has to read: the weights, once, and K and V of every sequence."""
    return params.num_bytes + batch * context * params.config.kv_per_token * params.dtype.itemsize


def steps_of(mode: str, recorder: Recorder | None) -> folo.Step:
    """The step of a mode; recorder: what captures the graphs."""
    if mode == "eager":
        return launched(layer_in_heap)
    layer = torch.compile(layer_in_heap, fullgraph=True, dynamic=True)
    return launched(layer) if mode == "inductor" else replayed(recorder or CudaGraphs(), layer)


def measure(
    params: folo.Params, state: folo.EngineState, mode: str, context: int, rate: float, recorder: Any = None
) -> Cell:
    """Time steps of a state whose sequences all decode. rate: bytes a second, for the floor."""
    step, clock, batch = steps_of(mode, recorder), Clock(params.device), len(state.running)
    before, begin = _reserved(params.device), time.perf_counter()
    state = _stepped(params, state, step)
    clock.wait()
    capture, taken = time.perf_counter() - begin, _reserved(params.device)
    for _ in range(_WARM):
        state = _stepped(params, state, step)
    for _ in range(_STEPS):
        clock.mark()
        state = _stepped(params, state, step)
    clock.mark()
    times, host = sorted(clock.between()), list[float]()
    for _ in range(_STEPS // 4):
        state = landed(state)
        clock.wait()
        begin = time.perf_counter()
        state = _stepped(params, state, step)
        on_the_way = time.perf_counter() - begin
        clock.wait()
        begin = time.perf_counter()
        folo.has_unfinished(state)  # lands it: the epilogue
        host.append(on_the_way + time.perf_counter() - begin)
    return Cell(
        *(mode, batch, context, median(times), times[int(0.99 * len(times))], median(host)),
        capture=capture,
        capture_bytes=None if before is None or taken is None else taken - before,
        floor=read_bytes(params, batch, context) / rate,
    )


def _stepped(params: folo.Params, state: folo.EngineState, step: folo.Step) -> folo.EngineState:
    batch = folo.schedule(state)
    assert batch is not None
    return step(params, state, batch)[0]


def _reserved(device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    torch.cuda.empty_cache()  # as a capture does: else memory that was free before it would distort the count
    return torch.cuda.memory_reserved(device)


def with_launches(params: folo.Params, cell: Cell) -> Cell:
    """The cell with its launches counted. By a profiler, which slows whatever its process runs after it."""
    state, step = decoding(params, cell.batch, cell.context, steps=2), steps_of(cell.mode, None)
    state = _stepped(params, state, step)
    activities = [profiler.ProfilerActivity.CPU, profiler.ProfilerActivity.CUDA]
    with profiler.profile(activities=activities, acc_events=True) as found:  # without it, torch 2.11 warns
        _stepped(params, state, step)
    return replace(cell, launches=sum(event.name.startswith(_LAUNCHES) for event in found.events() or ()))


def fits(params: folo.Params, batch: int, context: int) -> bool:
    """Whether the weights and the context take no more than `_MOST` of the device's memory."""
    if params.device.type != "cuda":
        return True
    _, total = torch.cuda.mem_get_info(params.device)
    return read_bytes(params, batch, context) < _MOST * total


def measure_size(
    params: folo.Params, batch: int, context: int, rate: float, recorder: Any = None
) -> list[Cell]:
    """The cells of one size, or none if it does not fit."""
    if not fits(params, batch, context):
        return []
    state = decoding(params, batch, context, steps=MOST_STEPS)
    return [measure(params, state, mode, context, rate, recorder) for mode in MODES]


def table(cells: list[Cell]) -> str:
    eager = {(c.batch, c.context): c.p50 for c in cells if c.mode == "eager"}
    rows = [
        [
            *(c.batch, c.context, c.mode, f"{1e3 * c.p50:.3f}", f"{1e3 * c.p99:.3f}", f"{1e3 * c.host:.3f}"),
            *("-" if c.launches is None else c.launches, f"{c.capture:.1f}"),
            "-" if c.capture_bytes is None else f"{c.capture_bytes / 2**20:.0f}",
            *(f"{c.rate:,.0f}", f"{100 * c.share:.0f} %", f"{eager[c.batch, c.context] / c.p50:.2f}"),
        ]
        for c in cells
    ]
    headers = ["batch", "context", "mode", "p50, ms", "p99, ms", "host, ms", "launches", "first, s", "MiB"]
    return report.table([*headers, "tokens/s", "of the floor", "times eager"], rows)


def plot(cells: list[Cell], path: str) -> None:
    """p50 against the batch, a panel for each context."""
    from matplotlib.figure import Figure

    contexts = sorted({c.context for c in cells})
    figure = Figure(figsize=(3.4 * len(contexts), 3.4), layout="constrained")
    panels = figure.subplots(1, len(contexts), squeeze=False)[0]
    for axes, context in zip(panels, contexts, strict=True):
        for mode, colour in zip(MODES, (report.ORANGE, report.GREEN, report.BLUE), strict=True):
            own = [c for c in cells if (c.mode, c.context) == (mode, context)]
            batches, times = [c.batch for c in own], [1e3 * c.p50 for c in own]
            axes.plot(batches, times, "o-", color=colour, label=mode, markersize=3)
        own = [c for c in cells if (c.mode, c.context) == ("graph", context)]
        axes.plot([c.batch for c in own], [1e3 * c.floor for c in own], "--", color="black", label="floor")
        axes.set(xscale="log", yscale="log", xlabel="batch", title=f"context {context}")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("ms a decode step")
    panels[0].legend()
    figure.savefig(path, dpi=150)


def register(commands: Any) -> None:
    parser = commands.add_parser(
        "graph",
        help="a decode step eager, compiled and replayed as a CUDA graph",
        description="Time decode steps run eagerly, compiled and replayed as CUDA graphs, for batches of 1 "
        "to 256 and contexts of 128 to 8k tokens, beside the floor that reading memory sets.",
        allow_abbrev=False,
    )
    report.add_model_options(parser)
    for name, default in (("batches", BATCHES), ("contexts", CONTEXTS)):
        parser.add_argument(f"--{name}", type=report.positive, nargs="+", default=default, metavar="N")
    report.add_output_options(parser, plot=True)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    if not torch.cuda.is_available():
        raise ConfigError("folo bench graph needs a CUDA device, and torch finds none")
    params = report.model_of(args)
    sizes = [(batch, context) for context in args.contexts for batch in args.batches]
    found, rate = dict[tuple[int, int], list[Cell]](), copy_rate(params.device)
    try:
        for size in tqdm(sizes, desc="Graph", unit="size"):
            found[size] = measure_size(params, *size, rate)
        for batch, context in sizes[: len(args.batches)]:  # launches hardly depend on the context
            own = found[batch, context]
            found[batch, context] = [with_launches(params, cell) for cell in own]
    finally:  # if it is cut short, report what there is
        _report(args, params, rate, found)


def _report(
    args: argparse.Namespace, params: folo.Params, rate: float, found: dict[tuple[int, int], list[Cell]]
) -> None:
    cells = [cell for own in found.values() for cell in own]
    large = [size for size, own in found.items() if not own]
    print(table(cells))
    for batch, context in large:
        print(f"batch {batch} at context {context} does not fit into {100 * _MOST:.0f} % of the memory")
    print(f"\ncopying: {rate / 1e9:,.0f} GB/s")
    if args.json:
        content = {"copy": rate, "cells": [asdict(cell) for cell in cells], "large": large}
        report.write_json(args.json, "graph", content, params)
    if args.plot and cells:
        plot(cells, args.plot)
    report.print_files(args)
