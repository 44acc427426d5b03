"""What every benchmark reports: the machine and the versions, a table, a JSON file, a picture."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import folo
from folo.bench import workloads
from folo.files import beside
from folo.model.load import DTYPES
from folo.model.params import Params
from folo.ops.arithmetic import arithmetic

# Okabe and Ito's colours, which are told apart with any colour vision.
BLUE, SKY, YELLOW, ORANGE = "#0072B2", "#56B4E9", "#F0E442", "#E69F00"
GREEN, RED, GREY, LIGHT = "#009E73", "#D55E00", "#C8C8C8", "#E8E8E8"

_CPUINFO = Path("/proc/cpuinfo")
_NUMBER = frozenset("0123456789+-.<>")  # a column whose cells all begin with one of these is flush right


def environment(params: Params | None = None) -> dict[str, Any]:
    """What decides a result's bits and speed: the machine, the versions and, with `params`, the dtype.

    Plain values, ready for JSON. `gpu` and `driver` are there if the parameters lie on a CUDA device.
    """
    found: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": _cpu_name(),
        "cores": _num_cores(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "folo": folo.__version__,
        **arithmetic(torch.device("cpu") if params is None else params.device),
    }
    if params is not None:
        found |= {
            "architecture": params.config.architecture,
            "parameters": params.num_parameters,
            "dtype": str(params.dtype).removeprefix("torch."),
            "device": params.device.type,
        }
        if params.device.type == "cuda":
            found |= gpu(params.device)
    return found


def table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Aligned plain text, two spaces between columns; columns of numbers are flush right."""
    columns = list(zip(headers, *[map(str, row) for row in rows], strict=True))
    widths = [max(map(len, column)) for column in columns]
    right = [all(cell[:1] in _NUMBER for cell in column[1:]) for column in columns]
    lines = [
        "  ".join(
            cell.rjust(width) if flush else cell.ljust(width)
            for cell, width, flush in zip(line, widths, right, strict=True)
        ).rstrip()
        for line in zip(*columns, strict=True)
    ]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def print_files(args: argparse.Namespace) -> None:
    """Say which files were written."""
    for option in ("json", "trace", "plot"):
        if (path := getattr(args, option, None)) is not None:
            print(f"wrote {path}")


def write_json(path: str | os.PathLike[str], name: str, results: Any, params: Params | None = None) -> None:
    """Write {"benchmark": name, "environment": ..., "results": results}: the whole file or none of it.

    Raises OSError if it cannot be written, ValueError if a number is not finite.
    """
    path = Path(path)
    content = {"benchmark": name, "environment": environment(params), "results": results}
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    write_atomically(path, text.encode())


def write_atomically(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file: the whole of it or, where that fails, none of it. Raises OSError."""
    path = Path(path)
    part = beside(path)
    try:
        part.write_bytes(data)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def add_output_options(parser: argparse.ArgumentParser, plot: bool) -> None:
    """--json FILE and, with `plot`, --plot FILE; a path that cannot be written to is refused at once."""
    parser.add_argument(
        "--json", type=output_file, metavar="FILE", help="write results and environment as JSON"
    )
    if plot:
        parser.add_argument(
            "--plot", type=plot_file, metavar="FILE", help="draw a picture: .png, .svg or .pdf (matplotlib)"
        )


def add_model_option(parser: argparse._ActionsContainer) -> None:
    """--model MODEL, as `folo generate` takes it."""
    parser.add_argument(
        "--model",
        metavar="MODEL",
        help="a directory, a .gguf file or a Hugging Face id (default: SmolLM2-135M-Instruct)",
    )


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """--model MODEL or --shape NAME, and --dtype, for `model_of`."""
    choice = parser.add_mutually_exclusive_group()
    add_model_option(choice)
    choice.add_argument(
        "--shape", choices=("qwen3-0.6b",), help="random weights of this shape, in place of a model"
    )
    parser.add_argument(
        "--dtype",
        choices=("auto", *DTYPES),
        default="auto",
        help="of weights and K/V (default: auto, the checkpoint's own; bfloat16 for random weights)",
    )


def model_of(args: argparse.Namespace) -> Params:
    """The model that the options of `add_model_options` name."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.shape:
        config = workloads.QWEN3_600M
        return workloads.random_model(
            replace(config, dtype=DTYPES.get(args.dtype, config.dtype)), device=device
        )
    return folo.load(args.model, args.dtype)


def positive(text: str) -> int:
    """An integer of at least 1, as an argparse type."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {value}")
    return value


def output_file(name: str) -> Path:
    """A path to write to, as an argparse type: its directory has to be there."""
    path = Path(name)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{name}: is a directory")
    if path.exists() and not path.is_file():  # a rename would put a file in its place
        raise argparse.ArgumentTypeError(f"{name}: is no regular file")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{name}: there is no directory {path.parent}")
    return path


def plot_file(name: str) -> Path:
    """As `output_file`, for a picture."""
    path = output_file(name)
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise argparse.ArgumentTypeError(f"{name}: expected a name that ends in .png, .svg or .pdf")
    if importlib.util.find_spec("matplotlib") is None:  # refused now, not after minutes of work
        raise argparse.ArgumentTypeError("a picture needs matplotlib: pip install 'folo[bench]'")
    return path


def _cpu_name() -> str:
    try:
        lines = _CPUINFO.read_text().splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _num_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def gpu(device: torch.device) -> dict[str, str]:
    """A GPU's model, its driver and its version of CUDA."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split("\n")[0]
    except (OSError, subprocess.CalledProcessError):
        driver = "unknown"
    return {
        "gpu": torch.cuda.get_device_name(device),
        "driver": driver,
        "cuda": torch.version.cuda or "none",
    }
