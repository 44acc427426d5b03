"""What decides the bits of the ops besides their inputs: kept with every run that is to be repeated."""

from __future__ import annotations

import torch

from folo.ops import cpu


def arithmetic(device: torch.device) -> dict[str, str]:
    """Backend, instruction set or GPU model, the kernels' build, and torch version. Equal ones compute equal
    bits."""
    found = {
        "backend": _backend(device),
        "instruction_set": _instruction_set(device),
        "torch": torch.__version__,
    }
    return {**found, "kernels": cpu.build_key()} if found["backend"] == "cpu" else found


def _backend(device: torch.device) -> str:
    kernels = device.type == "cpu" and cpu.instruction_set() != cpu.REFERENCE
    return "cpu" if kernels else cpu.REFERENCE


def _instruction_set(device: torch.device) -> str:
    if _backend(device) == "cpu":
        return cpu.instruction_set()
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    extensions = {
        "bf16": torch.cpu._is_avx512_bf16_supported(),
        "amx": torch.cpu._is_amx_tile_supported(),
    }
    return "+".join([torch.backends.cpu.get_cpu_capability(), *(n for n, has in extensions.items() if has)])
