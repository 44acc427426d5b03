"""The C++ kernels: `folo.ops` on a CPU, where they can be compiled.

`FOLO_CPU_ISA` pins the instruction set: "amx", "avx512_bf16", "avx512", "avx2", or "reference" for plain
torch, which nothing is compiled for.
"""

from __future__ import annotations

import os
import warnings

import torch

from folo.errors import ConfigError
from folo.ops.cpu.build import BuildError, library

REFERENCE = "reference"


def load() -> bool:
    """Compile the kernels if need be and register them with torch; False, with a warning, if there are none.

    Raises:
        ConfigError: FOLO_CPU_ISA names an instruction set that this CPU does not have.
    """
    wanted = os.environ.get("FOLO_CPU_ISA")
    if wanted == REFERENCE:
        return False
    try:
        torch.ops.load_library(str(library()))
    except (BuildError, OSError) as error:
        _warn(str(error))
        return False
    choices = instruction_sets()
    if wanted is not None and wanted not in choices:
        raise ConfigError(f"FOLO_CPU_ISA={wanted!r}: this CPU has {', '.join(choices)}")
    if choices[0] == REFERENCE:
        _warn("this CPU has no AVX2")
    use(wanted or choices[0])
    return True


def instruction_sets() -> list[str]:
    """What the ops can run with here, the fastest first."""
    own = torch.ops.folo_cpu.instruction_sets() if _loaded() else []
    return [*own, REFERENCE]


def instruction_set() -> str:
    """What the ops run with."""
    return torch.ops.folo_cpu.in_use() if _loaded() else REFERENCE


def build_key() -> str:
    """What the kernels were made of: their sources, flags and compiler. Only where there are kernels."""
    return torch.ops.folo_cpu.build_key()


def use(name: str) -> None:
    """Let the ops run with one of `instruction_sets()`. It changes bits: states of before are of no use."""
    if name != instruction_set():
        torch.ops.folo_cpu.use(name)


def _loaded() -> bool:
    return hasattr(torch.ops.folo_cpu, "use")


def _warn(why: str) -> None:
    warnings.warn(f"folo runs its slow reference ops: {why}", RuntimeWarning, stacklevel=2)
