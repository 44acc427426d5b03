"""`folo bench latency | throughput | prefix | prefill`: how fast requests are served.

The workloads are token ids from a seeded generator, greedy and of fixed lengths, so that every engine that
runs them does the same work: one request of 128 in, 128 out (latency); 32 of them, and 64 of mixed lengths
(throughput); 32 that share 512 tokens, at once, on a cold cache (prefix); one of 2,048 in (prefill).
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median
from typing import Any

import numpy as np
from tqdm import tqdm

import folo
from folo.bench import report

REPEATS = 5
WORKLOADS = ("latency", "throughput", "mixed", "prefix", "prefill", "nano")
_IDS = (100, 40_000)  # the range of token ids, cut off where the vocabulary ends: none of them is special
_BLOCK_SIZE = 16

Prompts = list[tuple[list[int], int]]  # token ids, and how many tokens to generate


def workload(name: str, vocab_size: int) -> Prompts:
    """The prompts of one of `WORKLOADS`."""
    numbers, (low, high) = np.random.default_rng(0), _IDS

    def ids(length: int) -> list[int]:
        return numbers.integers(low, min(high, vocab_size), size=length).tolist()

    if name == "latency":
        return [(ids(128), 128)]
    if name == "throughput":
        return [(ids(128), 128) for _ in range(32)]
    if name == "mixed":
        lengths = numbers.integers(16, 513, size=64), numbers.integers(16, 257, size=64)
        return [(ids(int(given)), int(wanted)) for given, wanted in zip(*lengths, strict=True)]
    if name == "prefix":
        shared = ids(512)
        return [(shared + ids(32), 32) for _ in range(32)]
    if name == "nano":  # nano-vllm's benchmark, of its seed and lengths
        chance, most = random.Random(0), min(10_000, vocab_size - 1)
        given = [[chance.randint(0, most) for _ in range(chance.randint(100, 1024))] for _ in range(256)]
        return [(ids, chance.randint(100, 1024)) for ids in given]
    assert name == "prefill", name
    return [(ids(2048), 1)]


@dataclass(frozen=True)
class Run:
    """A workload from the first submit to the last token, in seconds. steps: (seconds, tokens) of each."""

    total: float
    first_token: float
    steps: tuple[tuple[float, int], ...]
    num_prompt: int
    num_output: int

    @property
    def output_rate(self) -> float:
        """Output tokens a second, prefill included."""
        return self.num_output / self.total

    @property
    def decode_rate(self) -> float:
        """Output tokens a second after the first one, of a single request."""
        return (self.num_output - 1) / (self.total - self.first_token)

    @property
    def prompt_rate(self) -> float:
        """Prompt tokens a second until the first token."""
        return self.num_prompt / self.first_token


def empty(params: folo.Params, prompts: Prompts) -> folo.EngineState:
    """A state with room for a workload. All runs can start from it: it stays empty, as does its cache."""
    num_blocks = sum(-(-(len(ids) + wanted) // _BLOCK_SIZE) for ids, wanted in prompts)
    tokens = 8192 if params.device.type == "cuda" else 2048  # of a step
    scheduler = folo.SchedulerConfig(max_num_batched_tokens=tokens)
    return folo.init(params, folo.CacheConfig(_BLOCK_SIZE, num_blocks), scheduler)


def serve(params: folo.Params, state: folo.EngineState, prompts: Prompts, step: folo.Step) -> Run:
    """Run a workload on an `empty` state."""
    steps: list[tuple[float, int]] = []
    begin, first = time.perf_counter(), 0.0
    for number, (ids, wanted) in enumerate(prompts):
        sampling = folo.SamplingParams(temperature=0, max_tokens=wanted, ignore_eos=True)
        state = folo.submit(state, folo.Request(ids, sampling, str(number)))
    before = begin
    while (batch := folo.schedule(state)) is not None:
        state, tokens = step(params, state, batch)
        if not first and tokens.request_ids:
            tokens.ids.tolist()  # which waits for them, should the step be in flight
            first = time.perf_counter() - begin
        now = time.perf_counter()
        steps.append((now - before, batch.num_tokens))
        before = now
    end = time.perf_counter()  # nothing is in flight any more
    num_prompt, num_output = (sum(column) for column in zip(*[(len(i), n) for i, n in prompts], strict=True))
    return Run(end - begin, first, tuple(steps), num_prompt, num_output)


# The columns of each benchmark's table: heading, and its value for a run.
_Figure = tuple[str, Callable[[Run], float]]
_FIGURES: dict[str, tuple[_Figure, ...]] = {
    "latency": (
        ("TTFT, ms", lambda run: 1e3 * run.first_token),
        ("time per token, ms", lambda run: 1e3 / run.decode_rate),
        ("decode tokens/s", lambda run: run.decode_rate),
    ),
    "throughput": (
        ("output tokens/s", lambda run: run.output_rate),
        ("TTFT, ms", lambda run: 1e3 * run.first_token),
        ("total, s", lambda run: run.total),
    ),
    "prefix": (
        ("total, s", lambda run: run.total),
        ("TTFT, ms", lambda run: 1e3 * run.first_token),
    ),
    "prefill": (
        ("prompt tokens/s", lambda run: run.prompt_rate),
        ("TTFT, ms", lambda run: 1e3 * run.first_token),
    ),
}
_WORKLOADS = {name: ("throughput", "mixed") if name == "throughput" else (name,) for name in _FIGURES}
_HELP = {
    "latency": "one request of 128 tokens in, 128 out",
    "throughput": "32 requests of 128 in, 128 out, and 64 of mixed lengths",
    "prefix": "32 requests that share 512 tokens, on a cold cache",
    "prefill": "one prompt of 2,048 tokens",
}


def plot(runs: dict[str, list[Run]], path: str) -> None:
    """The time of every step of the median run, and how many tokens it computed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2 * len(runs)), layout="constrained")
    panels = figure.subplots(len(runs), squeeze=False)[:, 0]
    for axes, (workload_name, own) in zip(panels, runs.items(), strict=True):
        run = sorted(own, key=lambda run: run.total)[len(own) // 2]
        seconds, tokens = zip(*run.steps, strict=True)
        marks = axes.scatter(range(len(seconds)), [1e3 * s for s in seconds], c=tokens, s=14, cmap="viridis")
        figure.colorbar(marks, ax=axes, label="tokens in the step")
        axes.set(xlabel="step", ylabel="ms", title=f"{workload_name}: time of each step")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def register(commands: Any) -> None:
    for name, text in _HELP.items():
        parser = commands.add_parser(name, help=text, description=f"Serve {text}.", allow_abbrev=False)
        report.add_model_options(parser)
        parser.add_argument("--mode", default="auto", help="as folo.compile takes it (default: %(default)s)")
        if name == "throughput":
            parser.add_argument(
                "--workload",
                choices=("nano",),
                help="instead: 256 requests of 100 to 1,024 tokens in and out, beside transformers' "
                "continuous batching (as in folo bench compare)",
            )
            parser.add_argument("--alone", action="store_true", help="run that workload through folo alone")
        parser.add_argument("--repeats", type=report.positive, default=REPEATS, metavar="N")
        report.add_output_options(parser, plot=True)
        parser.set_defaults(run=partial(_run, name))


def _run(name: str, args: argparse.Namespace) -> None:
    names = _WORKLOADS[name]
    if getattr(args, "workload", None):
        names = (args.workload,)
        if not args.alone:
            from folo.bench import compare  # here, since it imports this module

            compare.against("transformers", sys.executable, [*names], args.repeats, None, args)
            return
    params = report.model_of(args)
    step = folo.compile(folo.step, mode=args.mode)
    runs: dict[str, list[Run]] = {}
    try:
        with tqdm(total=len(names) * (1 + args.repeats), desc=name.capitalize(), unit="run") as bar:
            for workload_name in names:
                prompts = workload(workload_name, params.config.vocab_size)
                state, own = empty(params, prompts), list[Run]()
                for number in range(1 + args.repeats):
                    run = serve(params, state, prompts, step)
                    if number:  # the first one warms up
                        own.append(run)
                        runs[workload_name] = own
                    bar.update()
    finally:  # if it is cut short, report what there is
        _report(name, args, params, runs)


def _report(name: str, args: argparse.Namespace, params: folo.Params, runs: dict[str, list[Run]]) -> None:
    print(report.table(*_table(name, runs)))
    if args.json:
        results = {key: [asdict(run) for run in own] for key, own in runs.items()}
        report.write_json(args.json, name, results, params)
    if args.plot and runs:
        plot(runs, args.plot)
    report.print_files(args)


def _table(name: str, runs: dict[str, list[Run]]) -> tuple[Sequence[str], list[list[str]]]:
    """Medians, and the range of the first figure."""
    figures = _FIGURES[name]
    rows = []
    for workload_name, own in runs.items():
        values = [[figure(run) for run in own] for _, figure in figures]
        spread = f"{min(values[0]):.4g} to {max(values[0]):.4g}"
        rows.append([workload_name, *(f"{median(column):.4g}" for column in values), spread])
    return ["workload", *(heading for heading, _ in figures), f"{figures[0][0]}: range"], rows
