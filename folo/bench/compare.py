"""`folo bench compare`: the same token ids through folo and through a peer, in turn: A B A B.

Both run from one checkpoint, each in its own process and environment. While one runs, the other's process
is stopped, so that its threads do not spin on the cores. Ratios are of neighbouring runs, since a machine's
speed drifts.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import IO, Any

import torch
from tqdm import tqdm

import folo
from folo.bench import peers, report
from folo.bench.serving import WORKLOADS, Prompts, workload
from folo.errors import ConfigError, FoloError
from folo.model.export import export
from folo.model.load import open_checkpoint

_PAIRS = 5
_TO_WARM_UP = 64  # prompts
_UNITS = {
    "latency": "decode tokens/s",
    "throughput": "output tokens/s",
    "mixed": "output tokens/s",
    "prefix": "s",
    "prefill": "prompt tokens/s",
    "nano": "output tokens/s",
}


class PeerError(FoloError):
    """A peer is not installed, or has failed."""


class Worker:
    """An engine in a process that serves one workload after the other."""

    def __init__(
        self, peer: peers.Peer, python: str, checkpoint: Path, dtype: str, threads: int, log: IO[bytes]
    ) -> None:
        self._log, self._name = log, peer.module.removesuffix("_peer")
        script = Path(peers.__file__).with_name("worker.py")
        self._process = subprocess.Popen(
            [python, str(script), peer.module, str(checkpoint), dtype, str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={**os.environ, **peer.environment(python)},
            start_new_session=True,
        )
        try:
            started = self._answer()
            if "missing" in started:
                raise PeerError(f"{started['python']} has no {started['missing']}: {peer.install}")
        except BaseException:
            self.close()
            raise
        self.version: str = started["version"]
        self._signal(signal.SIGSTOP)

    def serve(self, prompts: Prompts, cold: bool) -> dict[str, float]:
        """Seconds from the first submit: "first_token", "last_token" (of the first request), "total"."""
        assert self._process.stdin is not None
        self._signal(signal.SIGCONT)
        try:
            print(json.dumps({"prompts": prompts, "cold": cold}), file=self._process.stdin, flush=True)
            return self._answer()
        finally:
            self._signal(signal.SIGSTOP)

    def close(self) -> None:
        self._signal(signal.SIGKILL)
        self._process.communicate()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        if not (line := self._process.stdout.readline()):
            self._log.seek(0)
            last = self._log.read().decode(errors="replace").strip().splitlines()[-12:]
            raise PeerError("\n  ".join([f"{self._name} has stopped; its last lines:", *last]))
        return json.loads(line)

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):  # if it has ended, the next answer says so
            os.killpg(self._process.pid, number)


@dataclass(frozen=True)
class Comparison:
    """One workload: figures of `folo` and `peer`, pair by pair, in its unit (`_UNITS`)."""

    workload: str
    folo: tuple[float, ...]
    peer: tuple[float, ...]

    @property
    def ratios(self) -> list[float]:
        """How many times better folo was, by pairs."""
        pairs = zip(self.folo, self.peer, strict=True)
        return [b / a if self.workload == "prefix" else a / b for a, b in pairs]

    def cells(self) -> list[str]:
        ratios = sorted(self.ratios)
        values = [f"{median(values):.4g}" for values in (self.folo, self.peer)]
        spread = f"{ratios[0]:.2f} to {ratios[-1]:.2f}"
        return [self.workload, _UNITS[self.workload], *values, f"{median(ratios):.2f}", spread]


def figure(name: str, prompts: Prompts, seconds: dict[str, float]) -> float:
    """The figure of a run of workload `name`, in its unit (`_UNITS`)."""
    if name == "prefix":
        return seconds["total"]
    if name == "prefill":
        return sum(len(ids) for ids, _ in prompts) / seconds["total"]
    if name == "latency":
        return (prompts[0][1] - 1) / (seconds["last_token"] - seconds["first_token"])
    return sum(wanted for _, wanted in prompts) / seconds["total"]


def interleave(workers: tuple[Worker, Worker], name: str, prompts: Prompts, pairs: int) -> Iterator[float]:
    """Figures of both in turn. Each warms up first, on at most `_TO_WARM_UP` of the prompts."""
    for worker in workers:
        worker.serve(prompts[:_TO_WARM_UP], name == "prefix")
    for _ in range(pairs):
        for worker in workers:
            yield figure(name, prompts, worker.serve(prompts, name == "prefix"))


def plot(comparisons: list[Comparison], versions: tuple[str, str], path: str) -> None:
    """The ratio of every pair, and their median."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    for place, comparison in enumerate(comparisons):
        axes.bar(place, median(comparison.ratios), width=0.6, color=report.SKY)
        axes.scatter([place] * len(comparison.ratios), comparison.ratios, color=report.BLUE, s=14, zorder=3)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks(range(len(comparisons)), [comparison.workload for comparison in comparisons])
    axes.set(ylabel="times as fast", title=f"{versions[0]} beside {versions[1]}")
    axes.grid(axis="y", alpha=0.3)
    figure.savefig(path, dpi=150)


def register(commands: Any) -> None:
    parser = commands.add_parser(
        "compare",
        help="the same work through another engine",
        description="Run the same token ids through folo and through another engine, in turn.",
        allow_abbrev=False,
    )
    parser.add_argument("--peer", required=True, choices=tuple(peers.PEERS))
    parser.add_argument(
        "--peer-python",
        default=sys.executable,
        metavar="PATH",
        help="the interpreter of the environment that has the peer (default: this one)",
    )
    report.add_model_options(parser)
    parser.add_argument(
        "--workloads",
        nargs="+",
        choices=WORKLOADS,
        metavar="NAME",
        help=f"any of {', '.join(WORKLOADS)} (default: all that the peer has, except nano)",
    )
    parser.add_argument("--pairs", type=report.positive, default=_PAIRS, metavar="N")
    parser.add_argument(
        "--checkpoint",
        metavar="DIR",
        help="where the checkpoint that both run from is kept, with the peer's own form of it; if there is "
        "one already, run from it",
    )
    report.add_output_options(parser, plot=True)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    peer = peers.PEERS[args.peer]
    own = [name for name in peer.workloads if name != "nano"]  # which is for GPUs
    names = [name for name in args.workloads or own if name in peer.workloads]
    if missing := set(args.workloads or ()) - set(names):
        raise PeerError(f"{args.peer} does not run the workload {min(missing)}: leave it out")
    against(args.peer, args.peer_python, names, args.pairs, args.checkpoint, args)


def against(
    peer_name: str, python: str, names: list[str], pairs: int, kept: str | None, args: argparse.Namespace
) -> None:
    """Run workloads through folo and a peer, and report; `args` has the model's and the output's options."""
    peer = peers.PEERS[peer_name]
    with (
        _orderly_end(),
        _checkpoint(args, kept) as path,
        tempfile.TemporaryFile() as own_log,
        tempfile.TemporaryFile() as log,
    ):
        checkpoint = open_checkpoint(path)
        config = checkpoint.config(checkpoint.stored_dtype)
        dtype, threads = str(config.dtype).removeprefix("torch."), torch.get_num_threads()
        tqdm.write(f"starting {peer_name}", file=sys.stderr)
        with (
            contextlib.closing(Worker(peer, python, path, dtype, threads, log)) as other,
            contextlib.closing(Worker(peers.OWN, sys.executable, path, dtype, threads, own_log)) as own,
        ):
            done = list[Comparison]()
            try:
                _compare(own, other, names, config.vocab_size, pairs, done)
            finally:  # if it is cut short, report what there is
                if done:
                    versions = own.version, other.version
                    model = f"{config.architecture} in {dtype}, {threads} threads"
                    print(f"{versions[0]} beside {versions[1]}, {model}")
                    _report(peer_name, versions, dtype, done, args, kept)


def _compare(
    own: Worker, other: Worker, names: list[str], vocab_size: int, pairs: int, done: list[Comparison]
) -> None:
    """Append each workload to `done`: if it is cut short, with the pairs that are complete."""
    with tqdm(total=2 * len(names) * pairs, desc="Compare", unit="run") as bar:
        for name in names:
            values = list[float]()
            try:
                for value in interleave((own, other), name, workload(name, vocab_size), pairs):
                    values.append(value)
                    bar.update()
            finally:
                if whole := len(values) // 2 * 2:
                    done.append(Comparison(name, tuple(values[:whole:2]), tuple(values[1:whole:2])))


def _report(
    peer: str,
    versions: tuple[str, str],
    dtype: str,
    done: list[Comparison],
    args: argparse.Namespace,
    kept: str | None,
) -> None:
    headers = ["workload", "unit", "folo", peer, "ratio", "ratio: range"]
    print(report.table(headers, [comparison.cells() for comparison in done]))
    if args.json:
        results = {
            "peer": versions[1],
            "model": str(args.shape or args.model or kept or "default"),
            "dtype": dtype,
            "workloads": [{**asdict(own), "unit": _UNITS[own.workload]} for own in done],
        }
        report.write_json(args.json, "compare", results)
    if args.plot:
        plot(done, versions, args.plot)
    report.print_files(args)


@contextlib.contextmanager
def _orderly_end() -> Iterator[None]:
    """SIGTERM and SIGHUP raise, as Ctrl-C does, so that workers are closed: a stopped one would never end."""
    numbers = signal.SIGTERM, signal.SIGHUP
    before = {number: signal.signal(number, lambda number, _: sys.exit(128 + number)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _checkpoint(args: argparse.Namespace, kept: str | None) -> Iterator[Path]:
    """A directory that every engine can load."""
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(kept or temporary)
        if not (path / "config.json").exists():
            export(report.model_of(args), path)
            if not args.shape:
                _add_tokenizer(args.model, path)
        elif args.model or args.shape or args.dtype != "auto":
            raise ConfigError(
                f"--checkpoint: {path} holds a checkpoint already; leave out --model, --shape and --dtype to "
                f"run from it, or name another directory"
            )
        yield path


def _add_tokenizer(model: str | None, path: Path) -> None:
    """Save the model's tokenizer, if it has one: converters look for it."""
    with contextlib.suppress(folo.LoadError):
        folo.load_tokenizer(model).save_pretrained(path)
