"""What each of the engine's ideas is worth: the same work without it and with it, side by side in one run.

- Continuous batching: the same prompts one at a time (max_num_seqs=1) and together. Prefix caching is off.
- Paged KV, against memory reserved for the longest possible request. The baseline is simulated: each
  running sequence has max_model_len slots, so capacity // max_model_len of them run at a time
  (max_num_seqs), and its KV use is filled slots / (running * max_model_len). folo's is filled slots /
  slots of the blocks in use. Both are means over the steps. max_model_len is 768, the longest request that
  the workload can draw (512 in, 256 out), so nothing is reserved beyond need. The accounting does not
  depend on weights, so this part runs on a one-layer model of zeros; it is counted, not timed.
- Chunked prefill: a long prompt arrives while other requests decode. Measured is the time between two tokens
  of those others, over their next tokens: as many in both arms, enough to span the whole prefill. The median
  shows the price: with chunks, most of those tokens share their step with a chunk.
- Prefix reuse: time to first token of a request that shares its prefix with an earlier one, without and
  with the cache.

Timed arms alternate and medians are reported; only the long prefill runs once per arm. Machines are shared,
so the ratios count, not the times.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean, median
from typing import Any

import numpy as np
from tqdm import tqdm

import folo
from folo.bench import report, workloads
from folo.bench.arms import BASELINE, HEADERS, WITH, Row, Samples, compare
from folo.bench.recording import StepRecord, recorded
from folo.bench.report import BLUE, ORANGE
from folo.bench.workloads import Arrival
from folo.errors import ConfigError


@dataclass(frozen=True)
class Sizes:
    """How much work each comparison does."""

    repeats: int = 3
    prompts: int = 16
    longest: int = 256  # tokens of a prompt; longer ones are cut
    output: int = 32
    mixed: int = 64  # requests of 16..512 tokens in and 16..256 out, for the accounting
    blocks: int = 512
    decoders: int = 4
    decoded: int = 40
    long_prompt: int = 4000
    budget: int = 256
    threshold: int = 128
    prefix: int = 1000
    suffix: int = 32
    prefix_repeats: int = 5

    @property
    def runs(self) -> int:
        """How many times a state is run to its end, warming up and filling the cache included."""
        return 1 + 2 * self.repeats + 2 + 2 + 1 + 2 * self.prefix_repeats


QUICK = Sizes(
    repeats=1,
    prompts=4,
    longest=16,
    output=6,
    mixed=6,
    blocks=96,
    decoders=2,
    decoded=12,
    long_prompt=160,
    budget=48,
    threshold=24,
    prefix=96,
    suffix=8,
    prefix_repeats=1,
)


class Bench:
    """The four comparisons on one model. Each returns its rows, and the samples behind them."""

    def __init__(
        self, params: folo.Params, sizes: Sizes, each: Callable[[StepRecord], object] = lambda record: None
    ) -> None:
        self.params, self.sizes, self.each = params, sizes, each
        self.vocab_size = params.config.vocab_size

    def warm_up(self) -> None:
        """Run a few steps that are not measured: a process's first ones are slow."""
        self._run(self._state(False), [Arrival(0, self._request("warm up", 8, 4))])

    def batching(self, tokenizer: Any) -> tuple[list[Row], Samples]:
        sizes = self.sizes
        prompts = workloads.encoded(tokenizer, sizes.prompts, sizes.longest)
        work = workloads.at_once(
            workloads.request(str(n), prompt, sizes.output) for n, prompt in enumerate(prompts)
        )
        rates: Samples = {BASELINE: [], WITH: []}
        for _ in range(sizes.repeats):
            for arm, num_seqs in ((BASELINE, 1), (WITH, len(work))):
                _, records = self._run(self._state(False, folo.SchedulerConfig(num_seqs)), work)
                rates[arm].append(_num_sampled(records) / _seconds(records))
        return [compare("continuous batching", "output throughput", "tokens/s", rates, at_least=3)], rates

    def paging(self) -> tuple[list[Row], Samples]:
        sizes, params = self.sizes, workloads.miniature()
        requests = workloads.mixed(sizes.mixed, params.config.vocab_size)
        longest = 768
        cache = folo.CacheConfig(num_blocks=sizes.blocks)
        capacity = sizes.blocks * cache.block_size
        use, at_once = Samples(), Samples()
        for arm, num_seqs in ((BASELINE, capacity // longest), (WITH, len(requests))):
            state = folo.init(params, cache, folo.SchedulerConfig(num_seqs, max_model_len=longest))
            _, records = recorded(params, state, arrivals=workloads.at_once(requests), each=self.each)
            held = [step.stats for step in records if step.stats.running]
            slots = [s.blocks_used * cache.block_size for s in held]
            reserved = [s.running * longest for s in held]
            filled = [s.kv_use * size for s, size in zip(held, slots, strict=True)]
            of = reserved if arm == BASELINE else slots
            use[arm] = [100 * part / whole for part, whole in zip(filled, of, strict=True)]
            at_once[arm] = [float(s.running) for s in held if s.waiting]
        row = compare("paged KV", "KV use", "%", use, fmean)
        rows = [replace(row, target="> 96 %", met=row.folo > 96)]
        return [*rows, compare("paged KV", "requests at once", "", at_once, fmean)], use

    def chunking(self) -> tuple[list[Row], Samples]:
        sizes, before = self.sizes, 8  # tokens that the others have when the long prompt comes
        others = [self._request(f"decoding {n}", 16, before + sizes.decoded) for n in range(sizes.decoders)]
        late = Arrival(before, self._request("long", sizes.long_prompt, 1))
        gaps, first = Samples(), Samples()
        budgets = {BASELINE: (sizes.long_prompt + 16, 0), WITH: (sizes.budget, sizes.threshold)}
        for arm, (budget, threshold) in budgets.items():
            config = folo.SchedulerConfig(
                max_num_batched_tokens=budget, long_prefill_token_threshold=threshold
            )
            _, records = self._run(self._state(False, config), [*workloads.at_once(others), late])
            times = token_times(records)
            first[arm] = [times.pop("long")[0] - records[before].begin]
            gaps[arm] = np.diff(list(times.values()))[:, before - 1 :].T.flatten().tolist()
        feature, latency = "chunked prefill", "decode latency,"
        rows = [
            compare(feature, f"{latency} p50", "s", gaps, lower=True),
            compare(feature, f"{latency} p99", "s", gaps, _p99, lower=True, at_least=1),
            compare(feature, f"{latency} max", "s", gaps, max, lower=True, at_least=1),
            compare(feature, "TTFT of the long prompt", "s", first, lower=True),
        ]
        return rows, gaps

    def reuse(self) -> tuple[list[Row], Samples]:
        sizes = self.sizes
        shared = workloads.random_ids(sizes.prefix, self.vocab_size, seed=1)
        states = {BASELINE: self._state(False), WITH: self._state(True)}
        states[WITH], _ = self._run(states[WITH], [Arrival(0, workloads.request("first", shared, 1))])
        ttft: Samples = {BASELINE: [], WITH: []}
        for n in range(sizes.prefix_repeats):
            prompt = shared + workloads.random_ids(sizes.suffix, self.vocab_size, seed=2 + n)
            for arm, state in states.items():
                states[arm], records = self._run(state, [Arrival(0, workloads.request(str(n), prompt, 1))])
                ttft[arm].append(_seconds(records))
        name = f"TTFT, {sizes.prefix} of {sizes.prefix + sizes.suffix} tokens shared"
        return [compare("prefix reuse", name, "s", ttft, lower=True, at_least=5)], ttft

    def _request(self, id: str, length: int, num_output: int) -> folo.Request:
        prompt = workloads.random_ids(length, self.vocab_size, seed=sum(id.encode()))
        return workloads.request(id, prompt, num_output)

    def _state(self, caching: bool, scheduler: folo.SchedulerConfig | None = None) -> folo.EngineState:
        sizes = self.sizes
        together = sizes.prompts * (sizes.longest + sizes.output)
        others = sizes.decoders * (32 + sizes.decoded)
        slots = max(together, sizes.long_prompt + others, 2 * (sizes.prefix + sizes.suffix))
        cache = folo.CacheConfig(num_blocks=slots // 16 + 16, enable_prefix_caching=caching)
        return folo.init(self.params, cache, scheduler)

    def _run(
        self, state: folo.EngineState, work: Sequence[Arrival]
    ) -> tuple[folo.EngineState, list[StepRecord]]:
        return recorded(self.params, state, arrivals=work, each=self.each)


def token_times(records: Sequence[StepRecord]) -> dict[str, list[float]]:
    """When each request got its tokens: the ends of the steps that sampled them."""
    times: dict[str, list[float]] = {}
    for step in records:
        for chunk in step.chunks:
            if chunk.sampled:
                times.setdefault(chunk.track, []).append(step.end)
    return times


def _num_sampled(records: Sequence[StepRecord]) -> int:
    return sum(chunk.sampled for step in records for chunk in step.chunks)


def _seconds(records: Sequence[StepRecord]) -> float:
    """Seconds in `schedule` and `step`, without the recording."""
    return sum(step.end - step.begin for step in records)


def _p99(values: Iterable[float]) -> float:
    return float(np.percentile(list(values), 99))


_NAMES = {
    "batching": ("one at a time", "together"),
    "paging": ("reserved at full length", "paged"),
    "chunking": ("prefill in one step", "in chunks"),
    "reuse": ("cache off", "cache on"),
}
_COLOURS = (ORANGE, BLUE)


def plot(samples: dict[str, Samples], decoders: int, path: str | os.PathLike[str]) -> None:
    """One panel per feature, without it and with it. Needs matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7.5), dpi=150, layout="constrained")
    panels = dict(zip(_NAMES, figure.subplots(2, 2).flatten(), strict=True))
    for name, panel in panels.items():
        for at, (arm, label, colour) in enumerate(zip((BASELINE, WITH), _NAMES[name], _COLOURS, strict=True)):
            values = samples[name][arm]
            if name in ("batching", "reuse"):
                middle = median(values)
                panel.bar(f"{label}\nmedian {middle:.3g}", middle, 0.6, color=colour)
                panel.plot([at] * len(values), values, "o", color="black", markersize=3.5)
                continue
            if name == "chunking":  # the requests that decode get their tokens in the same steps
                values = np.median(np.reshape(values, (-1, decoders)), axis=1)
            panel.plot(range(1, len(values) + 1), values, color=colour, label=label)
        panel.spines[["top", "right"]].set_visible(False)
        panel.margins(y=0.1)
    paging, chunking = panels["paging"], panels["chunking"]
    paging.axhline(96, color="black", linewidth=1, linestyle=":", label="96 %")
    paging.set(ylim=(0, 102), xlabel="step", ylabel="filled slots, %")
    chunking.set(yscale="log", xlabel="tokens after a long prompt came in", ylabel="time per token, s")
    for panel in (paging, chunking):
        panel.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3, frameon=False)
    panels["batching"].set(ylabel="output tokens/s")
    panels["reuse"].set(ylabel="time to first token, s")
    panels["batching"].set_title("Continuous batching (higher is better)")
    paging.set_title("Paged KV: use of the memory held (higher is better)")
    chunking.set_title("Chunked prefill: latency of the others (lower is better)")
    panels["reuse"].set_title("Prefix reuse (lower is better)")
    figure.savefig(path)


def register(commands: Any) -> None:
    parser = commands.add_parser(
        "ablation",
        help="what each feature is worth",
        description="What continuous batching, paged KV, chunked prefill and prefix reuse are worth: each "
        "against the engine without it, in one run. Takes some minutes.",
        allow_abbrev=False,
    )
    report.add_model_option(parser)
    parser.add_argument("--quick", action="store_true", help="little work, for tests; its ratios say nothing")
    report.add_output_options(parser, plot=True)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    sizes = QUICK if args.quick else Sizes()
    params, tokenizer = folo.load(args.model), folo.load_tokenizer(args.model)
    if sizes.long_prompt >= params.config.max_position_embeddings:
        raise ConfigError(
            f"the ablation needs {sizes.long_prompt + 1} positions, and the model has "
            f"{params.config.max_position_embeddings}; try --quick"
        )
    rows, samples = [], {}
    with tqdm(desc="Ablation", total=sizes.runs, unit=" runs") as bar:
        bench = Bench(
            params, sizes, each=lambda step: bar.update(not (step.stats.running or step.stats.waiting))
        )
        bench.warm_up()
        for name in _NAMES:
            bar.set_description(f"Ablation: {name}")
            work = getattr(bench, name)
            new, samples[name] = work(tokenizer) if name == "batching" else work()
            rows += new
    print(report.table(HEADERS, [row.cells() for row in rows]))
    if args.json:
        results = {"sizes": asdict(sizes), "rows": [asdict(row) for row in rows], "samples": samples}
        report.write_json(args.json, "ablation", results, params)
    if args.plot:
        plot(samples, sizes.decoders, args.plot)
    report.print_files(args)
