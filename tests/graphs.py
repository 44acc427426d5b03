"""A stand-in for CUDA graphs on a CPU: it replays recorded calls, and spoils what must not be relied on."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from folo.graph import Replay


def spoil(tensor: Tensor) -> None:
    """Fill it with values that nobody could take for a token or a number."""
    if tensor.is_floating_point() or tensor.dtype == torch.bool:
        tensor.fill_(torch.nan)
    else:
        limits = torch.iinfo(tensor.dtype)
        tensor.fill_(limits.min // 2 or limits.max)


class Recorded:
    """As CUDA graphs, it writes one output tensor per graph, again at each replay.

    Between replays the outputs of *all* graphs are spoilt, since they share one pool of memory: an
    output that was handed out without a copy would be caught.
    """

    def __init__(self) -> None:
        self.captures, self.replays = 0, 0
        self._outputs: list[Tensor] = []

    def capture(self, function: Callable[[], Tensor]) -> tuple[Replay, Tensor]:
        output = function().clone()
        self.captures += 1
        self._outputs.append(output)

        def replay() -> None:
            self.replays += 1
            for other in self._outputs:
                spoil(other)
            output.copy_(function())

        return replay, output
