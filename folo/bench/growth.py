"""`folo bench growth`: how the time of a decode step grows with the batch and with the context.

A random model of four layers of Qwen3-0.6B's shape, a vocabulary of 32,000 and 32k positions. The prompts
are not computed: their blocks hold constants. Only decode steps are timed. Beside each time stands what the
roofline allows: for the linear layers and for attention, their bytes over the rate of reading memory or their
operations over the rate of torch's matrix product, whichever takes longer. Both rates are measured between
the steps.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

from tqdm import tqdm

import folo
from folo.bench import report
from folo.bench.host import Host
from folo.bench.roofline import Machine, Roofline, middle
from folo.bench.workloads import QWEN3_600M, random_ids, random_model

BATCHES, BATCH_CONTEXT = (1, 2, 4, 8, 16, 32, 64, 128, 256), 256
CONTEXTS, CONTEXT_BATCHES = (128, 512, 1024, 2048, 4096, 8192, 16384), (1, 8)
_STEPS, _BLOCK_SIZE = 8, 16


@dataclass(frozen=True)
class Point:
    """A decode step of `batch` sequences of `context` tokens: medians of several, in seconds.

    roof: the rates measured between the steps. bound: the least time at those rates.
    """

    batch: int
    context: int
    seconds: float
    bound: float
    roof: Roofline

    @property
    def share(self) -> float:
        """The bound over the time: how near a step comes to the roofline."""
        return self.bound / self.seconds


def model() -> folo.Params:
    return random_model(replace(QWEN3_600M, num_layers=4, vocab_size=32_000, max_position_embeddings=32_768))


def bound(params: folo.Params, batch: int, context: int, roof: Roofline) -> float:
    """Seconds that the linear layers and attention take at least, one after the other."""
    config = params.config
    kv = config.kv_per_token * params.dtype.itemsize
    attention = 4 * config.num_layers * config.num_heads * config.head_dim * context
    linear = roof.seconds(params.num_bytes, 2 * batch * params.num_parameters)
    return linear + roof.seconds(batch * context * kv, batch * attention)


def decoding(params: folo.Params, batch: int, context: int, steps: int) -> folo.EngineState:
    """A state in which `batch` sequences of about `context` tokens decode, for `steps` steps at least."""
    tokens = 8192  # of prompts a step; a sequence that is ready early gains a token in each step after that
    longest = context + -(-batch * context // tokens) + steps + 2
    blocks = batch * -(-longest // _BLOCK_SIZE)
    cache = folo.CacheConfig(_BLOCK_SIZE, blocks, enable_prefix_caching=False)
    state = folo.init(params, cache, folo.SchedulerConfig(max_num_seqs=batch, max_num_batched_tokens=tokens))
    state.heap.k.fill_(0.01)  # untouched pages would all be the same page of zeros
    state.heap.v.fill_(0.01)
    endless = folo.SamplingParams(temperature=0, ignore_eos=True, max_tokens=None)
    for n in range(batch):
        prompt = random_ids(context - 1, params.config.vocab_size, seed=n)
        state = folo.submit(state, folo.Request(prompt, endless, str(n)))
    host = Host(params.config.vocab_size)
    while state.waiting or any(sequence.remaining > 1 for sequence in state.running):
        state = host.step(state)
        assert state is not None
    return state


def decode_times(
    params: folo.Params,
    batch: int,
    context: int,
    steps: int = _STEPS,
    between: Callable[[], object] = lambda: None,
) -> list[float]:
    """Seconds of each of some decode steps of `batch` sequences of `context` tokens.

    between: what runs before each, and before one that warms up.
    """
    state, times = decoding(params, batch, context, steps), list[float]()
    for _ in range(1 + steps):  # the first warms up
        ready = folo.schedule(state)
        assert ready is not None
        assert ready.num_tokens == batch
        between()
        begin = time.perf_counter()
        state, _ = folo.step(params, state, ready)
        times.append(time.perf_counter() - begin)
    return times[1:]


def measure(params: folo.Params, batch: int, context: int, machine: Machine) -> Point:
    roofs = list[Roofline]()
    times = decode_times(params, batch, context, between=lambda: roofs.append(machine.now()))
    bounds = [bound(params, batch, context, roof) for roof in roofs]
    return Point(batch, context, median(times), median(bounds), middle(roofs))


def measure_all(params: folo.Params, machine: Machine, each: Callable[[], object]) -> list[Point]:
    sizes = [(batch, BATCH_CONTEXT) for batch in BATCHES]
    sizes += [(batch, context) for batch in CONTEXT_BATCHES for context in CONTEXTS]
    points = []
    for batch, context in sizes:
        points.append(measure(params, batch, context, machine))
        each()
    return points


def plot(points: list[Point], path: str) -> None:
    from matplotlib.figure import Figure
    from matplotlib.ticker import StrMethodFormatter

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    by_batch = points[: len(BATCHES)]
    curves = [("context 256", report.BLUE, [p.batch for p in by_batch], by_batch, left)]
    for batch, colour in zip(CONTEXT_BATCHES, (report.ORANGE, report.GREEN), strict=True):
        own = [p for p in points[len(BATCHES) :] if p.batch == batch]
        curves.append((f"batch {batch}", colour, [p.context for p in own], own, right))
    for label, colour, sizes, own, axes in curves:
        axes.plot(sizes, [1e3 * p.seconds for p in own], "o-", color=colour, label=label, markersize=4)
        axes.plot(sizes, [1e3 * p.bound for p in own], "--", color=colour, label="roofline")
    figure.suptitle("A decode step of four layers in Qwen3-0.6B's shape, bfloat16")
    for axes, name in ((left, "sequences"), (right, "context, tokens")):
        axes.set(xscale="log", yscale="log", xlabel=name, ylabel="ms a decode step")
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:.0f}"))
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=150)


def register(commands: Any) -> None:
    parser = commands.add_parser(
        "growth",
        help="decode time against batch and context",
        description="Time decode steps for batches of 1 to 256 and contexts of 128 to 16k tokens, beside "
        "the roofline, which is measured between them.",
        allow_abbrev=False,
    )
    report.add_output_options(parser, plot=True)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    params, machine = model(), Machine()
    total = len(BATCHES) + len(CONTEXT_BATCHES) * len(CONTEXTS)
    with tqdm(total=total, desc="Growth", unit="size") as bar:
        points = measure_all(params, machine, bar.update)
    roof = middle([point.roof for point in points])
    rows = [
        [p.batch, p.context, f"{1e3 * p.seconds:.2f}", f"{1e3 * p.bound:.2f}", f"{100 * p.share:.0f} %"]
        for p in points
    ]
    print(report.table(["batch", "context", "ms a step", "roofline, ms", "of the roofline"], rows))
    print(f"\nroofline, in the median: {roof}")
    if args.json:
        content = {"roofline": asdict(roof), "points": [asdict(point) for point in points]}
        report.write_json(args.json, "growth", content, params)
    if args.plot:
        plot(points, args.plot)
    report.print_files(args)
