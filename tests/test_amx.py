"""The AMX kernels on a CPU without AMX: their instructions trap, and do in memory what the manual says.

It shows what the compiler made of the kernels: operands, configurations, shapes of tiles, and that what a
tile is loaded from was written before. It does not show what the hardware rounds. A CPU with AMX runs the
kernels in every other test.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from folo.ops import cpu

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def tiles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library that carries the instructions out."""
    path = tmp_path_factory.mktemp("amx") / "amx_tiles.so"
    compiler = os.environ.get("CXX", "g++")
    command = [compiler, "-std=c++17", "-O3", "-march=native", "-shared", "-fPIC", "-ftls-model=initial-exec"]
    subprocess.run([*command, str(HERE / "amx_tiles.cpp"), "-o", str(path)], check=True)
    return path


@pytest.mark.skipif(
    "avx512_bf16" not in cpu.instruction_sets(), reason="the kernels need AVX-512 and bf16 too"
)
@pytest.mark.parametrize(
    ("files", "chosen"),
    [
        (("test_ops_contract.py", "test_ops_accuracy.py"), "(linear or attention) and amx and dtype1"),
        (("test_gptq_kernels.py",), "TestContract and amx"),
    ],
    ids=["dense", "quantised"],
)
def test_kernels_pass_their_tests(files: tuple[str, ...], chosen: str, tiles: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:faulthandler"]
    done = subprocess.run(
        [*command, "-k", chosen, *(str(HERE / name) for name in files)],
        env={**os.environ, "LD_PRELOAD": str(tiles), "FOLO_CPU_ISA": "amx"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert done.stdout.count(".") >= 20, done.stdout
