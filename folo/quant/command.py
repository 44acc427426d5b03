"""`folo quantize` and `folo eval`."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

import folo
from folo import quant
from folo.bench.report import table
from folo.errors import ConfigError
from folo.model.load import DTYPES
from folo.model.params import Params
from folo.quant.write import check_target, write

_MODEL_HELP = "a directory, a .gguf file, a Hugging Face id, or 'default' (SmolLM2-135M-Instruct)"
_CALIBRATION_LENGTH = 512
_DECODE_TOKENS = 64  # whose pace is measured


def register(commands: Any) -> None:
    _register_quantize(commands)
    parser = commands.add_parser(
        "eval",
        help="measure how well models predict a text",
        description="Measure how well models predict a text.",
    )
    names = parser.add_subparsers(metavar="NAME", required=True)
    one = names.add_parser(
        "ppl",
        help="a model's perplexity",
        description="A model's perplexity on a text, under windows that slide: every token but the first is "
        "predicted once.",
        allow_abbrev=False,
    )
    one.add_argument("model", metavar="MODEL", help=_MODEL_HELP)
    two = names.add_parser(
        "compare",
        help="two models side by side",
        description="Two models of one vocabulary on the same predictions: perplexity, the KL divergence of "
        "the second's next-token distributions from the first's, how often the likeliest token is the same, "
        "weights in memory, and the pace of one request.",
        allow_abbrev=False,
    )
    two.add_argument("first", metavar="A", help=_MODEL_HELP)
    two.add_argument("second", metavar="B", help="likewise")
    for each, run in ((one, _perplexity), (two, _compare)):
        each.add_argument("--text", metavar="FILE", required=True, help="a UTF-8 text file")
        each.add_argument(
            "--window", type=int, default=1024, metavar="N", help="tokens of a window (default: %(default)s)"
        )
        each.add_argument(
            "--stride",
            type=int,
            default=512,
            metavar="N",
            help="tokens from one window to the next (default: %(default)s)",
        )
        each.add_argument(
            "--dtype",
            choices=("auto", *DTYPES),
            default="auto",
            help="of the weights (default: auto, the checkpoint's own)",
        )
        each.set_defaults(run=run)


def _register_quantize(commands: Any) -> None:
    parser = commands.add_parser(
        "quantize",
        help="make a model of 2, 4 or 8 bits with GPTQ",
        description="Quantise the linear layers of a model with GPTQ and write a checkpoint in AutoGPTQ's "
        "format, with its tokenizer. Deterministic: the same input gives the same bytes.",
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="MODEL", help=_MODEL_HELP)
    parser.add_argument("--out", metavar="DIR", required=True, help="the directory to make")
    parser.add_argument("--bits", type=int, default=4, metavar="N", help="2, 4 or 8 (default: %(default)s)")
    parser.add_argument(
        "--group-size", type=int, default=128, metavar="N", help="-1: all columns (default: %(default)s)"
    )
    parser.add_argument("--desc-act", action="store_true", help="round columns of the largest inputs first")
    parser.add_argument("--asym", action="store_true", help="fit each group's zero to its range")
    parser.add_argument(
        "--damp",
        type=float,
        default=0.01,
        metavar="X",
        help="added to the Hessian's diagonal, relative to its mean (default: %(default)s)",
    )
    parser.add_argument(
        "--no-clip", action="store_true", help="let scales reach the largest weight of their group"
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--calibration", metavar="FILE", help="a UTF-8 text file (default: one of folo's own)"
    )
    source.add_argument(
        "--nearest", action="store_true", help="round to nearest, without calibration or clipping"
    )
    parser.set_defaults(run=_quantize)


def _quantize(args: argparse.Namespace) -> None:
    clip = not (args.no_clip or args.nearest)
    config = quant.QuantConfig(args.bits, args.group_size, not args.asym, args.desc_act, args.damp, clip)
    out = Path(args.out)
    check_target(out)
    text = quant.default_text() if args.calibration is None else _read(args.calibration)
    tokenizer = folo.load_tokenizer(args.model)
    params = folo.load(args.model, device="cpu")
    if args.nearest:
        quantized = quant.nearest(params, config)
    else:
        length = min(_CALIBRATION_LENGTH, params.config.max_position_embeddings)
        quantized = quant.quantize(params, quant.sequences(tokenizer, text, length), config, report=_report)
    write(quantized, tokenizer, out)
    print(f"wrote {out}: {_size(quantized)}, dense {_size(params)}")


def _report(name: str, error: float) -> None:
    tqdm.write(f"{name:32}  relative error {error:.2e}", file=sys.stderr)


def _perplexity(args: argparse.Namespace) -> None:
    ids = _tokens(args.model, args.text)
    params = folo.load(args.model, dtype=args.dtype)
    found = quant.perplexity(params, ids, args.window, args.stride)
    print(f"perplexity     {found.value:.4f}")
    print(f"nats per token {found.nats:.6f}")
    print(f"predictions    {found.tokens:,}, in windows of {args.window} at strides of {args.stride}")


def _compare(args: argparse.Namespace) -> None:
    ids = _tokens(args.first, args.text)
    if _tokens(args.second, args.text) != ids:
        raise ConfigError(f"the tokenizers of {args.first} and {args.second} cut the text into other tokens")
    first, second = models = [folo.load(name, dtype=args.dtype) for name in (args.first, args.second)]
    found = quant.compare(first, second, ids, args.window, args.stride)
    rows = [
        ["perplexity", f"{found.first.value:.4f}", f"{found.second.value:.4f}"],
        ["nats per token", f"{found.first.nats:.6f}", f"{found.second.nats:.6f}"],
        ["weights", *map(_size, models)],
        ["decode tokens/s", *(f"{_pace(params, ids):.1f}" for params in models)],
    ]
    print(table(["", "A", "B"], rows))
    loss = found.second.value / found.first.value - 1
    print(f"\nB against A, {found.first.tokens:,} predictions: perplexity {100 * loss:+.2f} %, ", end="")
    print(f"KL {found.kl:.5f} nats, same likeliest token {100 * found.agreement:.2f} %")


def _pace(params: Params, ids: list[int]) -> float:
    """Tokens a second of one request, after its first."""
    sampling = folo.SamplingParams(temperature=0, max_tokens=_DECODE_TOKENS + 1, ignore_eos=True)
    state = folo.submit(folo.init(params), folo.Request(ids[:_DECODE_TOKENS], sampling, id="pace"))
    begin = 0.0
    while (batch := folo.schedule(state)) is not None:
        state, _ = folo.step(params, state, batch)
        begin = begin or time.perf_counter()
    (output,) = folo.outputs(state)["pace"].outputs
    return (len(output.token_ids) - 1) / (time.perf_counter() - begin)


def _tokens(model: str, file: str) -> list[int]:
    tokenizer = folo.load_tokenizer(model)
    return tokenizer.encode(_read(file), add_special_tokens=False, verbose=False)


def _read(file: str) -> str:
    try:
        with open(file, encoding="utf-8-sig") as text:
            return text.read()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: {error}") from error


def _size(params: Params) -> str:
    return f"{params.num_bytes / 2**20:,.1f} MiB"
