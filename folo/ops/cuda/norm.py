"""RMSNorm, with one order of summation for a row, and the product of SiLU(gate) and up."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from folo.ops.cuda.kernel import DTYPES, Build, Kernel, aligned

_GATE_BLOCK = 1024


@triton.jit(do_not_specialize=["width"])
def _rms_norm(x, residual, weight, out, total, width, eps, BLOCK: tl.constexpr, ALIGNED: tl.constexpr):
    """One program a row, which it walks in blocks from the left."""
    if ALIGNED:
        width = width // 16 * 16  # tells the compiler that rows begin at a multiple of 16
    start = tl.program_id(0).to(tl.int64) * width
    columns = tl.arange(0, BLOCK)
    squares = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, width, BLOCK):
        at = first + columns
        row = tl.load(x + start + at, mask=at < width, other=0.0).to(tl.float32)
        if residual is not None:
            row += tl.load(residual + start + at, mask=at < width, other=0.0).to(tl.float32)
            rounded = row.to(total.dtype.element_ty)
            tl.store(total + start + at, rounded, mask=at < width)
            row = rounded.to(tl.float32)
        squares += row * row
    scale = tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(tl.sum(squares), width.to(tl.float32)) + eps))
    for first in range(0, width, BLOCK):
        at = first + columns
        row = tl.load(x + start + at, mask=at < width, other=0.0).to(tl.float32)
        if residual is not None:
            row += tl.load(residual + start + at, mask=at < width, other=0.0).to(tl.float32)
            row = row.to(total.dtype.element_ty).to(tl.float32)
        gain = tl.load(weight + at, mask=at < width, other=0.0).to(tl.float32)
        tl.store(out + start + at, (row * scale * gain).to(out.dtype.element_ty), mask=at < width)


@triton.jit(do_not_specialize=["inner"])
def _silu_mul(gate_up, out, inner, BLOCK: tl.constexpr, ALIGNED: tl.constexpr):
    """One program for BLOCK columns of a row."""
    if ALIGNED:
        inner = inner // 16 * 16
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_up + row * 2 * inner + at, mask=at < inner, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * inner + inner + at, mask=at < inner, other=0.0).to(tl.float32)
    product = tl.div_rn(gate, 1.0 + tl.exp(-gate)) * up
    tl.store(out + row * inner + at, product.to(out.dtype.element_ty), mask=at < inner)


def _norm_kernel(width: int) -> Kernel:
    """A row of up to 4096 elements (1024, if their number is no multiple of 16) is one block."""
    narrow = width <= 1024 or width % 16 != 0
    constants = {"BLOCK": 1024 if narrow else 4096, "ALIGNED": width % 16 == 0}
    return Kernel(_rms_norm, constants, num_warps=4 if narrow else 8)


def _gate_kernel(inner: int) -> Kernel:
    return Kernel(_silu_mul, {"BLOCK": _GATE_BLOCK, "ALIGNED": inner % 16 == 0}, num_warps=4)


def builds() -> Iterator[Build]:
    """Every kernel of the norms and of `silu_mul`, for each kind of width."""
    for pointer in DTYPES.values():
        arguments = dict.fromkeys(("x", "residual", "weight", "out", "total"), pointer)
        arguments |= {"width": "i32", "eps": "fp32"}
        for width in (1000, 1024, 4096):
            yield Build(_norm_kernel(width), arguments)
            yield Build(_norm_kernel(width), arguments | dict.fromkeys(("residual", "total"), "constexpr"))
        for inner in (1000, 1024):
            yield Build(_gate_kernel(inner), {"gate_up": pointer, "out": pointer, "inner": "i32"})


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`reference.rms_norm`."""
    x, width = aligned(x), x.shape[-1]
    out = torch.empty_like(x)
    _norm_kernel(width).launch((x.numel() // width,), x, None, aligned(weight), out, None, width, eps)
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`reference.add_rms_norm`."""
    x, residual = aligned(x), aligned(residual)
    out, total = torch.empty_like(x), torch.empty_like(x)
    rows, width = x.shape
    _norm_kernel(width).launch((rows,), x, residual, aligned(weight), out, total, width, eps)
    return out, total


def silu_mul(gate_up: Tensor) -> Tensor:
    """`reference.silu_mul`."""
    gate_up, rows, inner = aligned(gate_up), gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty((rows, inner))
    _gate_kernel(inner).launch((rows, -(-inner // _GATE_BLOCK)), gate_up, out, inner)
    return out
