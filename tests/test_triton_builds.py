"""Every Triton kernel in every configuration, compiled to machine code as on a GPU, without one.

What can be read off the machine code is held here: that it exists, fits into shared memory, keeps its
tiles in registers, and that kernels which may serve the same rows multiply with the same instructions.
"""

from __future__ import annotations

import re
import subprocess
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from folo.ops import cuda, reference
from folo.ops.cuda.kernel import Build

SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}
"""Bytes that a program may have, for the compute capabilities that folo compiles for (times ten)."""

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
MATRIX_INSTRUCTION = re.compile(r"(?:wgmma\.mma_async|mma)\.sync\.aligned\.\S+")


@dataclass(frozen=True)
class Compiled:
    """What the machine code of a build uses; `stack` is in bytes, of registers that were spilled."""

    build: Build
    instructions: frozenset[str]
    shared: int
    stack: int


def compiled(build: Build, capability: int, folder: Path) -> Compiled:
    kernel = build.kernel
    absent = {name: None for name, kind in build.signature.items() if kind == "constexpr"}
    signature = {name: build.signature.get(name, "constexpr") for name in kernel.function.arg_names}
    constants = {**kernel.constants, **absent}
    assert set(signature) == set(build.signature) | set(constants)
    attributes: dict[Any, Any] = {
        (number,): [["tt.divisibility", 16]]
        for number, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") and name not in kernel.function.do_not_specialize
    }
    done: Any = triton.compile(
        ASTSource(kernel.function, signature, constants, attributes),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": kernel.num_warps, "num_stages": kernel.num_stages, "enable_fp_fusion": False},
    )
    cubin = folder / f"{done.hash}.cubin"
    cubin.write_bytes(done.asm["cubin"])
    usage = subprocess.run(
        [CUOBJDUMP, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True
    ).stdout
    stack = sum(int(size) for size in re.findall(r"(?:STACK|LOCAL):(\d+)", usage))
    instructions = frozenset(MATRIX_INSTRUCTION.findall(done.asm["ptx"]))
    return Compiled(build, instructions, done.metadata.shared, stack)


def distinct(builds: Iterable[Build]) -> list[Build]:
    return list({repr(build): build for build in builds}.values())


@pytest.mark.parametrize("capability", SHARED_MEMORY)
@pytest.mark.parametrize("module", sorted(set(cuda.KERNELS.values())))
def test_builds_fit_the_machine_and_rows_meet_one_instruction(
    module: str, capability: int, tmp_path: Path
) -> None:
    builds = distinct(import_module(f"folo.ops.cuda.{module}").builds())

    def compile_one(build: Build) -> Compiled:
        return compiled(build, capability, tmp_path)

    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(compile_one, builds))
    instructions = defaultdict(set)
    for one in done:
        what = one.build.kernel.function.__name__, one.build.kernel, one.build.signature
        assert one.shared <= SHARED_MEMORY[capability], what
        assert one.stack == 0, what
        if one.build.serves:
            instructions[one.build.serves].add(one.instructions)
    assert {name: found for name, found in instructions.items() if len(found) > 1} == {}


@pytest.mark.parametrize("module", sorted(set(cuda.KERNELS.values())))
def test_a_kernel_is_compiled_once_for_all_its_integers(module: str) -> None:
    """Else Triton would compile it anew where one is 1 or a multiple of 16: the number of rows, say."""
    for build in import_module(f"folo.ops.cuda.{module}").builds():
        integers = {name for name, kind in build.signature.items() if kind.startswith(("i", "u"))}
        assert integers <= set(build.kernel.function.do_not_specialize), build.kernel.function.__name__


def test_without_triton_the_reference_runs_and_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "find_spec", lambda _: None)
    cuda._has_triton.cache_clear()
    run, x, weight = cuda._implementation("rms_norm"), torch.ones(2, 4), torch.ones(4)
    with pytest.warns(RuntimeWarning, match="there is no triton"):
        assert torch.equal(run(x, weight, 1e-6), reference.rms_norm(x, weight, 1e-6))
    assert torch.equal(run(x, weight, 1e-6), reference.rms_norm(x, weight, 1e-6))
    cuda._has_triton.cache_clear()


def test_float64_runs_as_the_reference() -> None:
    x, weight = torch.ones(2, 4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    assert torch.equal(cuda._implementation("rms_norm")(x, weight, 1e-6), reference.rms_norm(x, weight, 1e-6))


def test_every_kernel_is_registered_for_cuda_tensors() -> None:
    for name, module in cuda.KERNELS.items():
        assert callable(getattr(import_module(f"folo.ops.cuda.{module}"), name))
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"folo::{name}", "CUDA"), name
