"""`folo bench gpu` as far as it goes without a GPU: its parts are processes with a time limit."""

from __future__ import annotations

import re
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from folo.bench import gpu
from folo.bench.gpu import Outcome, Part, parts, run, table

ENDLESS = "import subprocess, time\ntry: time.sleep(60)\nfinally: print('interrupted')"


def test_a_part_that_ends_is_kept_with_what_it_printed(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    first = run(Part("first", ("timeit", "-n", "1", "-r", "1", "print('one')"), 60), 60, log)
    second = run(Part("second", ("timeit", "-n", "1", "-r", "1", "print('two'); 1 / 0"), 60), 60, log)
    assert (first.exit_status, second.exit_status) == (0, 1)
    assert "one" in first.output
    assert "one" not in second.output
    assert "ZeroDivisionError" in second.output
    assert log.read_text() == first.output + second.output


@pytest.mark.parametrize("handler", [signal.default_int_handler, signal.SIG_IGN], ids=["front", "background"])
def test_a_part_that_runs_past_its_limit_is_interrupted_and_says_how_far_it_came(
    handler: Any, tmp_path: Path
) -> None:
    """Also where a shell has started all this in its background, which has interrupts ignored."""
    before = signal.signal(signal.SIGINT, handler)
    try:
        outcome = run(Part("endless", ("timeit", "-n", "1", ENDLESS), 60), 5, tmp_path / "log.txt")
    finally:
        signal.signal(signal.SIGINT, before)
    assert outcome.exit_status is None
    assert "interrupted" in outcome.output
    assert outcome.seconds < 50


def test_a_test_that_hangs_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing else would tell which it was: the part is killed before pytest can report."""
    (tmp_path / "test_kernel.py").write_text("import time\ndef test_hangs(): time.sleep(3)")
    for name, value in {"_HANGING": 1, "_TESTS": str(tmp_path)}.items():
        monkeypatch.setattr(gpu, name, value)
    tests = next(part for part in parts(tmp_path) if part.name == "tests")
    command = tuple("" if word == "cuda" else word for word in tests.command)
    outcome = run(replace(tests, command=command), 60, tmp_path / "log.txt")
    assert re.search(r"Timeout \(0:00:01\)!.* in test_hangs", outcome.output, re.DOTALL)


def test_the_table_says_how_each_part_ended() -> None:
    outcomes = [Outcome("a", 0, 10.4, ""), Outcome("b", None, 99.6, ""), Outcome("c", 2, 1.0, "")]
    assert [line.split() for line in table(outcomes).splitlines()[2:]] == [
        ["a", "passed", "10"],
        ["b", "out", "of", "time", "100"],
        ["c", "failed", "(2)", "1"],
    ]


def test_parts_write_into_the_directory(tmp_path: Path) -> None:
    files = {word for part in parts(tmp_path) for word in part.command if word.startswith(str(tmp_path))}
    names = ("latency", "graph", "nano", "invariance", "gptq", "peer")
    assert files == {str(tmp_path / f"{name}.json") for name in names} | {str(tmp_path / "graph.png")}


def test_a_missing_package_costs_a_picture_and_no_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [part.name for part in parts(tmp_path)]
    monkeypatch.setattr(gpu, "find_spec", lambda name: None)
    assert [part.name for part in parts(tmp_path)] == names
    assert not any("--plot" in part.command for part in parts(tmp_path))
