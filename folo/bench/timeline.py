"""What the scheduler did, step by step: a trace for Perfetto, and a picture of the block pool.

    state, records = recorded(params, state)
    Path("trace.json").write_text(json.dumps(trace(records)))  # open it in https://ui.perfetto.dev
    plot(records, "pool.png")

`folo bench timeline` does so for a small workload under pressure.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

import folo
from folo.bench import report, workloads
from folo.bench.recording import Span, StepRecord, lanes, recorded
from folo.bench.report import BLUE, GREEN, GREY, LIGHT, ORANGE, RED, SKY, YELLOW
from folo.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_ENGINE, _REQUESTS = 1, 2  # Perfetto groups tracks by process


def trace(records: Sequence[StepRecord]) -> dict[str, Any]:
    """The trace event format that Perfetto and chrome://tracing read; times in whole microseconds.

    A track for the steps and one for each request, with complete events ("X"); counters ("C") of
    blocks and of sequences, as they are after each step.
    """
    start = records[0].begin if records else 0.0
    begins = [round((step.begin - start) * 1e6) for step in records]
    ends = [round((step.end - start) * 1e6) for step in records]
    events = [_name("process", _ENGINE, 0, "engine"), _name("thread", _ENGINE, 0, "steps")]
    events.append(_name("process", _REQUESTS, 0, "requests"))
    for number, step in enumerate(records):
        s = step.stats
        split = {"prefill": step.num_tokens(decode=False), "decode": step.num_tokens(decode=True)}
        args = {"step": number, **split, "preempted": list(step.preempted), "kv_use": round(s.kv_use, 4)}
        events.append(_complete("step", _ENGINE, 0, begins[number], ends[number], args))
        blocks = {
            "used": s.blocks_used,
            "shared": s.blocks_shared,
            "cached": s.blocks_cached,
            "free": s.blocks_free,
        }
        sequences = {"running": s.running, "waiting": s.waiting}
        for name, values in (("blocks", blocks), ("sequences", sequences)):
            events.append({"ph": "C", "name": name, "pid": _ENGINE, "ts": ends[number], "args": values})
    for thread, (track, lane) in enumerate(lanes(records).items(), 1):
        events.append(_name("thread", _REQUESTS, thread, track))
        for span in lane:
            readmitted = span.idle and span.stop < len(records)
            end = begins[span.stop] if readmitted else ends[span.stop - 1]
            events.append(_complete(span.kind, _REQUESTS, thread, begins[span.first], end, span.args))
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _name(what: str, process: int, thread: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": f"{what}_name", "pid": process, "tid": thread, "args": {"name": name}}


def _complete(
    name: str, process: int, thread: int, begin: int, end: int, args: dict[str, Any]
) -> dict[str, Any]:
    times = {"ts": begin, "dur": end - begin}
    return {"ph": "X", "name": name, "cat": "folo", "pid": process, "tid": thread, **times, "args": args}


_COLOURS = {"prefill": ORANGE, "decode": GREEN, "wait": GREY, "preempted": RED}
_SHORTEST = 48  # tokens that the longest request has at least: with fewer, its parts have no room
_MOST_LANES = 40  # more could not be told apart


def plot(records: Sequence[StepRecord], path: str | os.PathLike[str]) -> None:
    """Draw requests, block pool, tokens and queues over the steps. Needs matplotlib, and a record."""
    if not records:
        raise ValueError("nothing to plot: no step was recorded")
    from matplotlib.figure import Figure  # not pyplot, which keeps global figures and wants a display
    from matplotlib.ticker import MaxNLocator

    rows = lanes(records)
    height = max(1.5, 0.16 * len(rows) + 0.4) if len(rows) <= _MOST_LANES else 0.0
    heights = [height] * bool(height) + [3.2, 1.5, 1.2]
    figure = Figure(figsize=(11, sum(heights) + 1), dpi=150, layout="constrained")
    axes = list(figure.subplots(len(heights), sharex=True, squeeze=False, height_ratios=heights)[:, 0])
    for panel in axes:
        panel.spines[["top", "right"]].set_visible(False)
        panel.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        panel.margins(x=0)
    if height:
        _draw_lanes(axes[0], rows)
    _draw_pool(axes[-3], records)
    _draw_tokens(axes[-2], records)
    _draw_queues(axes[-1], records)
    axes[-1].set_xlabel("step")
    last, seconds = records[-1].stats, records[-1].end - records[0].begin
    figure.suptitle(
        f"{len(rows)} requests in {len(records)} steps ({seconds:.1f} s); {last.preemptions} preemptions; "
        f"prefix hit rate {last.hit_rate:.0%}"
    )
    figure.savefig(path)


def _finish(panel: Axes, title: str, reverse: bool = False) -> None:
    """A title, and a legend beside the panel. reverse: list its areas from the top down."""
    panel.set_title(title, loc="left", fontsize="medium")
    panel.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, reverse=reverse)


def _draw_lanes(panel: Axes, rows: dict[str, list[Span]]) -> None:
    for kind, colour in _COLOURS.items():
        for row, lane in enumerate(rows.values()):
            bars = [(span.first, span.stop - span.first) for span in lane if span.kind == kind]
            panel.broken_barh(bars, (row - 0.4, 0.8), facecolors=colour, label=None if row else kind)
    hits = [
        (s.first + 0.5, row) for row, lane in enumerate(rows.values()) for s in lane if s.args.get("cached")
    ]
    panel.plot(
        *(zip(*hits, strict=True) if hits else ((), ())), "d", color="black", markersize=4, label="prefix hit"
    )
    names = [track.encode("ascii", "backslashreplace").decode() for track in rows]
    short = [name if len(name) <= 20 else f"{name[:17]}..." for name in names]
    panel.set_yticks(range(len(rows)), short, fontsize="x-small", parse_math=False)
    panel.tick_params(axis="y", length=0)
    panel.set_ylim(len(rows) - 0.5, -0.5)
    _finish(panel, "Requests")


def _draw_pool(panel: Axes, records: Sequence[StepRecord]) -> None:
    each = [step.stats for step in records]
    capacity = each[0].num_blocks
    parts = {
        "used by one sequence": (BLUE, [s.blocks_used - s.blocks_shared for s in each]),
        "used by several": (SKY, [s.blocks_shared for s in each]),
        "cached, evictable": (YELLOW, [s.blocks_cached for s in each]),
        "free": (LIGHT, [s.blocks_free for s in each]),
    }
    _stack(panel, parts)
    at = [number + 0.5 for number, step in enumerate(records) if step.preempted]
    panel.plot(at, [1.03 * capacity] * len(at), "v", color=RED, label="preemption")
    panel.set_ylim(0, 1.07 * capacity)
    panel.set_ylabel(f"blocks, of {capacity}")
    _finish(panel, "KV block pool after each step", reverse=True)


def _draw_tokens(panel: Axes, records: Sequence[StepRecord]) -> None:
    kinds = ("decode", "prefill")
    counts = [[step.num_tokens(decode=kind == "decode") for step in records] for kind in kinds]
    _stack(panel, {kind: (_COLOURS[kind], values) for kind, values in zip(kinds, counts, strict=True)})
    panel.set_ylabel("tokens")
    _finish(panel, "Tokens computed in each step", reverse=True)


def _draw_queues(panel: Axes, records: Sequence[StepRecord]) -> None:
    for name, colour, style in (("running", BLUE, "-"), ("waiting", RED, (0, (3, 1)))):
        values = [getattr(step.stats, name) for step in records]
        panel.stairs(values, baseline=None, color=colour, linestyle=style, linewidth=1.8, label=name)
    panel.set_ylim(bottom=0)
    panel.set_ylabel("sequences")
    _finish(panel, "Queues after each step")


def _stack(panel: Axes, parts: dict[str, tuple[str, list[int]]]) -> None:
    """Areas on top of each other, the first at the bottom."""
    base = [0] * len(next(iter(parts.values()))[1])
    for label, (colour, values) in parts.items():
        top = [low + value for low, value in zip(base, values, strict=True)]
        panel.stairs(top, baseline=base, fill=True, color=colour, label=label)
        base = top


def summary(records: Sequence[StepRecord]) -> dict[str, float]:
    """The whole run in numbers."""
    last = records[-1].stats
    return {
        "requests": last.finished,
        "steps": last.steps,
        "prefill_tokens": sum(step.num_tokens(decode=False) for step in records),
        "decode_tokens": sum(step.num_tokens(decode=True) for step in records),
        "preemptions": last.preemptions,
        "prefix_hit_rate": round(last.hit_rate, 4),
        "most_blocks_used": max(step.stats.blocks_used for step in records),
        "mean_kv_use": round(fmean(step.stats.kv_use for step in records), 4),
        "median_step_ms": round(1e3 * median(step.end - step.begin for step in records), 2),
        "seconds": round(records[-1].end - records[0].begin, 3),
    }


def register(commands: Any) -> None:
    parser = commands.add_parser(
        "timeline",
        help="what the scheduler does under pressure, step by step",
        description="Run requests that hardly fit into a small block pool, and show what the scheduler did: "
        "who waited, who was preempted, what the prefix cache gave. Requests come in over time: pairs of "
        "questions about one document, chat turns, long prompts.",
        allow_abbrev=False,
    )
    report.add_model_option(parser)
    parser.add_argument(
        "--requests", type=report.positive, default=16, metavar="N", help="(default: %(default)s)"
    )
    parser.add_argument(
        "--num-blocks",
        type=report.positive,
        default=64,
        metavar="N",
        help="blocks of 16 tokens (default: %(default)s)",
    )
    parser.add_argument(
        "--max-num-seqs",
        type=report.positive,
        default=8,
        metavar="N",
        help="sequences that run at a time (default: %(default)s)",
    )
    parser.add_argument(
        "--max-num-batched-tokens",
        type=report.positive,
        default=96,
        metavar="N",
        help="tokens of one step (default: %(default)s)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="S", help="of lengths and tokens (default: %(default)s)"
    )
    parser.add_argument(
        "--trace", type=report.output_file, metavar="FILE", help="write a trace for https://ui.perfetto.dev"
    )
    report.add_output_options(parser, plot=True)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    params = folo.load(args.model)
    cache = folo.CacheConfig(num_blocks=args.num_blocks)
    scheduler = folo.SchedulerConfig(
        max_num_seqs=args.max_num_seqs, max_num_batched_tokens=args.max_num_batched_tokens
    )
    state = folo.init(params, cache, scheduler)
    longest = min(state.max_model_len, args.num_blocks * cache.block_size // 3)
    if longest < _SHORTEST:
        raise ConfigError(f"{args.num_blocks} blocks hold no mix of requests; give --num-blocks 9 or more")
    arrivals = workloads.pressure(args.requests, longest, params.config.vocab_size, args.seed)
    total = sum(arrival.request.sampling.max_tokens or 0 for arrival in arrivals)
    with tqdm(total=total, desc="Timeline", unit=" tokens") as bar:
        state, records = recorded(
            params,
            state,
            arrivals=arrivals,
            each=lambda step: bar.update(sum(c.sampled for c in step.chunks)),
        )
    results = summary(records)
    print(
        report.table(
            ["quantity", "value"], [[name.replace("_", " "), value] for name, value in results.items()]
        )
    )
    if args.json:
        steps = [asdict(step) for step in records]
        report.write_json(args.json, "timeline", {"summary": results, "steps": steps}, params)
    if args.trace:
        content = trace(records) | {"otherData": report.environment(params)}
        report.write_atomically(args.trace, json.dumps(content).encode())
    if args.plot:
        plot(records, args.plot)
    report.print_files(args)
