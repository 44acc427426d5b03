"""The Triton kernels: `folo.ops` on an NVIDIA GPU of compute capability 8.0 and up.

Each op's kernels are in a module of their own, imported at the op's first call: Triton takes long to
import, and is not there on every machine. What has no kernel (float64; an op not named here) runs as
the reference, which keeps the contract on every device.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from folo.ops import reference, sampler

KERNELS = {
    "linear": "linear",
    "rms_norm": "norm",
    "add_rms_norm": "norm",
    "silu_mul": "norm",
    "qk_norm_rope_write": "rope",
}
"""The module that holds an op's kernel, as a function of the op's own name and arguments."""


def load(library: torch.library.Library) -> None:
    """Register the kernels for CUDA tensors with the library that defines the ops."""
    for name in KERNELS:
        library.impl(name, _implementation(name), "CUDA")


def _implementation(name: str) -> Callable[..., Any]:
    oracle = getattr(reference if hasattr(reference, name) else sampler, name)

    def run(*args: Any, **kwargs: Any) -> Any:
        if args[0].dtype == torch.float64 or not _has_triton():
            return oracle(*args, **kwargs)
        return getattr(import_module(f"folo.ops.cuda.{KERNELS[name]}"), name)(*args, **kwargs)

    return run


@functools.cache
def _has_triton() -> bool:
    found = find_spec("triton") is not None
    if not found:
        warnings.warn(
            "folo runs its slow reference ops: there is no triton (pip install triton)",
            RuntimeWarning,
            stacklevel=3,
        )
    return found
