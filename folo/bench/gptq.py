"""`folo bench gptq`: layers of 4 bits in groups of 128 against the same in bfloat16, as ratios of one run.

The four linear layers of a decoder layer of Qwen3-0.6B, on copies that together exceed the caches, and whole
decode steps of a random model of its shape, whose output layer is bfloat16 in both. The two arms run in
turn; on a GPU they are replayed from CUDA graphs and timed by the device's clock.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch

import folo
from folo import ops
from folo.bench import graph, report, workloads
from folo.bench.growth import decode_times, decoding
from folo.bench.kernels import SHAPES
from folo.errors import ConfigError
from folo.graph import CudaGraphs
from folo.ops.memory import Arena
from folo.ops.stacked import Weight

BATCHES, CONTEXT = (1, 32), 256
_COPIES = 16  # of a decoder layer: 31 MB each in bfloat16, 8 MB in 4 bits
_ROUNDS = 5
_RUNS = 20  # replays of captured work that are timed together: one is too short
_BITS = 4


@dataclass(frozen=True)
class Ratio:
    """Seconds in bfloat16 and in 4 bits: medians of rounds that ran in turn."""

    what: str
    batch: int
    dense: float
    quantised: float

    @property
    def faster(self) -> float:
        return self.dense / self.quantised


def linears(
    shapes: Sequence[tuple[int, int]], batch: int, copies: int = _COPIES, device: str = "cpu"
) -> Ratio:
    """The ratio for `batch` rows through linear layers `[N, K]`, each with its own inputs."""
    numbers = torch.Generator(device).manual_seed(0)
    size = 2 * copies * sum(n * k for n, k in shapes)
    arenas = (Arena(size), Arena(size // 2)) if device == "cpu" else (None, None)
    inputs = [torch.randn(batch, k, generator=numbers, device=device).bfloat16() for _, k in shapes]
    dense: list[list[Weight]] = []
    quantised: list[list[Weight]] = []
    for _ in range(copies):
        plain = [torch.ones(n, k, dtype=torch.bfloat16, device=device) for n, k in shapes]
        dense.append([ops.packed(weight, arenas[0]) for weight in plain])
        quantised.append(
            [ops.quantized(workloads.random_grouped(n, k, _BITS, numbers), arenas[1]) for n, k in shapes]
        )

    def through(layers: list[list[Weight]]) -> Callable[[], float]:
        def run() -> torch.Tensor:
            out = inputs[0]
            for weights in layers:
                for x, weight in zip(inputs, weights, strict=True):
                    out = ops.linear(x, weight)
            return out

        seconds = _timed(run, torch.device(device))
        return lambda: seconds() / copies

    return _ratio("linear layers", batch, through(dense), through(quantised))


def _timed(run: Callable[[], torch.Tensor], device: torch.device) -> Callable[[], float]:
    """What times `run`; on a GPU, its captured graph, since launches would take longer than the work."""
    work = CudaGraphs().capture(run)[0] if device.type == "cuda" else run

    def seconds() -> float:
        clock, count = graph.Clock(device), _RUNS if device.type == "cuda" else 1
        clock.mark()
        for _ in range(count):
            work()
        clock.mark()
        return clock.between()[0] / count

    return seconds


def steps(dense: folo.Params, quantised: folo.Params, batches: Sequence[int] = BATCHES) -> Iterator[Ratio]:
    """The ratios for whole decode steps."""
    for batch in batches:
        yield _ratio("decode step", batch, _stepping(dense, batch), _stepping(quantised, batch))


def _stepping(params: folo.Params, batch: int) -> Callable[[], float]:
    if params.device.type == "cpu":
        return lambda: median(decode_times(params, batch, CONTEXT))
    state, graphs = decoding(params, batch, CONTEXT, graph.MOST_STEPS), CudaGraphs()
    return lambda: graph.measure(params, state, "graph", CONTEXT, rate=math.inf, recorder=graphs).p50


def _ratio(
    what: str, batch: int, dense: Callable[[], float], quantised: Callable[[], float], rounds: int = _ROUNDS
) -> Ratio:
    times = [(dense(), quantised()) for _ in range(1 + rounds)][1:]  # the first warms up
    return Ratio(what, batch, *(median(column) for column in zip(*times, strict=True)))


def register(commands: Any) -> None:
    parser = commands.add_parser(
        "gptq",
        help="4 bits against bfloat16",
        description="Time linear layers and decode steps of Qwen3-0.6B's shape with weights of 4 bits in "
        "groups of 128, against bfloat16.",
        allow_abbrev=False,
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    report.add_output_options(parser, plot=False)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("folo bench gptq --device cuda needs a CUDA device, and torch finds none")
    dense, quantised = (
        workloads.random_model(workloads.QWEN3_600M, bits=bits, device=args.device) for bits in (None, _BITS)
    )
    ratios = list[Ratio]()
    try:
        for ratio in _measured(dense, quantised, args.device):
            ratios.append(ratio)
    finally:  # if it is cut short, report what there is
        _report(args, quantised, ratios)


def _measured(dense: folo.Params, quantised: folo.Params, device: str) -> Iterator[Ratio]:
    shapes = [shape for name, shape in SHAPES[1].linears.items() if name != "head"]
    for batch in BATCHES:
        yield linears(shapes, batch, device=device)
    yield from steps(dense, quantised)


def _report(args: argparse.Namespace, quantised: folo.Params, ratios: list[Ratio]) -> None:
    rows = [
        [r.what, r.batch, f"{1e3 * r.dense:.3f}", f"{1e3 * r.quantised:.3f}", f"{r.faster:.2f} x"]
        for r in ratios
    ]
    print(report.table(["what", "batch", "bfloat16, ms", "4 bits, ms", "faster"], rows))
    if args.json:
        content = [asdict(ratio) | {"faster": ratio.faster} for ratio in ratios]
        report.write_json(args.json, "gptq", content, quantised)
    report.print_files(args)
