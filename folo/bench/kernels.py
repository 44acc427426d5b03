"""`folo bench kernels`: how near each op comes to the roofline, shape by shape.

The roofline is measured between an op's runs: the rate at which memory is read, and the rate of torch's
product of two large matrices. An op's bound is the larger of bytes / read rate and operations / product
rate. Every op runs on data that caches do not hold: on copies in turn that together exceed them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from tqdm import tqdm

from folo import ops
from folo.bench import report
from folo.bench.roofline import BYTES, Machine, Roofline, middle, timed
from folo.model.load import DTYPES
from folo.ops import kv_cache
from folo.ops.memory import Arena

_MOST = 400  # copies of an op's data, unless fewer come to BYTES
_REPEATS = 5
_BLOCK_SIZE = 16
_SMALL = 4 << 20  # bytes that are read in a tenth of a millisecond


@dataclass(frozen=True)
class Shape:
    """The linear layers `[N, K]` of a decoder layer, and the heads of its attention."""

    name: str
    linears: dict[str, tuple[int, int]]
    heads: tuple[int, int, int]  # query heads, KV heads, head dimension


SHAPES = (
    Shape(
        "SmolLM2-135M",
        {
            "qkv": (960, 576),
            "out": (576, 576),
            "gate_up": (3072, 576),
            "down": (576, 1536),
            "head": (49152, 576),
        },
        (9, 3, 64),
    ),
    Shape(
        "Qwen3-0.6B",
        {
            "qkv": (4096, 1024),
            "out": (1024, 2048),
            "gate_up": (6144, 1024),
            "down": (1024, 3072),
            "head": (151936, 1024),
        },
        (16, 8, 128),
    ),
)
ROWS = (1, 32, 256)
CONTEXTS = (256, 4096)


@dataclass(frozen=True)
class Result:
    """One op: median seconds, bytes and operations, the rates between its runs, bound over seconds."""

    model: str
    op: str
    shape: str
    seconds: float
    num_bytes: float
    operations: float
    roof: Roofline
    share: float

    @property
    def left(self) -> str:
        """What keeps the op from the roofline, if it reaches less than 90 % of it."""
        if self.share >= 0.9:
            return "-"
        if self.op == "attention":
            return "softmax" if "prefill" in self.shape else "K and V that come late"
        if self.num_bytes < _SMALL:
            return "waking threads, first lines"
        return "weights that come late"


# Calls to time, each on data of its own; the bytes of one, and its operations.
Work = tuple[Sequence[Callable[[], object]], float, float]


def _linear(dtype: torch.dtype, n: int, k: int, rows: int) -> Work:
    size = dtype.itemsize * n * k
    x = torch.ones(rows, k, dtype=dtype)
    count = min(_MOST, max(2, BYTES // size))
    arena = Arena(BYTES)
    weights = [ops.packed(torch.ones(n, k, dtype=dtype), arena) for _ in range(count)]
    num_bytes = size + dtype.itemsize * rows * (k + n)
    return [partial(ops.linear, x, w) for w in weights], num_bytes, 2 * rows * n * k


def _attention(
    dtype: torch.dtype,
    heads: tuple[int, int, int],
    batch: int,
    context: int,
    queries: int,
    scattered: bool = False,
) -> Work:
    """scattered: a sequence's pages lie anywhere, not one after the other as a new heap hands them out."""
    num_heads, num_kv_heads, head_dim = heads
    blocks = -(-context // _BLOCK_SIZE)
    size = 2 * dtype.itemsize * batch * context * num_kv_heads * head_dim
    numbers = torch.Generator().manual_seed(0)
    count = min(_MOST, max(2, BYTES // size))
    starts = torch.arange(batch + 1, dtype=torch.int32) * queries
    lengths = torch.full((batch,), context, dtype=torch.int32)
    q = torch.ones(batch * queries, num_heads, head_dim, dtype=dtype)

    def call() -> Callable[[], object]:
        shape = (1, batch * blocks, _BLOCK_SIZE, num_kv_heads, head_dim)
        (k,), (v,) = (part.fill_(1) for part in kv_cache.zeros(shape, dtype, torch.device("cpu")))
        pages = (
            torch.randperm(batch * blocks, generator=numbers) if scattered else torch.arange(batch * blocks)
        )
        tables = pages.int().view(batch, blocks)
        return lambda: ops.paged_attention(q, k, v, tables, starts, lengths, head_dim**-0.5)

    pairs = batch * sum(context - n for n in range(queries))  # of a query and a key that it sees
    num_bytes = size + 2 * dtype.itemsize * batch * queries * num_heads * head_dim
    return [call() for _ in range(count)], num_bytes, 4 * pairs * num_heads * head_dim


def cases(shape: Shape, dtype: torch.dtype) -> list[tuple[str, str, Callable[[], Work]]]:
    """Op, shape and what makes its calls."""
    found: list[tuple[str, str, Callable[[], Work]]] = []
    attention = partial(_attention, dtype, shape.heads)
    for rows in ROWS:
        for name, (n, k) in shape.linears.items():
            text = f"{name} [{rows}, {k}] x [{k}, {n}]"
            found.append(("linear", text, partial(_linear, dtype, n, k, rows)))
    for context in CONTEXTS:
        for batch in (1, 16):
            text = f"decode, {batch} x {context} tokens"
            found.append(("attention", text, partial(attention, batch, context, 1)))
    text = f"decode, 1 x {CONTEXTS[-1]} tokens, scattered pages"
    found.append(("attention", text, partial(attention, 1, CONTEXTS[-1], 1, True)))
    found.append(("attention", "prefill, 1 x 2048 tokens", partial(attention, 1, 2048, 2048)))
    return found


def measure(
    shape: Shape, dtype: torch.dtype, rates: Callable[[], Roofline], each: Callable[[], object]
) -> list[Result]:
    """rates: measures the roofline (`Machine.now`), before each timed run. Shares are medians of pairs."""
    results = []
    for op, text, make in cases(shape, dtype):
        calls, num_bytes, operations = make()

        def work(calls: Sequence[Callable[[], object]] = calls) -> None:
            for call in calls:
                call()

        work()  # once, so that no page is new
        pairs = [(rates(), timed(work) / len(calls)) for _ in range(_REPEATS)]
        share = median(roof.seconds(num_bytes, operations) / seconds for roof, seconds in pairs)
        roof, seconds = middle([roof for roof, _ in pairs]), median(seconds for _, seconds in pairs)
        results.append(Result(shape.name, op, text, seconds, num_bytes, operations, roof, share))
        each()
    return results


def register(commands: Any) -> None:
    parser = commands.add_parser(
        "kernels",
        help="what each op reaches of the roofline",
        description="Time the linear layers and attention of two models, against the rates of reading memory "
        "and of torch's matrix product, which are measured between their runs. The product is in float32 "
        "where torch is faster with that.",
        allow_abbrev=False,
    )
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="default: %(default)s")
    report.add_output_options(parser, plot=True)
    parser.set_defaults(run=_run)


def plot(results: list[Result], roof: Roofline, dtype: str, path: str) -> None:
    """Operations a second against operations a byte, under the roofline of the whole run.

    A point lies as far below it as the op did below the rates measured beside it.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    intensity = sorted([2.0**-2, roof.multiply / roof.read, 2.0**11])
    bound = [min(roof.multiply, roof.read * i) / 1e9 for i in intensity]
    axes.plot(intensity, bound, color="black", label="roofline")
    colours = {"linear": report.BLUE, "attention": report.ORANGE}
    for op, colour in colours.items():
        own = [result for result in results if result.op == op]
        x = [result.operations / result.num_bytes for result in own]
        y = [r.share * r.operations / roof.seconds(r.num_bytes, r.operations) / 1e9 for r in own]
        axes.plot(x, y, "o", color=colour, label=op, markersize=4)
    axes.set(
        xscale="log", yscale="log", xlabel="operations a byte", ylabel="GFLOP/s", title=f"Kernels in {dtype}"
    )
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def _run(args: argparse.Namespace) -> None:
    dtype = DTYPES[args.dtype]
    machine = Machine(dtype)
    results: list[Result] = []
    with tqdm(total=sum(len(cases(shape, dtype)) for shape in SHAPES), desc="Kernels", unit="op") as bar:
        for shape in SHAPES:
            results += measure(shape, dtype, machine.now, bar.update)
    roof = middle([result.roof for result in results])
    rows = [
        [
            r.model,
            r.op,
            r.shape,
            f"{1e6 * r.seconds:,.0f}",
            f"{r.num_bytes / r.seconds / 1e9:.1f} of {r.roof.read / 1e9:.1f}",
            f"{r.operations / r.seconds / 1e9:,.0f} of {r.roof.multiply / 1e9:,.0f}",
            f"{100 * r.share:.0f} %",
            r.left,
        ]
        for r in results
    ]
    print(
        report.table(
            ["model", "op", "shape", "us", "GB/s", "GFLOP/s", "of the roofline", "what is left"], rows
        )
    )
    print(f"\nroofline, in the median: {roof}")
    if args.json:
        content = {"dtype": args.dtype, "roofline": asdict(roof), "ops": [asdict(r) for r in results]}
        report.write_json(args.json, "kernels", content)
    if args.plot:
        plot(results, roof, args.dtype, args.plot)
    report.print_files(args)
