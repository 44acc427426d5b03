"""What is compiled, and what is launched: a Triton function in one of the configurations that folo uses.

Triton compiles a function anew for what its arguments happen to be: pointers at a multiple of 16 bytes,
integers that are 1 or a multiple of 16. Another compilation lays a row out over threads in another way,
so a row's sum could change with the number of rows, or with the row that a tensor begins at. Hence one
compilation for each configuration and dtype: pointers are always aligned (`aligned`), and a kernel names
all its integers in `do_not_specialize`, with the pointers that may lie anywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

DTYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
"""The dtypes that the kernels are written for, and what Triton calls a pointer to them."""

_SMALL = ((8, 6), (8, 9), (12, 0), (12, 1))
"""Compute capabilities that give a program 99 KB of shared memory; others, from 8.0 on, give 163 or more."""


@dataclass(frozen=True)
class Kernel:
    """A `triton.jit` function, its constants, and how it is compiled.

    Products and sums are never fused: kernels that state the same arithmetic then give the same bits. How
    many stages of a loop are under way at once changes none either: `few_stages` are what fits into the
    shared memory of smaller GPUs, where `num_stages` do not.
    """

    function: Any
    constants: Mapping[str, Any]
    num_warps: int
    num_stages: int = 1
    few_stages: int | None = None

    def stages(self, capability: tuple[int, int]) -> int:
        """Those for a GPU of this compute capability."""
        return self.few_stages if self.few_stages and capability in _SMALL else self.num_stages

    def launch(self, grid: tuple[int, ...], *args: Any) -> None:
        """Run it on the device of the first argument, a tensor; an empty grid runs nothing."""
        if 0 in grid:
            return
        device, stages = args[0].device, self.num_stages
        if self.few_stages and device.type == "cuda":
            stages = self.stages(torch.cuda.get_device_capability(device))
        with torch.cuda.device_of(args[0]):
            self.function[grid](
                *args,
                **self.constants,
                num_warps=self.num_warps,
                num_stages=stages,
                enable_fp_fusion=False,
            )


@dataclass(frozen=True)
class Build:
    """A kernel and the types of its arguments, as Triton spells them: `{"x": "*bf16", "m": "i32"}`.

    An argument that is absent (None) has the type "constexpr". Builds of the same `serves` may each compute
    the same rows, so they have to give the same bits, by the same instructions. capability: the only one that
    it is chosen for, times ten.
    """

    kernel: Kernel
    signature: Mapping[str, str]
    serves: str = ""
    capability: int | None = None


def aligned(x: Tensor) -> Tensor:
    """x as the kernels are compiled for: contiguous, at a multiple of 16 bytes; a copy if it is not."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()
