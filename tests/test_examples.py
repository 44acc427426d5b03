"""The examples run as they are written, on the default model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"

SHOWN = {
    "basic_inference": ["' Paris.", "finish_reason: length", "Gravity is"],
    "batch_inference": ["finish_reason 'stop'", "Each request alone:", "the same tokens"],
    "few_shot": ["I loved every minute of it.    -> positive", "The worst film of the year.    -> negative"],
    "stepwise": ["Branch one: ...", "Branch two: ...", "once more from the held state"],
}


def test_every_example_is_run() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} >= set(SHOWN)


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
        assert text in done.stdout
    assert "Traceback" not in done.stderr
