"""The Triton kernels: `folo.ops` on an NVIDIA GPU of compute capability 8.0 and up.

Each op's kernels are in a module of their own, imported at the op's first call: Triton takes long to
import, and is not there on every machine. What has no kernel runs as the reference, which keeps the
contract on every device: float64; ops without sums that torch does in as few passes (`rope_angles`, and
`copy_blocks`, which indexes by tensors on the device); and `penalize`, whose sums are of integers.
"""

from __future__ import annotations

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
    "quantized_linear": "quantized",
    "paged_attention": "attention",
    "rms_norm": "norm",
    "add_rms_norm": "norm",
    "silu_mul": "norm",
    "qk_norm_rope_write": "rope",
    "philox": "sampler",
    "warp": "warp",
    "draw": "sampler",
    "log_softmax": "sampler",
    "pick_logprobs": "sampler",
}
"""The module that holds an op's kernel, as a function of the op's own name and arguments."""

ATTENTION_HEAD_DIMS = range(16, 257, 16)
"""Those that `paged_attention` has kernels for; others run as the reference."""

_TRITON = find_spec("triton") is not None


def load(library: torch.library.Library) -> None:
    """Register the kernels for CUDA tensors with the library that defines the ops."""
    for name in KERNELS:
        library.impl(name, _implementation(name), "CUDA")


def _implementation(name: str) -> Callable[..., Any]:
    oracle = getattr(reference if hasattr(reference, name) else sampler, name)

    def run(*args: Any, **kwargs: Any) -> Any:
        missing = _missing(args[0].device)
        if missing is not None:
            warnings.warn(f"folo runs its slow reference ops: {missing}", RuntimeWarning, stacklevel=2)
        if missing is not None or args[0].dtype == torch.float64:
            return oracle(*args, **kwargs)
        return getattr(import_module(f"folo.ops.cuda.{KERNELS[name]}"), name)(*args, **kwargs)

    return run


def available(device: torch.device) -> bool:
    """Whether the kernels can run there."""
    return _missing(device) is None


def _missing(device: torch.device) -> str | None:
    if not _TRITON:
        return "there is no triton (pip install triton)"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} has a compute capability below 8.0"
    return None


def build_key() -> str:
    """A hash of the kernels' sources and Triton's version. Only where they are `available`."""
    digest = sha256(version("triton").encode())
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.name.encode() + source.read_bytes())
    return digest.hexdigest()[:16]
