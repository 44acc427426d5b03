"""The first promise, as a matrix: the same requests give the same bits in every way to run them."""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from graphs import Recorded

import folo
from folo.bench import invariance
from folo.bench.cells import FACTORS, REFERENCE, Cell, Output, Run, Subject, array, every_cell, run
from folo.bench.invariance import LEAST_PREEMPTIONS, SMALL_POOLS, compare, prompts, requests
from folo.model.forward import layer_in_heap
from folo.step import replayed

# Cells for the default model: every level of every factor at least once, with few that take long.
CHOSEN = [
    Cell("alone", 64, 32, "off", "ample", 1, "plain", "eager"),
    Cell("together", 2048, 16, "cold", "ample", 1, "forked", "eager"),
    Cell("together", 64, 8, "warm", "ample", 2, "plain", "eager"),
    Cell("together", 2048, 64, "cold", "ample", 1, "plain", "compiled"),
    Cell("together", 2048, 8, "off", "ample", 2, "forked", "compiled"),
    Cell("shuffled", 64, 8, "cold", "small", 1, "forked", "eager"),
    Cell("shuffled", 2048, 16, "warm", "ample", 1, "restored", "eager"),
    Cell("shuffled", 64, 32, "warm", "ample", 1, "forked", "eager"),
    Cell("shuffled", 16, 64, "cold", "ample", 2, "plain", "eager"),
    Cell("one a step", 2048, 16, "off", "small", 2, "forked", "eager"),
    Cell("one a step", 64, 16, "warm", "ample", 1, "forked", "eager"),
    Cell("one a step", 16, 32, "off", "ample", 1, "plain", "eager"),
]
# What they ask of it: half of the prompts, and fewer samples, that press on smaller pools.
PROMPTS, SAMPLES, POOLS = (1, 3, 6, 7), 7, {8: 20, 16: 11}


def title(cell: Cell) -> str:
    return "-".join(map(str, vars(cell).values())).replace(" ", "_")


@pytest.fixture(scope="module")
def subject(tiny: folo.Params, tiny_dir: Path) -> Subject:
    tokenizer = folo.load_tokenizer(str(tiny_dir))
    return Subject(tiny, str(tiny_dir), requests(prompts(tokenizer)), SMALL_POOLS)


@pytest.fixture(scope="module")
def reference(subject: Subject) -> Run:
    return run(subject, REFERENCE)


@pytest.fixture(scope="module")
def default_subject() -> Subject:
    params, found = folo.load(dtype="bfloat16", use_tqdm=False), prompts(folo.load_tokenizer())
    return Subject(params, None, requests([found[n] for n in PROMPTS], SAMPLES), POOLS)


@pytest.fixture(scope="module")
def default_reference(default_subject: Subject) -> Run:
    return run(default_subject, REFERENCE)


def verify(subject: Subject, reference: Run, cell: Cell) -> None:
    """Compare the cell, and check that what it is named after did happen."""
    result = compare(subject, reference, cell)
    assert (result.differing_tokens, result.differing_logprobs) == (0, 0)
    num_tokens = sum(len(output.token_ids) for output in reference.outputs)
    if cell.history == "forked":
        assert num_tokens < result.tokens < 2 * num_tokens, "children, and those parents that are not aborted"
    else:
        assert result.tokens == num_tokens
    if cell.pool == "small":
        assert result.preemptions >= LEAST_PREEMPTIONS
    else:
        assert result.preemptions == 0
    if cell.cache == "off":
        assert result.cached == 0
    if cell.cache == "warm":
        assert result.cached > 0
    assert result.fault is None


@pytest.mark.no_cover
@pytest.mark.parametrize("cell", array(), ids=title)
def test_all_pairs_on_a_tiny_model(cell: Cell, subject: Subject, reference: Run) -> None:
    verify(subject, reference, cell)


@pytest.mark.parametrize("cell", CHOSEN, ids=title)
def test_chosen_cells_on_the_default_model(
    cell: Cell, default_subject: Subject, default_reference: Run
) -> None:
    verify(default_subject, default_reference, cell)


def test_the_chosen_cells_have_every_level() -> None:
    levels: dict[str, set[Any]] = defaultdict(set)
    for cell in CHOSEN:
        for name, level in vars(cell).items():
            levels[name].add(level)
    assert levels == {name: set(all_of_them) for name, all_of_them in FACTORS.items()}


def test_every_cell_is_every_combination_but_one_alone_in_a_small_pool() -> None:
    cells = every_cell()
    assert len(set(cells)) == len(cells) == 7 / 8 * 4 * 3 * 4 * 3 * 2 * 2 * 3 * 2
    assert set(array()) <= set(cells)
    assert not any(cell.arrival == "alone" and cell.pool == "small" for cell in cells)


def test_prompts_share_prefixes_and_end_where_blocks_do(subject: Subject) -> None:
    found = [request.prompt_token_ids for request in subject.requests[::2]]
    assert [len(ids) for ids in found] == [5, 13, 27, 58, 60, 61, 62, 125]
    assert len({tuple(ids[:46]) for ids in found[3:]}) == 1
    greedy, sampled = subject.requests[-2:]
    assert (greedy.sampling.temperature, sampled.sampling.temperature) == (0, 1)
    assert None not in (greedy.sampling.logprobs, sampled.sampling.logprobs)


class TestComparison:
    """What counts as a difference: found with runs that were tampered with."""

    @pytest.fixture
    def few(self, subject: Subject) -> Subject:
        return replace(subject, requests=subject.requests[:2])

    def altered(self, run: Run, **changes: Any) -> Run:
        first, *others = run.outputs
        return run._replace(outputs=[first._replace(**changes), *others])

    def test_a_token_counts(self, few: Subject) -> None:
        expected = run(few, REFERENCE)
        ids = expected.outputs[0].token_ids
        result = compare(few, self.altered(expected, token_ids=[*ids[:-1], ids[-1] ^ 1]), REFERENCE)
        assert (result.differing_tokens, result.differing_logprobs) == (1, 0)
        assert result.fault == "differs from the reference"

    def test_the_last_bit_of_a_logprob_counts(self, few: Subject) -> None:
        expected = run(few, REFERENCE)
        token, logprob, *rest = expected.outputs[0].scores[3].split()
        mantissa, exponent = logprob.split("p")
        other = "0" if mantissa[-1] != "0" else "1"
        scores = list(expected.outputs[0].scores)
        scores[3] = " ".join([token, f"{mantissa[:-1]}{other}p{exponent}", *rest])
        result = compare(few, self.altered(expected, scores=scores), REFERENCE)
        assert (result.differing_tokens, result.differing_logprobs) == (0, 1)

    def test_what_is_missing_counts(self, few: Subject) -> None:
        expected = run(few, REFERENCE)
        lost = Output("lost", [1, 2], ["a", "b", "c"])
        result = compare(few, expected._replace(outputs=[*expected.outputs, lost]), REFERENCE)
        assert (result.differing_tokens, result.differing_logprobs) == (2, 3)

    def test_a_small_pool_without_pressure_is_a_fault(self, few: Subject) -> None:
        result = compare(few, run(few, REFERENCE), replace(REFERENCE, arrival="together", pool="small"))
        assert (result.differing_tokens, result.fault) == (0, "had fewer than 20 preemptions")


class TestCommand:
    def start(self, *options: str) -> None:
        parser = argparse.ArgumentParser()
        invariance.register(parser.add_subparsers())
        args = parser.parse_args(["invariance", *options])
        args.run(args)

    def test_prints_a_row_for_each_cell(
        self, tiny_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        self.start("--model", str(tiny_dir), "--cells", "2", "--json", str(tmp_path / "results.json"))
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 2 + 2 + 1
        assert lines[-1].endswith("no bit differs")
        content = json.loads((tmp_path / "results.json").read_text())
        assert [row["cell"] for row in content["results"]] == [vars(cell) for cell in array()[:2]]

    def test_a_difference_is_exit_code_1(
        self, tiny_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def fake(subject: Subject, cell: Cell) -> Run:
            return Run([Output("0#0", [cell.budget], [])], 0, 0)

        monkeypatch.setattr(invariance, "run", fake)
        cells = [replace(REFERENCE, budget=16), REFERENCE]
        monkeypatch.setattr(invariance, "every_cell", lambda: cells)
        with pytest.raises(SystemExit) as info:
            self.start("--model", str(tiny_dir), "--full")
        assert info.value.code == 1
        assert "cell 1 differs from the reference" in capsys.readouterr().out


@pytest.mark.parametrize("cell", [cell for cell in array() if cell.history != "restored"][::3], ids=title)
def test_replayed_steps_in_flight_on_a_tiny_model(
    cell: Cell, subject: Subject, reference: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = replayed(Recorded(), layer_in_heap)
    monkeypatch.setattr("folo.bench.cells._step", lambda mode: step)
    verify(subject, reference, cell)
