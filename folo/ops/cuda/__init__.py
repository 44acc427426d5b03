"""The Triton kernels: `folo.ops` on an NVIDIA GPU of compute capability 8.0 and up.

Each op's kernels are in a module of their own, imported at the op's first call: Triton takes long to
import, and is not there on every machine. What has no kernel runs as the reference, which keeps the
contract on every device: float64, and ops that torch does in as few passes with no sum in them
(`rope_angles`, and `copy_blocks`, which is indexing by indices that are on the device).
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from hashlib import sha256
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
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
        if args[0].dtype == torch.float64 or not _ready():
            return oracle(*args, **kwargs)
        return getattr(import_module(f"folo.ops.cuda.{KERNELS[name]}"), name)(*args, **kwargs)

    return run


def available() -> bool:
    """Whether there is a Triton to compile the kernels."""
    return find_spec("triton") is not None


def build_key() -> str:
    """What the kernels are made of: their sources, and Triton. Only where there is one."""
    digest = sha256(version("triton").encode())
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.name.encode() + source.read_bytes())
    return digest.hexdigest()[:16]


@functools.cache
def _ready() -> bool:
    """`available()`, with a warning, the first time, if it is not."""
    if not available():
        warnings.warn(
            "folo runs its slow reference ops: there is no triton (pip install triton)",
            RuntimeWarning,
            stacklevel=3,
        )
    return available()
