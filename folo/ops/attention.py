"""Who computes attention: folo's kernels, plain torch, or another library's flash attention.

All take what `folo.ops.reference.paged_attention` takes. A state has one backend for all its life: it decides
bits.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from folo.errors import ConfigError
from folo.ops import cuda

Attention = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, float], Tensor]


@dataclass(frozen=True)
class Backend:
    """A way to compute attention, and what it needs.

    op: None for folo's own kernels, `folo.ops.paged_attention`.
    lacks: why it cannot run on a device in a dtype, or None if it can. breaks: why it is not known to keep
    folo's promise of invariance, or None. page_size: block sizes have to be a multiple of it. head_dims:
    those that it takes.
    """

    op: Attention | None
    lacks: Callable[[torch.device, torch.dtype], str | None]
    breaks: str | None = None
    page_size: int = 1
    head_dims: range = range(1, 1 << 16)


def _varlen(
    q: Tensor, k: Tensor, v: Tensor, block_tables: Tensor, query_start: Tensor, seq_lens: Tensor, scale: float
) -> Tensor:
    """torch's, without split-KV: where that splits depends on the longest sequence of a batch."""
    from torch.nn.attention.varlen import varlen_attn

    longest = block_tables.shape[1] * k.shape[1]  # a bound that needs no value from the device
    call: Any = varlen_attn  # whose parameters depend on the version
    return call(
        *(q, k, v, query_start, None, q.shape[0], longest),
        scale=scale,
        window_size=(-1, 0),
        enable_gqa=True,
        seqused_k=seq_lens,
        block_table=block_tables,
        num_splits=1,
    )


def _flash(
    q: Tensor, k: Tensor, v: Tensor, block_tables: Tensor, query_start: Tensor, seq_lens: Tensor, scale: float
) -> Tensor:
    """flash-attn's decoding kernel, given each row as a sequence of its own: slow for a prefill."""
    from flash_attn import flash_attn_with_kvcache  # pyright: ignore[reportMissingImports]

    row = torch.arange(q.shape[0], dtype=torch.int32, device=q.device)
    sequence = torch.searchsorted(query_start[1:], row, right=True).clamp(max=len(seq_lens) - 1)
    behind = query_start[sequence + 1] - row  # how many rows of the sequence come from here on
    context = (seq_lens[sequence] - behind + 1).clamp(min=0).int()
    out = flash_attn_with_kvcache(
        q[:, None],
        k,
        v,
        cache_seqlens=context,
        block_table=block_tables[sequence],
        softmax_scale=scale,
        causal=True,
        num_splits=1,
    )
    return out[:, 0]


def _on(kind: str) -> Callable[[torch.device, torch.dtype], str | None]:
    return lambda device, dtype: None if device.type == kind else f"runs on {kind} devices, this is {device}"


def _half(device: torch.device, dtype: torch.dtype) -> str | None:
    if dtype not in (torch.float16, torch.bfloat16):
        return f"computes in float16 and bfloat16, this is {str(dtype).removeprefix('torch.')}"
    return _on("cuda")(device, dtype)


def _lacks_triton(device: torch.device, dtype: torch.dtype) -> str | None:
    if dtype == torch.float64:
        return "computes in float32, float16 and bfloat16, this is float64"
    if importlib.util.find_spec("triton") is None:
        return "needs the package triton: pip install triton"
    if device.type == "cuda" and torch.cuda.is_available() and not cuda.available(device):
        return f"needs a compute capability of 8.0, which {torch.cuda.get_device_name(device)} does not have"
    return _on("cuda")(device, dtype)


def _lacks_varlen(device: torch.device, dtype: torch.dtype) -> str | None:
    from torch.nn.attention import varlen

    parameters = inspect.signature(varlen.varlen_attn).parameters
    if needed := {"block_table", "num_splits", "seqused_k"} - parameters.keys():
        return (
            f"needs a varlen_attn with {', '.join(sorted(needed))}, unlike that of torch {torch.__version__}"
        )
    return _half(device, dtype)


def _lacks_flash(device: torch.device, dtype: torch.dtype) -> str | None:
    if importlib.util.find_spec("flash_attn") is None:
        return "needs the package flash-attn: pip install flash-attn"
    return _half(device, dtype)


_UNPROVEN = "it is not shown that a row's bits do not depend on what else is computed"

_FLASH_HEAD_DIMS = range(8, 257, 8)

BACKENDS: dict[str, Backend] = {
    "cpu": Backend(None, _on("cpu")),
    "triton": Backend(None, _lacks_triton, head_dims=cuda.ATTENTION_HEAD_DIMS),
    "torch": Backend(_varlen, _lacks_varlen, _UNPROVEN, page_size=256, head_dims=_FLASH_HEAD_DIMS),
    "flash_attn": Backend(_flash, _lacks_flash, _UNPROVEN, page_size=256, head_dims=_FLASH_HEAD_DIMS),
    "reference": Backend(torch.ops.folo_reference.paged_attention.default, lambda device, dtype: None),
}
"""By the name that `attention=` takes; besides these there is "auto"."""


def attention_backend(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    block_size: int,
    head_dim: int,
    deterministic: bool = True,
) -> str:
    """The backend that `attention=name` stands for.

    "auto" is folo's own: "triton" on CUDA, "cpu" on a CPU; else "reference", which reads values from the
    device in every step, so that no graph can hold it.

    Raises:
        ConfigError: an unknown name; one that cannot be had here, for this block size or for this head_dim;
            with `deterministic`, one that is not known to keep folo's promise of invariance.
    """
    if name == "auto":
        own = {"cuda": "triton", "cpu": "cpu"}.get(device.type, "reference")
        fits = BACKENDS[own].lacks(device, dtype) is None and head_dim in BACKENDS[own].head_dims
        return own if fits else "reference"
    backend = BACKENDS.get(name)
    if backend is None:
        raise ConfigError(f"attention={name!r}: expected one of {('auto', *BACKENDS)}")
    if (lack := backend.lacks(device, dtype)) is not None:
        raise ConfigError(f'attention={name!r} {lack}; attention="auto" takes what there is')
    if block_size % backend.page_size:
        raise ConfigError(f"attention={name!r} needs a block_size of {backend.page_size}, not {block_size}")
    if head_dim not in backend.head_dims:
        step, most = backend.head_dims.step, backend.head_dims[-1]
        raise ConfigError(
            f"attention={name!r} needs a head_dim that is a multiple of {step} up to {most}, not {head_dim}; "
            f'attention="auto" takes what there is'
        )
    if deterministic and backend.breaks is not None:
        raise ConfigError(f"attention={name!r}: {backend.breaks}; deterministic=False takes it all the same")
    return name
