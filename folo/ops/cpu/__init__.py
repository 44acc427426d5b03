"""The C++ kernels: `folo.ops` on a CPU, where they can be compiled.

`FOLO_CPU_ISA` pins the instruction set: "amx", "avx512_bf16", "avx512", "avx2", or "reference" for plain
torch, which nothing is compiled for.
"""

from __future__ import annotations

import ctypes
import os
import warnings
from functools import cache

import torch

from folo.errors import ConfigError
from folo.ops.cpu.build import BuildError, libraries
from folo.ops.cpu.isa import of_this_cpu

REFERENCE = "reference"


def load() -> bool:
    """Compile the kernels if need be and register them with torch; False, with a warning, if there are none.

    Raises:
        ConfigError: FOLO_CPU_ISA names an instruction set that this CPU does not have.
    """
    wanted = os.environ.get("FOLO_CPU_ISA")
    if wanted == REFERENCE:
        return False
    choices = of_this_cpu()
    if wanted is not None and wanted not in choices:
        raise ConfigError(f"FOLO_CPU_ISA={wanted!r}: this CPU has {', '.join([*choices, REFERENCE])}")
    if not choices:
        _warn("/proc/cpuinfo lists no AVX2")
        return False
    try:
        table = _kernels(wanted or choices[0])
    except (BuildError, OSError) as error:
        _warn(str(error))
        return False
    torch.ops.folo_cpu.use(table)
    return True


def instruction_sets() -> list[str]:
    """What the ops can run with here, the fastest first."""
    return [*(of_this_cpu() if _loaded() else []), REFERENCE]


def instruction_set() -> str:
    """What the ops run with."""
    return torch.ops.folo_cpu.in_use() if _loaded() else REFERENCE


def build_key() -> str:
    """A digest of the kernels' sources and flags, the compiler and torch. Only where there are kernels."""
    return torch.ops.folo_cpu.build_key()


def use(name: str) -> None:
    """Let the ops run with one of `instruction_sets()`. It changes bits: do not go on with earlier states.

    Raises:
        ConfigError: it is none of them, or its kernels cannot be compiled; the ops run on with what they had.
    """
    if name == instruction_set():
        return
    if name not in instruction_sets():
        raise ConfigError(f"no instruction set {name!r}: there are {', '.join(instruction_sets())}")
    try:
        torch.ops.folo_cpu.use(0 if name == REFERENCE else _kernels(name))
    except (BuildError, OSError, RuntimeError) as error:
        raise ConfigError(f"no kernels for {name}: {error}") from error


@cache
def _kernels(isa: str) -> int:
    """Where the table of an instruction set's kernels lies (table.cpp); compiled and loaded if need be."""
    operators, kernels = libraries(isa)
    table = ctypes.CDLL(str(kernels)).folo_kernels
    table.restype = ctypes.c_void_p
    if not _loaded():
        torch.ops.load_library(str(operators))
    return table()


def _loaded() -> bool:
    return hasattr(torch.ops.folo_cpu, "use")


def _warn(why: str) -> None:
    warnings.warn(f"folo runs its slow reference ops: {why}", RuntimeWarning, stacklevel=2)
