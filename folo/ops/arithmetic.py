"""What decides the bits of the ops besides their inputs: kept with every run that is to be repeated."""

from __future__ import annotations

import torch

from folo.ops import cpu, cuda


def arithmetic(device: torch.device) -> dict[str, str]:
    """Backend, instruction set or GPU model, the kernels' build, and torch version. Equal ones compute equal
    bits."""
    found = {
        "backend": _backend(device),
        "instruction_set": _instruction_set(device),
        "torch": torch.__version__,
    }
    keys = {"cpu": cpu.build_key, "triton": cuda.build_key}
    key = keys.get(found["backend"])
    return found if key is None else {**found, "kernels": key()}


def _backend(device: torch.device) -> str:
    if device.type == "cuda" and cuda.available(device):
        return "triton"
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
