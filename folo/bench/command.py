"""`folo bench NAME`: each benchmark is a module that registers its own parser."""

from __future__ import annotations

from typing import Any

from folo.bench import (
    ablation,
    compare,
    gptq,
    gpu,
    graph,
    growth,
    host,
    invariance,
    kernels,
    serving,
    timeline,
)

_BENCHMARKS = (serving, compare, kernels, gptq, growth, graph, gpu, ablation, host, invariance, timeline)


def register(commands: Any) -> None:
    parser = commands.add_parser(
        "bench",
        help="measure the engine",
        description="Measure the engine. Results are printed as a table; --json keeps them with the machine "
        "and the versions that they were measured on.",
        allow_abbrev=False,
    )
    names = parser.add_subparsers(metavar="NAME", required=True)
    for benchmark in _BENCHMARKS:
        benchmark.register(names)
