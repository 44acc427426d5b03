"""Where the kernels come from: the compiler, the cache, and what happens without them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import folo
from folo.ops import cpu
from folo.ops.arithmetic import arithmetic
from folo.ops.cpu import build, isa

needs_kernels = pytest.mark.skipif(cpu.instruction_set() == cpu.REFERENCE, reason="plain torch has no build")

_SCRIPT = """
import torch
import folo
from folo.ops.arithmetic import arithmetic

found = arithmetic(torch.device("cpu"))
print(found["backend"], found["instruction_set"])
print(folo.ops.linear(torch.ones(2, 3), torch.ones(4, 3)).sum().item())
"""

_USES = """
import os, sys
from pathlib import Path
import folo
from folo.ops import cpu

for name in [cpu.instruction_set(), *sys.argv[1:]]:
    try:
        cpu.use(name)
    except folo.ConfigError as error:
        print(error, file=sys.stderr)
    made = Path(os.environ["XDG_CACHE_HOME"]).rglob("*.so")
    print(cpu.instruction_set(), *sorted(path.name for path in made))
"""


def imported(*arguments: str, script: str = _SCRIPT, **environment: str) -> subprocess.CompletedProcess[str]:
    """folo in a new process."""
    return subprocess.run(
        [sys.executable, "-c", script, *arguments],
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


@needs_kernels
def test_the_libraries_are_compiled_once() -> None:
    before = [path.stat().st_mtime_ns for path in build.libraries(cpu.instruction_set())]
    assert [path.stat().st_mtime_ns for path in build.libraries(cpu.instruction_set())] == before


def compiler_of(path: Path, *made: Path) -> Path:
    """A compiler that takes no time: it gives out libraries that were made before, and has no others."""
    cases = "".join(f'*/{library.name}) cp {library} "$to" ;;\n' for library in made)
    path.write_text(f'#!/bin/sh\nfor to; do :; done\ncase "$to" in\n{cases}*.so) exit 1 ;;\nesac\n')
    path.chmod(0o755)
    return path


@needs_kernels
@pytest.mark.parametrize("compiles", [True, False])
def test_an_instruction_set_is_compiled_when_it_is_first_used(compiles: bool, tmp_path: Path) -> None:
    """And not before; where it cannot be, an error says so, and the ops run on with what they had."""
    own = cpu.instruction_set()
    other = next((name for name in isa.of_this_cpu() if name != own), None)
    if other is None:
        pytest.skip("this CPU has one instruction set")
    operators, kernels = build.libraries(own)
    compiler = compiler_of(
        tmp_path / "c++", operators, kernels, *(build.libraries(other)[1:] if compiles else [])
    )
    done = imported(other, script=_USES, CXX=str(compiler), XDG_CACHE_HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    first, then = (line.split() for line in done.stdout.splitlines())
    assert first == [own, kernels.name, operators.name]
    assert done.stderr.count("folo: compiling the CPU kernels (once)") == 1
    assert done.stderr.count(f"folo: compiling the CPU kernels for {other} (once)") == 1
    if compiles:
        assert then == [other, *sorted([f"kernels.{other}.so", kernels.name]), operators.name]
    else:
        assert then == first
        assert f"no kernels for {other}: {compiler}" in done.stderr


def test_an_instruction_set_that_is_not_there_cannot_be_used() -> None:
    with pytest.raises(folo.ConfigError, match=r"'sse9': there are .*reference"):
        cpu.use("sse9")


@pytest.mark.parametrize(
    ("flags", "found"),
    [
        ("avx2 fma", []),
        ("avx2 fma f16c avx512_bf16", ["avx2"]),
        ("avx2 fma f16c avx512f avx512bw avx512vl avx512dq", ["avx512", "avx2"]),
    ],
)
def test_an_instruction_set_needs_all_its_features(
    flags: str, found: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(isa, "_flags", lambda: set(flags.split()))
    assert isa.of_this_cpu() == found


def test_a_run_records_what_computes_it() -> None:
    found = arithmetic(torch.device("cpu"))
    kernels = cpu.instruction_set() != cpu.REFERENCE
    assert found["backend"] == ("cpu" if kernels else "reference")
    assert found["instruction_set"] == cpu.instruction_set() or not kernels
