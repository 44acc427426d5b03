"""Sums whose order depends on the length of what is summed, and on nothing else."""

import torch.nn.functional as F
from torch import Tensor


def row_sum(x: Tensor) -> Tensor:
    """Sum the last dimension by pairwise halving: [..., N] -> [...], in x's own dtype.

    The row is padded with zeros to a power of two; then its upper half is added to its lower half until
    one element is left. `torch.sum` promises no order: it splits a long row over threads when there are
    few rows, so a row's sum changes with its neighbours. Here every addition is elementwise, which no
    backend can reorder, and the rounding error grows with log N. Plain differentiable torch: it works
    under vmap, grad and jvp. An empty row sums to 0.
    """
    length = x.shape[-1]
    width = 1 << (length - 1).bit_length()
    x = F.pad(x, (0, width - length))
    while width > 1:
        width //= 2
        x = x[..., :width] + x[..., width:]
    return x[..., 0]
