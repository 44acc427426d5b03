"""`folo bench gptq`: layers of 4 bits in groups of 128 against the same in bfloat16, as ratios of one run.

The four linear layers of a decoder layer of Qwen3-0.6B, on copies that together exceed the caches, and whole
decode steps of a random model of its shape, whose output layer is bfloat16 in both. What is compared runs in
turn.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

from folo.bench import report
from folo.bench.growth import decode_times
from folo.bench.kernels import SHAPES

if TYPE_CHECKING:
    from folo.model.config import DecoderConfig
    from folo.ops.stacked import Weight

BATCHES, CONTEXT = (1, 32), 256
_COPIES = 16  # of a decoder layer: 31 MB each in bfloat16, 8 MB in 4 bits
_ROUNDS = 5
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


def linears(shapes: Sequence[tuple[int, int]], batch: int, copies: int = _COPIES) -> Ratio:
    """Of one row or several through layers `[N, K]`, each on inputs of its own."""
    import torch

    from folo import ops
    from folo.bench.workloads import random_grouped
    from folo.ops.memory import Arena

    numbers = torch.Generator().manual_seed(0)
    size = 2 * copies * sum(n * k for n, k in shapes)
    arenas = Arena(size), Arena(size // 2)
    inputs = [torch.randn(batch, k, generator=numbers).bfloat16() for _, k in shapes]
    dense: list[list[Weight]] = []
    quantised: list[list[Weight]] = []
    for _ in range(copies):
        dense.append([ops.packed(torch.ones(n, k, dtype=torch.bfloat16), arenas[0]) for n, k in shapes])
        quantised.append([ops.quantized(random_grouped(n, k, _BITS, numbers), arenas[1]) for n, k in shapes])

    def run(layers: list[list[Weight]]) -> float:
        begin = time.perf_counter()
        for weights in layers:
            for x, weight in zip(inputs, weights, strict=True):
                ops.linear(x, weight)
        return (time.perf_counter() - begin) / copies

    return _ratio("linear layers", batch, lambda: run(dense), lambda: run(quantised))


def steps(config: DecoderConfig, batches: Sequence[int] = BATCHES) -> list[Ratio]:
    """Of whole decode steps."""
    from folo.bench.workloads import random_model

    dense, quantised = random_model(config), random_model(config, bits=_BITS)
    return [
        _ratio(
            "decode step",
            batch,
            lambda batch=batch: median(decode_times(dense, batch, CONTEXT)),
            lambda batch=batch: median(decode_times(quantised, batch, CONTEXT)),
        )
        for batch in batches
    ]


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
    report.add_output_options(parser, plot=False)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    from folo.bench.workloads import QWEN3_600M

    shapes = [shape for name, shape in SHAPES[1].linears.items() if name != "head"]
    ratios = [linears(shapes, batch) for batch in BATCHES] + steps(QWEN3_600M)
    rows = [
        [r.what, r.batch, f"{1e3 * r.dense:.2f}", f"{1e3 * r.quantised:.2f}", f"{r.faster:.2f} x"]
        for r in ratios
    ]
    print(report.table(["what", "batch", "bfloat16, ms", "4 bits, ms", "faster"], rows))
    if args.json:
        report.write_json(args.json, "gptq", [asdict(ratio) | {"faster": ratio.faster} for ratio in ratios])
    report.print_files(args)
