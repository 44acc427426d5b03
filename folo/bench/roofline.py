"""What the machine allows: the rates at which it reads memory and multiplies, by torch.

They are measured beside everything that is held against them: what a shared machine's memory gives may
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
    """Bytes a second that can be read, and bfloat16 operations a second."""

    read: float
    multiply: float

    def __str__(self) -> str:
        return f"{self.read / 1e9:.1f} GB/s read, {self.multiply / 1e9:,.0f} GFLOP/s in bfloat16"

    def seconds(self, num_bytes: float, operations: float) -> float:
        return max(num_bytes / self.read, operations / self.multiply)


class Machine:
    """Reads what no cache holds, and multiplies two large matrices."""

    def __init__(self) -> None:
        self._read = torch.ones(BYTES // 8, dtype=torch.int64).max
        square = torch.ones(_SIDE, _SIDE, dtype=torch.bfloat16)
        self._multiply = partial(torch.mm, square, square)
        self.now()  # once, to wake threads

    def now(self) -> Roofline:
        return Roofline(BYTES / timed(self._read), 2 * _SIDE**3 / timed(self._multiply))


def timed(call: Callable[[], object]) -> float:
    """Seconds that it takes."""
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def middle(roofs: Sequence[Roofline]) -> Roofline:
    """The medians of their rates."""
    return Roofline(median(roof.read for roof in roofs), median(roof.multiply for roof in roofs))
