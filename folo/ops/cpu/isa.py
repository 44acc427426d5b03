"""The instruction sets that the kernels are written for, and which of them this CPU has."""

from __future__ import annotations

import ctypes

_VECTORS = {
    "avx2": {"avx2", "fma", "f16c"},
    "avx512": {"avx512f", "avx512bw", "avx512vl", "avx512dq"},
    "avx512_bf16": {"avx512_bf16"},
}
"""The least first, each with what it needs beside those before it, as Linux spells it."""


def of_this_cpu() -> list[str]:
    """The fastest first."""
    flags = _flags()
    found: list[str] = []
    for isa, needs in _VECTORS.items():
        if not needs <= flags:
            return found
        found.insert(0, isa)
    return ["amx", *found] if _has_tiles(flags) else found


def _flags() -> set[str]:
    try:
        with open("/proc/cpuinfo") as lines:
            return set(next((line for line in lines if line.startswith("flags")), "").split())
    except OSError:  # not Linux
        return set()


def _has_tiles(flags: set[str]) -> bool:
    """AMX, or for tests on a CPU without it: a preloaded library that carries its instructions out."""
    process = ctypes.CDLL(None)
    if hasattr(process, "folo_has_amx_tiles"):
        return True
    # The kernel hands out the registers' state on request: Linux 5.16 and newer.
    arch_prctl, request, tile_data = map(ctypes.c_long, (158, 0x1023, 18))
    return {"amx_tile", "amx_bf16"} <= flags and process.syscall(arch_prctl, request, tile_data) == 0
