"""The examples run as they are written, on the default model."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"

SHOWN: dict[str, list[str | re.Pattern[str]]] = {
    "basic_inference": ["' Paris.", "finish_reason: length", "Gravity is"],
    "batch_inference": ["finish_reason 'stop'", "Each request alone:", "the same tokens"],
    "few_shot": ["I loved every minute of it.    -> positive", "The worst film of the year.    -> negative"],
    "seeded_experiment": [re.compile(r"digest ([0-9a-f]{16})\n(?s:.*)digest \1\n")],
    "beam_search": [re.compile(r"\A(  -[01]\.\d{3} [\"'] that it.*\n){4}\Z")],
    "tree_search": [
        "bird catches the star.",
        "bird catches the worm.",
        "No other line has more than 0.",
        re.compile(r"\d{3,4} nodes hold \d\d blocks; if none were shared, it would be \d{4}\."),
    ],
    "conversation": [
        "(34 prompt tokens, 0 of them cached)",
        "(80 prompt tokens, 64 of them cached)",
        "<|im_start|>user\nThank you!<|im_end|>\n<|im_start|>assistant\n",
        # one answer that was cut off, and one that ended itself: each is closed once
        re.compile(r"[^>]<\|im_end\|>\n<\|im_start\|>user\nThank you!"),
        re.compile(r"[^>]<\|im_end\|>\n<\|im_start\|>user\nWho discovered it\?"),
        "Its answer, with 0 tokens cached: The discovery of gravity",
    ],
    "stepwise": ["Branch one: ...", "Branch two: ...", "once more from the held state"],
}


def test_every_example_is_run() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(SHOWN)


@pytest.mark.parametrize("name", ["beam_search", "tree_search"])
def test_a_search_takes_fewer_than_sixty_lines(name: str) -> None:
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) < 60


@pytest.mark.parametrize("name", SHOWN)
def test_runs_as_written(name: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, EXAMPLES / f"{name}.py"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    for text in SHOWN[name]:
        found = text in done.stdout if isinstance(text, str) else text.search(done.stdout)
        assert found, (text, done.stdout)
    assert "Traceback" not in done.stderr
