"""The Triton kernels in Triton's interpreter, which has to be chosen before import: a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "interpreted"


@pytest.mark.parametrize("tests", sorted(FOLDER.glob("test_*.py")), ids=lambda path: path.stem)
def test_kernels_pass_their_tests_in_the_interpreter(tests: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--confcutdir={FOLDER}", str(tests)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
