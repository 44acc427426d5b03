"""What the machine allows: the rates at which it reads memory and multiplies, by torch.

They are measured beside everything that is compared with them: a shared machine's memory bandwidth may
halve from one second to the next.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch

BYTES = 192 << 20  # more than a cache holds
_SIDE = 2048


@dataclass(frozen=True)
class Roofline:
    """Bytes a second that can be read, and operations a second of products in `dtype`."""

    read: float
    multiply: float
    dtype: str = "bfloat16"

    def __str__(self) -> str:
        return f"{self.read / 1e9:.1f} GB/s read, {self.multiply / 1e9:,.0f} GFLOP/s in {self.dtype}"

    def seconds(self, num_bytes: float, operations: float) -> float:
        return max(num_bytes / self.read, operations / self.multiply)


class Machine:
    """Measures the rates: reads more than caches hold, and multiplies two large matrices.

    These are in float32 where torch multiplies that faster than `dtype`: bfloat16 on a CPU without
    instructions for it.
    """

    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        self._read = torch.ones(BYTES // 8, dtype=torch.int64).max
        small = {kind: _product(256, kind) for kind in (dtype, torch.float32)}
        for call in small.values():
            call()  # once, to wake threads
        self.dtype = min(small, key=lambda kind: timed(small[kind]))
        self._multiply = _product(_SIDE, self.dtype)
        self.now()

    def now(self) -> Roofline:
        rate = 2 * _SIDE**3 / timed(self._multiply)
        return Roofline(BYTES / timed(self._read), rate, str(self.dtype).removeprefix("torch."))


def _product(side: int, dtype: torch.dtype) -> Callable[[], object]:
    square = torch.ones(side, side, dtype=dtype)
    return partial(torch.mm, square, square)


def timed(call: Callable[[], object]) -> float:
    """Seconds that it takes."""
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def middle(roofs: Sequence[Roofline]) -> Roofline:
    """The medians of their rates."""
    rates = median(roof.read for roof in roofs), median(roof.multiply for roof in roofs)
    return Roofline(*rates, roofs[0].dtype)
