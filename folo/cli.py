"""The command line: `folo generate` and `folo info`; `quantize`, `eval` and `bench` are registered here.

Results go to standard output; progress, metrics and errors to standard error. Exit codes: 0; 2 for bad
input, with one line that says what is wrong; 130 after Ctrl-C; 141 when the reader of the output is gone.

A command is a function of the parsed arguments, and one that registers its parser.
"""

from __future__ import annotations

import argparse
import codecs
import io
import json
import math
import os
import sys
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any, NoReturn

import torch

import folo
from folo.bench import command as bench
from folo.config import CacheConfig
from folo.errors import ConfigError, FoloError, RequestError
from folo.llm import LLM
from folo.model.config import DecoderConfig
from folo.model.load import DTYPES, num_bytes, open_checkpoint, tensor_shapes
from folo.model.locate import locate
from folo.model.params import Params
from folo.quant import command as quant
from folo.request import RequestOutput
from folo.sampling import SamplingParams
from folo.state.engine import init

_BAD_INPUT, _INTERRUPTED, _CLOSED_PIPE = 2, 130, 141  # the last two as shells report SIGINT and SIGPIPE
_MEMINFO = Path("/proc/meminfo")  # of Linux; its MemAvailable is what new allocations can take
_DTYPES = ("auto", *DTYPES)
_OVERRIDES = ("max_tokens", "temperature", "top_p", "top_k", "seed")  # options that are sampling parameters


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. `argv` is without the program's name."""
    if sys.stdout is None:
        print("folo: error: standard output is closed", file=sys.stderr)
        return _BAD_INPUT
    if sys.stderr is None:  # closed: what is meant for it is lost, and must not end up among the results
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (for the rest of the process)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character loses no more than that
    try:
        args = _parser().parse_args(argv)
        args.run(args)
        sys.stdout.flush()
    except BrokenPipeError:
        # What is still buffered has nowhere to go, and the interpreter will try to flush it on exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _CLOSED_PIPE
    except (FoloError, OSError) as error:
        print("folo: error:", " ".join(str(error).split()), file=sys.stderr)
        return _BAD_INPUT
    except KeyboardInterrupt:
        print("folo: interrupted", file=sys.stderr)
        return _INTERRUPTED
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise RequestError(f"{message} (see {self.prog} --help)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="folo", description="A purely functional LLM inference engine for PyTorch.")
    parser.add_argument("--version", action="version", version=f"folo {folo.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for register in (_register_generate, _register_info, quant.register, bench.register):
        register(commands)
    return parser


def _register_generate(commands: Any) -> None:
    parser = commands.add_parser(
        "generate",
        help="continue prompts, or answer them",
        description="Continue prompts, or answer them with --chat. Without --prompt and --prompts-file, the "
        "prompt is what comes in on standard input.",
        allow_abbrev=False,
    )
    _add_model_options(parser)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompt", metavar="TEXT", action="append", help="may be given several times")
    source.add_argument("--prompts-file", metavar="FILE", help="a text file with one prompt a line")
    parser.add_argument("--chat", action="store_true", help="put each prompt through the chat template")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--stream", action="store_true", help="print the text as it comes; one prompt only")
    form.add_argument("--json", action="store_true", help="print one JSON object per prompt, each on a line")
    parser.add_argument(
        "--max-tokens", type=int, default=128, metavar="N", help="most output tokens (default: %(default)s)"
    )
    parser.add_argument("--temperature", type=float, metavar="T", help="0 is greedy (default: the model's)")
    parser.add_argument("--top-p", type=float, metavar="P", help="in (0, 1] (default: the model's)")
    parser.add_argument("--top-k", type=int, metavar="K", help="0 is off (default: the model's)")
    parser.add_argument(
        "--seed", type=int, metavar="S", help="one for all prompts (default: one for each, by its place)"
    )
    parser.set_defaults(run=_generate)


def _register_info(commands: Any) -> None:
    parser = commands.add_parser(
        "info",
        help="describe a model, and what fits into memory",
        description="Describe a model, and what fits into memory, without loading its weights.",
        allow_abbrev=False,
    )
    parser.add_argument("model", nargs="?", metavar="MODEL", help=_MODEL_HELP)
    parser.add_argument("--dtype", choices=_DTYPES, default="auto", help=_DTYPE_HELP)
    parser.set_defaults(run=_info)


_MODEL_HELP = "a directory, a .gguf file or a Hugging Face id (default: SmolLM2-135M-Instruct)"
_DTYPE_HELP = "of weights and K/V (default: auto, the checkpoint's own)"


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="MODEL", help=_MODEL_HELP)
    parser.add_argument("--dtype", choices=_DTYPES, default="auto", help=_DTYPE_HELP)


def _generate(args: argparse.Namespace) -> None:
    texts = _read_prompts(args.prompt, args.prompts_file)
    if args.stream and len(texts) > 1:
        raise RequestError(f"--stream takes one prompt, got {len(texts)}")

    given = {name: getattr(args, name) for name in _OVERRIDES if getattr(args, name) is not None}
    SamplingParams(**given)  # refuse bad values before the model is loaded
    llm = LLM(args.model, dtype=args.dtype)
    params = replace(llm.get_default_sampling_params(), **given)
    prompts = [_conversation(llm, text) if args.chat else text for text in texts]
    begun = time.perf_counter()
    if args.stream:
        outputs = [_print_stream(llm.stream(prompts[0], params))]
    else:
        outputs = llm.generate(prompts, params)
    seconds = time.perf_counter() - begun
    if args.json:
        only_ascii = codecs.lookup(sys.stdout.encoding or "utf-8").name != "utf-8"  # no encoding: a StringIO
        for text, output in zip(texts, outputs, strict=True):
            print(json.dumps(_record(text, output), ensure_ascii=only_ascii))
    elif not args.stream:
        _print_texts(texts, outputs)
    sys.stdout.flush()  # before the table, where both go to one terminal
    print("", *_metrics_table(outputs, seconds), sep="\n", file=sys.stderr)


def _read_prompts(given: list[str] | None, file: str | None) -> list[str]:
    """The prompts: at least one, none of them blank."""
    if given is not None:
        named = [("--prompt", text) for text in given]
    elif file is not None:
        lines = io.StringIO(_read(file), newline=None)
        named = [(f"{file}, line {number}", line.removesuffix("\n")) for number, line in enumerate(lines, 1)]
        named = named or [(file, "")]
    elif sys.stdin is None or sys.stdin.isatty():
        raise RequestError("no prompt: give --prompt, --prompts-file, or text on standard input")
    else:
        named = [("standard input", _read(None).removesuffix("\n"))]
    for name, text in named:
        if not text.strip():
            raise RequestError(f"{name}: the prompt is empty")
        if any("\ud800" <= character <= "\udfff" for character in text):  # bytes of argv that were no text
            raise RequestError(f"{name}: the prompt is not UTF-8 text")
    return [text for _, text in named]


def _read(file: str | None) -> str:
    """The text of a file, or of standard input."""
    try:
        data = sys.stdin.buffer.read() if file is None else Path(file).read_bytes()
        return data.decode("utf-8-sig")
    except OSError as error:
        raise RequestError(f"{file or 'standard input'}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise RequestError(f"{file or 'standard input'}: not UTF-8 text ({error})") from error


def _conversation(llm: LLM, text: str) -> list[int]:
    return llm.apply_chat_template([{"role": "user", "content": text}])


def _print_stream(pieces: Generator[str, None, RequestOutput]) -> RequestOutput:
    try:
        while True:
            print(next(pieces), end="", flush=True)
    except StopIteration as end:
        return end.value
    finally:
        print(flush=True)


def _print_texts(prompts: Sequence[str], outputs: Sequence[RequestOutput]) -> None:
    """The text alone if there is one, else each below its prompt."""
    for number, (prompt, output) in enumerate(zip(prompts, outputs, strict=True), 1):
        if len(prompts) > 1:
            line = " ".join(prompt.split())
            print(f"[{number}] {line if len(line) <= 80 else f'{line[:76]} ...'}")
        print(output.outputs[0].text)
        if number < len(prompts):
            print()


def _record(prompt: str, output: RequestOutput) -> dict[str, Any]:
    completion = output.outputs[0]
    return {
        "prompt": prompt,
        "prompt_token_ids": output.prompt_token_ids,
        "text": completion.text,
        "token_ids": completion.token_ids,
        "finish_reason": completion.finish_reason,
        "stop_reason": completion.stop_reason,
        "seed": completion.seed,
        "metrics": dict(output.metrics),
    }


def _metrics_table(outputs: Sequence[RequestOutput], seconds: float) -> Iterator[str]:
    """Two lines: headings and values; TTFT and TPOT are means over the prompts."""
    num_output = [len(output.outputs[0].token_ids) for output in outputs]
    ttft = fmean(output.metrics["ttft"] for output in outputs)
    paces = [o.metrics["tpot"] for o, count in zip(outputs, num_output, strict=True) if count > 1]
    mean = "mean " if len(outputs) > 1 else ""
    columns = {
        "prompts": str(len(outputs)),
        "prompt tokens": str(sum(len(output.prompt_token_ids) for output in outputs)),
        "output tokens": str(sum(num_output)),
        f"{mean}TTFT": f"{ttft * 1e3:.0f} ms",
        f"{mean}TPOT": f"{fmean(paces) * 1e3:.1f} ms" if paces else "-",
        "output tokens/s": f"{sum(num_output) / seconds:.1f}",
    }
    widths = [max(map(len, column)) for column in columns.items()]
    for line in zip(*columns.items(), strict=True):
        yield "   ".join(value.rjust(width) for value, width in zip(line, widths, strict=True))


def _info(args: argparse.Namespace) -> None:
    path = locate(args.model)
    checkpoint = open_checkpoint(path)
    config = checkpoint.config(
        checkpoint.stored_dtype if args.dtype == "auto" else getattr(torch, args.dtype)
    )
    described = _described(config, *num_bytes(checkpoint, config))
    rows = {"model": path.name if args.model is None else args.model, **described}
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name:{width}}  {value}")


def _described(config: DecoderConfig, weights: int, quantised: bool) -> dict[str, str]:
    num_parameters = sum(math.prod(shape) for shape in tensor_shapes(config).values())
    dtype = str(config.dtype).removeprefix("torch.")
    per_token = config.kv_per_token * config.dtype.itemsize
    rows = {
        "architecture": config.architecture,
        "layers": f"{config.num_layers}, hidden size {config.hidden_size}, MLP {config.intermediate_size}",
        "heads": f"{config.num_heads} query, {config.num_kv_heads} key/value, of {config.head_dim}",
        "vocabulary": f"{config.vocab_size:,} tokens",
        "context": f"{config.max_position_embeddings:,} tokens",
        "parameters": f"{num_parameters / 1e6:,.1f} M",
        "weights": f"{_size(weights)} in {dtype}{', layers quantised' if quantised else ''}",
        "K/V per token": _size(per_token),
        "KV heap": f"{CacheConfig().kv_cache_gib:.1f} GiB by default on a CPU: {_default_heap(config)}",
    }
    for name, free in _free_memory().items():
        left = free - weights
        fits = f"weights and K/V of {left // per_token:,} tokens" if left > 0 else "the weights do not fit"
        rows[name] = f"{_size(free)} free: {fits}"
    return rows


def _default_heap(config: DecoderConfig) -> str:
    """How much the default KV heap holds, by `init` on tensors that take no memory."""
    nothing = torch.empty(0, dtype=config.dtype, device="meta")
    try:
        state = init(Params(embed=nothing, layers=(), norm=nothing, lm_head=None, config=config))
    except ConfigError as error:
        return f"too little ({error})"
    tokens = (state.cache.num_blocks or 0) * state.cache.block_size
    return f"{tokens:,} tokens, {tokens / config.max_position_embeddings:.1f} sequences of full length"


def _free_memory() -> dict[str, int]:
    """Free bytes by kind of memory; of host memory only on Linux, which reports them."""
    free: dict[str, int] = {}
    try:
        meminfo = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines())
        free["host memory"] = int(meminfo["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        pass
    if torch.cuda.is_available():
        free["GPU memory"] = torch.cuda.mem_get_info()[0]
    return free


def _size(num_bytes: int) -> str:
    unit, name = next(
        ((unit, name) for unit, name in ((2**30, "GiB"), (2**20, "MiB")) if num_bytes >= unit), (2**10, "KiB")
    )
    return f"{num_bytes / unit:,.1f} {name}"
