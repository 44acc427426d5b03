"""Where the kernels come from: the compiler, the cache, and what happens without them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from folo.ops import cpu
from folo.ops.arithmetic import arithmetic
from folo.ops.cpu import build

_SCRIPT = """
import torch
import folo
from folo.ops.arithmetic import arithmetic

found = arithmetic(torch.device("cpu"))
print(found["backend"], found["instruction_set"])
print(folo.ops.linear(torch.ones(2, 3), torch.ones(4, 3)).sum().item())
"""


def imported(**environment: str) -> subprocess.CompletedProcess[str]:
    """folo in a new process."""
    return subprocess.run(
        [sys.executable, "-c", _SCRIPT],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_without_a_compiler_one_warning_says_so_and_the_reference_runs(tmp_path: Path) -> None:
    done = imported(CXX="no-such-compiler", XDG_CACHE_HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("RuntimeWarning: folo runs its slow reference ops") == 1
    assert "no C++ compiler (no-such-compiler): install g++ or set CXX" in done.stderr
    backend, total = done.stdout.splitlines()
    assert (backend.split()[0], float(total)) == ("reference", 24)


def test_a_compiler_that_fails_is_quoted_and_leaves_nothing_behind(tmp_path: Path) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho cannot compile >&2\nexit 1\n")
    compiler.chmod(0o755)
    done = imported(CXX=str(compiler), XDG_CACHE_HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "folo runs its slow reference ops" in done.stderr
    assert "cannot compile" in done.stderr
    assert not list(tmp_path.rglob("*.so"))


@pytest.mark.parametrize("name", cpu.instruction_sets())
def test_the_environment_pins_the_instruction_set(name: str) -> None:
    done = imported(FOLO_CPU_ISA=name)
    assert done.returncode == 0, done.stderr
    backend, instruction_set = done.stdout.splitlines()[0].split()
    assert backend == ("reference" if name == cpu.REFERENCE else "cpu")
    assert name == cpu.REFERENCE or instruction_set == name


def test_plain_torch_needs_no_compiler() -> None:
    done = imported(CXX="no-such-compiler", FOLO_CPU_ISA=cpu.REFERENCE)
    assert (done.returncode, done.stderr) == (0, "")


def test_an_instruction_set_that_is_not_there_is_refused() -> None:
    done = imported(FOLO_CPU_ISA="sse9")
    assert done.returncode == 1
    assert "ConfigError: FOLO_CPU_ISA='sse9': this CPU has " in done.stderr


def test_the_library_is_compiled_once() -> None:
    before = build.library().stat().st_mtime_ns
    assert build.library().stat().st_mtime_ns == before


def test_a_run_records_what_computes_it() -> None:
    found = arithmetic(torch.device("cpu"))
    kernels = cpu.instruction_set() != cpu.REFERENCE
    assert found["backend"] == ("cpu" if kernels else "reference")
    assert found["instruction_set"] == cpu.instruction_set() or not kernels
