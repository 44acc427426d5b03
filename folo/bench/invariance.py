"""The first promise as a matrix: the same requests give the same bits in every way to run them.

The requests are real prompts, most of which share a prefix, each once greedy and once as `SAMPLES` seeded
samples at temperature 1. In every cell (`folo.bench.cells`) their tokens and logprobs are compared, bit for
bit, with those of each request alone.

`folo bench invariance` runs a pairwise array of cells: every two levels that can be combined are.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from tempfile import TemporaryDirectory
from typing import Any

from tqdm import tqdm

import folo
from folo.bench import report
from folo.bench.cells import FACTORS, REFERENCE, Cell, Output, Run, Subject, array, every_cell, run
from folo.bench.workloads import QWEN3_600M, random_ids
from folo.model.export import export

LEAST_PREEMPTIONS = 20  # in a cell whose pool is small

# Prompts have these lengths in every vocabulary, so that the pressure on the pool is the same. Most end just
# before a block is full, whatever its size; the longest crosses 128 tokens, a tile of attention's keys.
_SHORT = {
    5: "Once upon a time there was",
    13: "The capital of France is Paris, and the capital of Germany is",
    27: "Q: What is 17 times 23?\nA: Let us work step by step. First, we split 23 into 20 and 3, and then",
}
_QUESTIONS = {
    58: "\nQuestion: what did the keeper count?",
    60: "\nIn one word, this story is about",
    61: "\nThe last sentence in French:",
    62: "\ndef ships(evening):\n    return",
    125: "\nA poem about bread and ships:",
}
_LONGEST_QUESTION = 12  # tokens; the beginning of the document comes before it
_DOCUMENT = (
    "The lighthouse keeper counted the ships that passed each evening and wrote their names in a ledger. On "
    "calm days he could read the painted letters with his glass; in fog he listened for the bells. Once, in "
    "a winter storm, a small boat came in without a light. Its crew had followed the smell of his bread, "
    "which he baked every Friday, and so the keeper learned that there are more ways to find a harbour than "
    "by its lamp. From then on he left a window open while he worked at the oven, and the village at the "
    "foot of the cliff said that no ship was lost on a Friday again."
)
SAMPLES = 16  # of a prompt: many sequences that all outgrow a block
SMALL_POOLS = {8: 24, 16: 18, 32: 20, 64: 12}  # found by trying: each more than the longest request needs


def prompts(tokenizer: Any) -> list[list[int]]:
    """Eight real prompts of 5 to 125 tokens; the last five share a prefix of 46 tokens or more."""

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    document, found = encode(_DOCUMENT), [encode(text)[:length] for length, text in _SHORT.items()]
    for length, text in _QUESTIONS.items():
        question = encode(text)[:_LONGEST_QUESTION]
        found.append(document[: length - len(question)] + question)
    return found


def random_prompts(vocab_size: int) -> list[list[int]]:
    """As `prompts`, of random token ids, for a model without a tokenizer."""
    document = random_ids(max(_QUESTIONS), vocab_size, seed=0)
    found = [random_ids(length, vocab_size, seed=length) for length in _SHORT]
    for length in _QUESTIONS:
        question = random_ids(_LONGEST_QUESTION, vocab_size, seed=length)
        found.append(document[: length - len(question)] + question)
    return found


def requests(prompts: Iterable[Sequence[int]], samples: int = SAMPLES) -> tuple[folo.Request, ...]:
    """Each prompt greedy and sampled; every fourth greedy one has its prompt scored too."""
    found: list[folo.Request] = []
    for n, ids in enumerate(prompts):
        of_prompt = 1 if n % 4 == 3 else None
        greedy = folo.SamplingParams(
            temperature=0, max_tokens=12, logprobs=3, prompt_logprobs=of_prompt, ignore_eos=True
        )
        sampled = folo.SamplingParams(n=samples, seed=n, max_tokens=8, logprobs=3, ignore_eos=True)
        found += [folo.Request(ids, greedy, f"greedy {n}"), folo.Request(ids, sampled, f"sampled {n}")]
    return tuple(found)


@dataclass(frozen=True)
class Result:
    """A cell's run against the reference: counts, and its seconds."""

    cell: Cell
    requests: int
    tokens: int
    preemptions: int
    cached: int
    differing_tokens: int
    differing_logprobs: int
    seconds: float

    @property
    def fault(self) -> str | None:
        if self.differing_tokens or self.differing_logprobs:
            return "differs from the reference"
        if self.cell.pool == "small" and self.preemptions < LEAST_PREEMPTIONS:
            return f"had fewer than {LEAST_PREEMPTIONS} preemptions"
        return None


def compare(subject: Subject, reference: Run, cell: Cell) -> Result:
    """Run the cell, and compare it with `reference`, the run of the cell `REFERENCE`."""
    begin = time.perf_counter()
    found = run(subject, cell)
    seconds = time.perf_counter() - begin
    expected = {output.name: output for output in reference.outputs}
    lost = expected.keys() - {output.name for output in found.outputs}
    pairs = [(expected[output.name], output) for output in found.outputs]
    pairs += [(expected[name], Output(name, [], [])) for name in lost]

    def differing(mine: Sequence[Any], other: Sequence[Any]) -> int:
        return sum(a != b for a, b in zip_longest(mine, other))

    return Result(
        cell=cell,
        requests=len(subject.requests),
        tokens=sum(len(a.token_ids) for a, _ in pairs),
        preemptions=found.preemptions,
        cached=found.cached,
        differing_tokens=sum(differing(a.token_ids, b.token_ids) for a, b in pairs),
        differing_logprobs=sum(differing(a.scores, b.scores) for a, b in pairs),
        seconds=seconds,
    )


def register(commands: Any) -> None:
    parser = commands.add_parser(
        "invariance",
        help="whether the same requests give the same bits in every way to run them",
        description="Run the same requests under many combinations of arrival order, token budget, block "
        "size, prefix cache, block pool, threads, history and compilation, and compare tokens and logprobs "
        "with those of each request alone, bit for bit. Exits with 1 if anything differs.",
        allow_abbrev=False,
    )
    report.add_model_options(parser)
    parser.add_argument(
        "--full", action="store_true", help="all combinations, not only all pairs (many hours)"
    )
    parser.add_argument("--cells", type=report.positive, metavar="N", help="only the first N combinations")
    report.add_output_options(parser, plot=False)
    parser.set_defaults(run=_command)


def _command(args: argparse.Namespace) -> None:
    with TemporaryDirectory() as directory:
        if args.shape:  # new processes load it from there
            export(report.model_of(args), directory)
            asked = requests(random_prompts(QWEN3_600M.vocab_size))
            _compare_all(args, Subject(folo.load(directory), directory, asked, SMALL_POOLS))
        else:
            asked = requests(prompts(folo.load_tokenizer(args.model)))
            _compare_all(args, Subject(report.model_of(args), args.model, asked, SMALL_POOLS))


def _compare_all(args: argparse.Namespace, subject: Subject) -> None:
    cells = (every_cell() if args.full else array())[: args.cells]
    results: list[Result] = []
    try:
        with tqdm(total=len(cells) + 1, desc="Invariance", unit=" cells") as bar:
            reference = run(subject, REFERENCE)
            bar.update()
            for cell in cells:
                results.append(compare(subject, reference, cell))
                bar.update()
    finally:  # if it is cut short, report what there is
        _report(args, subject, results)
    if any(result.fault for result in results):
        raise SystemExit(1)


def _report(args: argparse.Namespace, subject: Subject, results: list[Result]) -> None:
    headers = [*(name.replace("_", " ") for name in FACTORS), "requests", "tokens", "preempted", "cached"]
    headers += ["tokens differ", "logprobs differ", "seconds"]
    rows = [[*asdict(r.cell).values(), *list(asdict(r).values())[1:-1], f"{r.seconds:.1f}"] for r in results]
    print(report.table(headers, rows))
    faults = [f"cell {number} {r.fault}" for number, r in enumerate(results, 1) if r.fault]
    tokens = sum(r.tokens for r in results)
    print(f"{len(results)} cells, {tokens:,} tokens compared: {'; '.join(faults) or 'no bit differs'}")
    if args.json:
        report.write_json(args.json, "invariance", [asdict(r) for r in results], subject.params)
