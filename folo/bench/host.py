"""What a step costs on the host: schedule, prologue and epilogue, with no model between them.

The engine's own functions run over a heap of four numbers a slot, two for K and two for V; in place of the
device function, every row gets a random token. So only Python and numpy are timed, and a heap of a million
blocks takes 256 MB of address space.
"""

from __future__ import annotations

import argparse
import gc
import random
import time
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from tqdm import tqdm

import folo
from folo.bench import report
from folo.bench.workloads import miniature
from folo.inputs import ROWS_PER_TILE
from folo.model.device import Sampled
from folo.step import epilogue, prologue

NUM_SEQS, LENGTH, BLOCK_SIZE = 256, 1000, 16
FORKED = 4000
TARGET_MS, FORK_TARGET_US = 1.5, 50.0
_VOCABULARY = 50_000


@dataclass(frozen=True)
class HostCost:
    """Milliseconds a step in the fastest of many groups of 16 steps, in which every sequence fills a block.

    The fastest, since on a shared machine the others measure its neighbours too. `typical` is the total of
    the median group.
    """

    num_seqs: int
    length: int
    num_blocks: int
    cached: int  # blocks that are only in the prefix index at the start
    schedule: float
    prologue: float
    epilogue: float
    typical: float

    @property
    def total(self) -> float:
        return self.schedule + self.prologue + self.epilogue


class Host:
    """Steps a state as `folo.step` does, with random tokens in place of the device function, and a clock."""

    def __init__(self, vocab_size: int = _VOCABULARY) -> None:
        self._random, self._ids = random.Random(0), range(vocab_size)
        self.clock = [0.0, 0.0, 0.0]  # schedule, prologue, epilogue, in seconds

    def step(self, state: folo.EngineState) -> folo.EngineState | None:
        t0 = time.perf_counter()
        batch = folo.schedule(state)
        t1 = time.perf_counter()
        if batch is None:
            return None
        bound, _ = prologue(batch)
        t2 = time.perf_counter()
        left, sampled = len(batch.rows), []
        while left > 0:
            ids = self._random.choices(self._ids, k=min(left, ROWS_PER_TILE))
            sampled.append(Sampled(torch.tensor(ids)))
            left -= ROWS_PER_TILE
        t3 = time.perf_counter()
        state, _ = epilogue(bound, sampled)
        t4 = time.perf_counter()
        for n, spent in enumerate((t1 - t0, t2 - t1, t4 - t3)):
            self.clock[n] += spent
        return state


def _state(num_blocks: int, num_seqs: int, length: int, host: Host, cached: int) -> folo.EngineState:
    """`num_seqs` sequences that have computed about `length` tokens each, and `cached` idle blocks."""
    scheduler = folo.SchedulerConfig(max_num_seqs=num_seqs, max_num_batched_tokens=8192)
    params = miniature(num_positions=1 << 20, vocab_size=_VOCABULARY)
    state = folo.init(params, folo.CacheConfig(BLOCK_SIZE, num_blocks), scheduler)
    numbers = random.Random(1)
    once = folo.SamplingParams(max_tokens=1, ignore_eos=True)
    for n in range(-(-cached // 512)):
        prompt = numbers.choices(range(_VOCABULARY), k=BLOCK_SIZE * min(512, cached - 512 * n))
        state = folo.submit(state, folo.Request(prompt, once, f"cached {n}"))
        while (after := host.step(state)) is not None:
            state = after
        state, _ = folo.collect(state)
    endless = folo.SamplingParams(temperature=0, ignore_eos=True, max_tokens=None)
    for n in range(num_seqs):
        # Lengths differ by up to a block, so that every step has its share of block boundaries.
        prompt = numbers.choices(range(_VOCABULARY), k=length - n % BLOCK_SIZE)
        state = folo.submit(state, folo.Request(prompt, endless, str(n)))
    while state.waiting or any(sequence.remaining > 1 for sequence in state.running):
        after = host.step(state)
        assert after is not None
        state = after
    return state


def measure(
    num_blocks: int, length: int = LENGTH, cached: int = 0, num_groups: int = 2, repeats: int = 1
) -> HostCost:
    """The cost of a decode step of NUM_SEQS sequences in a pool of `num_blocks` blocks."""
    host, groups, idle = Host(), [], 0
    for _ in range(repeats):
        state = _state(num_blocks, NUM_SEQS, length, host, cached)
        idle = len(state.pool.idle)
        gc.collect()
        gc.freeze()  # a full collection looks at every object: a pause of its own, not a part of any step
        for _ in range(num_groups):
            host.clock = [0.0, 0.0, 0.0]
            for _ in range(BLOCK_SIZE):
                after = host.step(state)
                assert after is not None
                assert len(after.running) == NUM_SEQS
                state = after
            groups.append([1e3 * spent / BLOCK_SIZE for spent in host.clock])
        gc.unfreeze()
    schedule, prologue, epilogue = min(groups, key=sum)
    typical = median(map(sum, groups))
    return HostCost(NUM_SEQS, length, num_blocks, idle, schedule, prologue, epilogue, typical)


def fork_cost(length: int = FORKED) -> float:
    """Microseconds to fork one sequence of `length` tokens."""
    state = _state(2 * length // BLOCK_SIZE, 1, length, Host(), 0)
    times = []
    for _ in range(200):
        begin = time.perf_counter()
        folo.fork(state, "0", ["child"])
        times.append(1e6 * (time.perf_counter() - begin))
    return median(times)


def sweep(largest: int, progress: Any) -> list[HostCost]:
    """The same work in pools of 1,000 to `largest` blocks, with nothing cached and with all others cached."""
    costs, num_blocks = [], 1000
    while num_blocks <= largest:
        for cached in (0, num_blocks):
            # Short enough for the smallest pool: 3 blocks each at the end.
            costs.append(
                measure(num_blocks, BLOCK_SIZE, cached, num_groups=2, repeats=3 if num_blocks < 10**6 else 1)
            )
            progress.update()
        num_blocks *= 10
    return costs


def plot(costs: list[HostCost], path: str) -> None:
    """The cost of a step against the number of blocks in the pool."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    kinds = ((False, "nothing cached", report.BLUE), (True, "all other blocks cached", report.ORANGE))
    for full, label, colour in kinds:
        points = [cost for cost in costs if bool(cost.cached) == full]
        blocks, times = [c.num_blocks for c in points], [c.total for c in points]
        axes.plot(blocks, times, "o-", color=colour, label=label)
    axes.set(
        xscale="log",
        xlabel="blocks in the pool",
        ylabel="host time of a step, fastest group (ms)",
        title=f"{NUM_SEQS} running sequences: schedule + prologue + epilogue",
    )
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def register(commands: Any) -> None:
    parser = commands.add_parser(
        "host",
        help="what a step costs on the host, and that it does not grow with the pool",
        description="Time schedule, prologue and epilogue of decode steps, without a model: 256 sequences of "
        "1,000 tokens; as many short ones in pools of 1,000 to 1,000,000 blocks; and a fork.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--blocks",
        type=report.positive,
        default=10**6,
        metavar="N",
        help="largest pool (default: %(default)s)",
    )
    report.add_output_options(parser, plot=True)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    gc.collect()
    gc.freeze()  # the hundreds of thousands of objects that imports leave are no part of a step
    pools = 2 * sum(10**e <= args.blocks for e in range(3, 10))
    with tqdm(total=pools + 2, desc="Host cost", unit="run") as progress:
        main = measure(2 * NUM_SEQS * LENGTH // BLOCK_SIZE, num_groups=8, repeats=20)
        progress.update()
        forking = fork_cost()
        progress.update()
        costs = sweep(args.blocks, progress)
    headers = [
        "sequences",
        "tokens each",
        "blocks",
        "cached",
        "schedule",
        "prologue",
        "epilogue",
        "ms a step",
        "median",
    ]
    rows = []
    for cost in (main, *costs):
        times = (cost.schedule, cost.prologue, cost.epilogue, cost.total, cost.typical)
        shown = [f"{x:.2f}" for x in times]
        rows.append([cost.num_seqs, cost.length, cost.num_blocks, cost.cached, *shown])
    print(report.table(headers, rows))
    print(f"\n{main.total:.2f} ms a step for {NUM_SEQS} sequences of {LENGTH} tokens (target: {TARGET_MS})")
    print(f"{forking:.0f} us to fork a sequence of {FORKED} tokens (target: {FORK_TARGET_US:.0f})")
    if args.json:
        results = {"step": asdict(main), "fork_us": forking, "pools": [asdict(cost) for cost in costs]}
        report.write_json(args.json, "host", results)
    if args.plot:
        plot(costs, args.plot)
    report.print_files(args)
