"""`folo bench gpu`: everything that needs a GPU, in one command and within minutes.

The tests marked `cuda`, the invariance matrix, the graph and the throughput benchmarks, one process each.
Each part has a time limit, and the next one begins whatever became of it. Needs pytest, and folo's checkout
for the tests; nothing is fetched. `summary.json` says how each part ended.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import folo
from folo.bench import report

_ROOT = Path(folo.__file__).parent.parent
_SHAPE = ("--shape", "qwen3-0.6b")
_TESTS = "tests/test_cuda.py"
_TAIL = 6000  # characters of a part's output that are kept


@dataclass(frozen=True)
class Part:
    """One process: `python -m` these words, for at most so many seconds."""

    name: str
    command: tuple[str, ...]
    limit: float


@dataclass(frozen=True)
class Outcome:
    """exit_status: None if the part ran past its limit."""

    name: str
    exit_status: int | None
    seconds: float
    output: str


def parts(out: Path) -> list[Part]:
    """They take at most 530 seconds together."""

    def bench(name: str, *options: str, limit: float, plot: bool = False) -> Part:
        files = ["--json", str(out / f"{name}.json"), *(["--plot", str(out / f"{name}.png")] if plot else [])]
        return Part(name, ("folo", "bench", *options, *_SHAPE, *files), limit)

    sizes = ("--batches", "1", "8", "64", "256", "--contexts", "128", "1024", "8192")
    return [
        Part("tests", ("pytest", "-m", "cuda", "--tb=short", "-p", "no:cacheprovider", _TESTS), 150),
        bench("latency", "latency", "--repeats", "3", limit=60),
        bench("graph", "graph", *sizes, limit=120, plot=True),
        bench("nano", "throughput", "--workload", "nano", "--repeats", "1", limit=100),
        bench("invariance", "invariance", "--cells", "8", limit=100),
    ]


def run(part: Part) -> Outcome:
    """Run a part from the checkout; what it prints is kept, its end at least."""
    begin = time.perf_counter()
    environment = {**os.environ, "PYTHONPATH": str(_ROOT), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", *part.command],
        cwd=_ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=part.limit)
        status = process.returncode
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)  # with all that it started
        output, status = process.communicate()[0], None
    return Outcome(part.name, status, time.perf_counter() - begin, output[-_TAIL:])


def table(outcomes: Sequence[Outcome]) -> str:
    ends = {None: "out of time", 0: "passed"}
    rows = [
        (o.name, ends.get(o.exit_status, f"failed ({o.exit_status})"), f"{o.seconds:.0f}") for o in outcomes
    ]
    return report.table(["part", "ended", "seconds"], rows)


def register(commands: Any) -> None:
    parser = commands.add_parser(
        "gpu",
        help="everything that needs a GPU: tests, invariance, benchmarks",
        description="Run the tests and benchmarks that need a CUDA device, within 9 minutes, and write their "
        "results to a directory. Exits with 1 if a part failed.",
        allow_abbrev=False,
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the results go")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    import torch

    from folo.errors import ConfigError

    if not torch.cuda.is_available():
        raise ConfigError("folo bench gpu needs a CUDA device, and torch finds none")
    args.out.mkdir(parents=True, exist_ok=True)
    outcomes = list[Outcome]()
    for part in parts(args.out.absolute()):
        print(f"--- {part.name}", flush=True)
        outcomes.append(run(part))
        print(outcomes[-1].output, flush=True)
        # After each part: should the machine be gone before the last one, the others are there.
        found = {"parts": [asdict(o) for o in outcomes], "gpu": report.gpu(torch.device("cuda"))}
        report.write_json(args.out / "summary.json", "gpu", found)
    print(table(outcomes))
    if any(outcome.exit_status != 0 for outcome in outcomes):
        raise SystemExit(1)
