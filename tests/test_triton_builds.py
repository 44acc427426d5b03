"""Every Triton kernel in every configuration, compiled to machine code as on a GPU, without one.

What can be read off the machine code is checked here: that it exists, fits into shared memory, keeps its
tiles in registers, and that kernels which may serve the same rows multiply with the same instructions and
reduce in the same order.
"""

from __future__ import annotations

import re
import subprocess
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from threading import Lock
from typing import Any

import pytest
import triton
import triton_source
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from folo.ops import cuda
from folo.ops.cuda.kernel import Build

SHARED_MEMORY = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024}
"""Bytes that a program may have, for the compute capabilities that folo compiles for (times ten).

The code for 8.9 (and 8.6) is that for 8.0, but for fewer stages where these would not fit."""

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
OPERAND = re.compile(r"dot_op<\{(opIdx = \d), [^}]*(kWidth = \d+)\}")
MATRIX_INSTRUCTION = re.compile(r"(?:wgmma\.mma_async|mma)\.sync\.aligned\.\S+")


@dataclass(frozen=True)
class Compiled:
    """What the machine code of a build uses; `stack` is in bytes, of registers that were spilled.

    instructions: those of matrices, and how many neighbours along K a thread hands them in an operand.
    reductions: for sums and maxima of floats, how what is reduced lies in threads, which is their order.
    """

    build: Build
    instructions: frozenset[str]
    reductions: frozenset[str]
    shared: int
    stack: int


@pytest.fixture(autouse=True)
def parse_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python 3.11's `ast.parse` counts its depth for all threads together: two at once are a SystemError."""
    parse, parsing = JITFunction.parse, Lock()

    def locked(function: Any) -> Any:
        with parsing:
            return parse(function)

    monkeypatch.setattr(JITFunction, "parse", locked)


def compiled(build: Build, capability: int, folder: Path) -> Compiled:
    done: Any = triton.compile(
        triton_source.of_build(build),
        target=GPUTarget("cuda", capability, 32),
        options=triton_source.options(build.kernel),
    )
    cubin = folder / f"{done.hash}.cubin"
    cubin.write_bytes(done.asm["cubin"])
    usage = subprocess.run(
        [CUOBJDUMP, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True
    ).stdout
    stack = sum(int(size) for size in re.findall(r"(?:STACK|LOCAL):(\d+)", usage))
    operands = [" ".join(found) for found in OPERAND.findall(done.asm["ttgir"])]
    instructions = frozenset(MATRIX_INSTRUCTION.findall(done.asm["ptx"]) + operands)
    layouts = dict(re.findall(r"^(#\w+) = (.*)$", done.asm["ttgir"], re.MULTILINE))
    reduced = re.findall(r"\}\) : \(tensor<(\S+xf32), (#\w+)>\)", done.asm["ttgir"])
    reductions = frozenset(f"{shape} {layouts[layout]}" for shape, layout in reduced)
    return Compiled(build, instructions, reductions, done.metadata.shared, stack)


def distinct(builds: Iterable[Build]) -> list[Build]:
    return list({repr(build): build for build in builds}.values())


@pytest.mark.no_cover
@pytest.mark.parametrize("capability", SHARED_MEMORY)
@pytest.mark.parametrize("module", sorted(set(cuda.KERNELS.values())))
def test_builds_fit_the_machine_and_rows_meet_one_arithmetic(
    module: str, capability: int, tmp_path: Path
) -> None:
    builds = distinct(import_module(f"folo.ops.cuda.{module}").builds())
    builds = [build for build in builds if build.capability in (None, 90 if capability == 90 else 80)]
    if capability == 89:
        small = [(build, build.kernel.stages((8, 9))) for build in builds if build.kernel.few_stages]
        builds = [replace(build, kernel=replace(build.kernel, num_stages=stages)) for build, stages in small]

    def compile_one(build: Build) -> Compiled:
        return compiled(build, capability, tmp_path)

    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(compile_one, builds))
    arithmetic = defaultdict(set)
    for one in done:
        what = one.build.kernel.function.__name__, one.build.kernel, one.build.signature
        assert one.shared <= SHARED_MEMORY[capability], what
        assert capability != 80 or one.build.kernel.few_stages or one.shared <= SHARED_MEMORY[89], what
        assert one.stack == 0, what
        if one.build.serves:
            arithmetic[one.build.serves].add((one.instructions, one.reductions))
    assert {name: found for name, found in arithmetic.items() if len(found) > 1} == {}
