"""The AMX kernels on a CPU without AMX: the same source, over tiles in memory that do what the manual says.

It shows that rows, columns and tails find their places and that the contract holds; not what the hardware
rounds. A CPU with AMX runs the kernels themselves in every other test.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from folo.ops import cpu


@pytest.mark.skipif(
    "avx512_bf16" not in cpu.instruction_sets(), reason="the emulation needs AVX-512 and bf16"
)
@pytest.mark.parametrize(
    ("files", "chosen"),
    [
        (("test_ops_contract.py", "test_ops_accuracy.py"), "(linear or attention) and amx and dtype1"),
        (("test_gptq_kernels.py",), "TestContract and amx"),
    ],
    ids=["dense", "quantised"],
)
def test_kernels_pass_their_tests_on_emulated_tiles(files: tuple[str, ...], chosen: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen]
    done = subprocess.run(
        [*command, *(str(Path(__file__).with_name(name)) for name in files)],
        env={**os.environ, "FOLO_EMULATE_AMX": "1", "FOLO_CPU_ISA": "amx"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert done.stdout.count(".") >= 20, done.stdout
