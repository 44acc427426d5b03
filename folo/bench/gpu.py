"""`folo bench gpu`: everything that needs a GPU, in one command and within minutes.

One process each: the tests marked `cuda`; the latency, graph, throughput and GPTQ benchmarks; cells of the
invariance matrix; a comparison with transformers. Each part has a time limit, and the next one begins
however it ended. Needs pytest, and folo's checkout for the tests; nothing is fetched. `summary.json` says
how each part ended, `log.txt` what it printed.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

import folo
from folo.bench import report
from folo.errors import ConfigError
from folo.ops import cpu

_ROOT = Path(folo.__file__).parent.parent
_SHAPE = ("--shape", "qwen3-0.6b")
_TESTS = "tests/test_cuda.py"
_TO_END = 20  # seconds that an interrupted part has to end
_SECONDS = 9 * 60 - _TO_END - 10  # for all parts: with the last one interrupted, 9 minutes
_HANGING = 90  # seconds in one test, after which its stack is printed: no interrupt ends a kernel that hangs
_TAIL = 6000  # characters of a part's output that are kept


@dataclass(frozen=True)
class Part:
    """One process: `python -m` and the command's words, for at most `limit` seconds."""

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
    """In the order in which they run; what matters most comes first."""

    def bench(name: str, *options: str, limit: float, plot: bool = False) -> Part:
        files = ["--json", str(out / f"{name}.json")]
        if plot and find_spec("matplotlib"):
            files += ["--plot", str(out / f"{name}.png")]
        return Part(name, ("folo", "bench", *options, *_SHAPE, *files), limit)

    # Most of the tests' time is Triton's, which compiles on one core; a library's warning is no failure here.
    workers = str(min(12, max(2, (os.cpu_count() or 2) - 2)))
    pytest = ("pytest", "-m", "cuda", *(("-n", workers) if find_spec("xdist") else ()), "-W", "default")
    told = "--tb=short", "-o", f"faulthandler_timeout={_HANGING}"
    sizes = ("--batches", "1", "8", "64", "256", "--contexts", "128", "1024", "8192")
    nano = "--workload", "nano", "--alone", "--repeats", "2"
    gptq = "folo", "bench", "gptq", "--device", "cuda", "--json", str(out / "gptq.json")
    return [
        Part("tests", (*pytest, *told, "-p", "no:cacheprovider", _TESTS), 240),
        bench("latency", "latency", "--repeats", "3", limit=100),
        bench("graph", "graph", *sizes, limit=180, plot=True),
        bench("nano", "throughput", *nano, limit=180),
        bench("invariance", "invariance", "--cells", "8", limit=180),
        Part("gptq", gptq, 150),
        bench("peer", "compare", "--peer", "transformers", "--workloads", "nano", "--pairs", "1", limit=500),
    ]


def run(part: Part, limit: float, log: Path) -> Outcome:
    """Run a part from the checkout, for at most `limit` seconds; what it prints is added to the log."""
    begin = time.perf_counter()
    path = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
    own = {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **_environment()}
    with log.open("ab+") as file:
        start = file.seek(0, os.SEEK_END)
        process = subprocess.Popen(
            [sys.executable, "-m", *part.command],
            cwd=_ROOT,
            env=os.environ | own,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            # A shell starts its background jobs with SIGINT ignored, and child processes inherit that.
            preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        )
        status = _end(process, limit)
        file.seek(start)
        output = file.read().decode(errors="replace")
    return Outcome(part.name, status, time.perf_counter() - begin, output[-_TAIL:])


def _environment() -> dict[str, str]:
    # The CPU's kernels are of no use here, and take long to compile; several processes share its cores.
    # Inductor has little to compile, so it may do that in its own process. There it would replace Triton's
    # assembler, unless the environment names it.
    own = {"FOLO_CPU_ISA": cpu.REFERENCE, "OMP_NUM_THREADS": "2", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    found = find_spec("triton")
    for place in found.submodule_search_locations or () if found else ():
        if (assembler := Path(place, "backends", "nvidia", "bin", "ptxas")).is_file():
            own["TRITON_PTXAS_PATH"] = str(assembler)
    return own


def _end(process: subprocess.Popen[bytes], limit: float) -> int | None:
    """Wait for the process: its exit status, or None if it ran past the limit and was ended.

    SIGINT comes first: then it reports what it has and ends its own processes. A stopped peer would stay,
    with all its memory.
    """
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_TO_END)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return None


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
    names = [part.name for part in parts(Path())]
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the results go")
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=names,
        default=names,
        metavar="NAME",
        help=f"of {', '.join(names)} (default: all, as far as the time goes)",
    )
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    if not torch.cuda.is_available():
        raise ConfigError("folo bench gpu needs a CUDA device, and torch finds none")
    args.out.mkdir(parents=True, exist_ok=True)
    outcomes, end = list[Outcome](), time.perf_counter() + _SECONDS
    for part in parts(args.out.absolute()):
        left = end - time.perf_counter()
        if part.name not in args.parts or left < _TO_END:
            continue
        print(f"--- {part.name}", flush=True)
        outcomes.append(run(part, min(part.limit, left), args.out / "log.txt"))
        print(outcomes[-1].output, flush=True)
        # After each part, in case the machine is taken away before the last one.
        found = {"parts": [asdict(o) for o in outcomes], "gpu": report.gpu(torch.device("cuda"))}
        report.write_json(args.out / "summary.json", "gpu", found)
    print(table(outcomes))
    if any(outcome.exit_status != 0 for outcome in outcomes):
        raise SystemExit(1)
