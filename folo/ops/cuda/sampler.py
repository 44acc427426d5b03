"""Drawing and scoring tokens, one program a row: what `folo.ops.sampler` describes, on a GPU.

Several programs to a row would read it faster, but would have to be launched three times: each pass needs
what the one before found in the whole row.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from folo.ops import sampler
from folo.ops.cuda.kernel import Build, Kernel, aligned
from folo.ops.cuda.logits import (
    BLOCK,
    INF,
    NEGATIVE_INF,
    NUM_WARPS,
    STAGES,
    fixed_point,
    lane_tops,
    ordered,
    value_of,
)

_BLOCKS = 1024  # of a row, at most: 2^22 tokens
_ROWS = 128  # whose random numbers one program computes


@triton.jit(do_not_specialize=["seed", "position", "sample_index", "purpose", "rows"])
def _philox(seed, position, sample_index, out, purpose, rows, ROWS: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    counter = tl.load(position + row, mask=inside, other=0).to(tl.uint32)
    sample = tl.load(sample_index + row, mask=inside, other=0).to(tl.uint32)
    word = tl.zeros((ROWS,), tl.uint32)
    key = tl.load(seed + row, mask=inside, other=0)
    word, _, _, _ = tl.philox(key, counter, sample, word + purpose.to(tl.uint32), word)
    tl.store(out + row, (word >> 8).to(tl.float32) * 5.9604644775390625e-08, mask=inside)


@triton.jit
def _weights(row, first, vocabulary, top, BLOCK: tl.constexpr):
    at = first + tl.arange(0, BLOCK)
    return fixed_point(tl.load(row + at, mask=at < vocabulary, other=float("-inf")), top)


@triton.jit(do_not_specialize=["greedy", "u", "vocabulary"])
def _draw(
    logits, greedy, u, out, vocabulary,
    BLOCK: tl.constexpr, ALIGNED: tl.constexpr, BLOCKS: tl.constexpr, NO_TOKEN: tl.constexpr,
):  # fmt: skip
    if ALIGNED:
        vocabulary = vocabulary // 16 * 16  # tells the compiler that rows begin at a multiple of 16
    number = tl.program_id(0).to(tl.int64)
    row = logits + number * vocabulary
    highest = tl.max(lane_tops(row, vocabulary, BLOCK))
    if (highest <= NEGATIVE_INF) | (highest >= INF):
        tl.store(out + number, NO_TOKEN)
        return
    if tl.load(greedy + number):
        lanes = tl.full((BLOCK,), vocabulary, tl.int32)
        for first in tl.range(0, vocabulary, BLOCK, num_stages=STAGES):
            at = first + tl.arange(0, BLOCK)
            x = tl.load(row + at, mask=at < vocabulary, other=float("-inf"))
            lanes = tl.minimum(lanes, tl.where(ordered(x) == highest, at, vocabulary))
        tl.store(out + number, tl.min(lanes).to(tl.int64))
        return
    top = value_of(highest)
    block = tl.arange(0, BLOCKS)
    weights = tl.zeros((BLOCKS,), tl.int64)
    for first in tl.range(0, vocabulary, BLOCK, num_stages=STAGES):
        weight = tl.sum(_weights(row, first, vocabulary, top, BLOCK))
        weights = tl.where(block == first // BLOCK, weight, weights)
    total = tl.sum(weights)
    # floor(u * total), exactly: u = m / 2^24, and m * total would not fit 64 bits.
    m = (tl.load(u + number) * 16777216.0).to(tl.int64)
    target = m * (total >> 24) + ((m * (total & 0xFFFFFF)) >> 24)
    passed = tl.cumsum(weights) <= target
    before = tl.sum(tl.where(passed, weights, 0))
    start = tl.sum(passed.to(tl.int32)) * BLOCK
    passed = before + tl.cumsum(_weights(row, start, vocabulary, top, BLOCK)) <= target
    tl.store(out + number, (start + tl.sum(passed.to(tl.int32))).to(tl.int64))


@triton.jit(do_not_specialize=["vocabulary"])
def _log_softmax(logits, out, vocabulary, BLOCK: tl.constexpr, ALIGNED: tl.constexpr):
    if ALIGNED:
        vocabulary = vocabulary // 16 * 16
    start = tl.program_id(0).to(tl.int64) * vocabulary
    top = value_of(tl.max(lane_tops(logits + start, vocabulary, BLOCK)))
    sums = tl.zeros((BLOCK,), tl.float32)
    for first in tl.range(0, vocabulary, BLOCK, num_stages=STAGES):
        at = first + tl.arange(0, BLOCK)
        sums += tl.exp(tl.load(logits + start + at, mask=at < vocabulary, other=float("-inf")) - top)
    rest = tl.log(tl.sum(sums))
    for first in tl.range(0, vocabulary, BLOCK, num_stages=STAGES):
        at = first + tl.arange(0, BLOCK)
        x = tl.load(logits + start + at, mask=at < vocabulary, other=0.0)
        tl.store(out + start + at, x - top - rest, mask=at < vocabulary)


def _kernel(function: object, vocabulary: int, **constants: int) -> Kernel:
    return Kernel(
        function, {"BLOCK": BLOCK, "ALIGNED": vocabulary % 16 == 0, **constants}, NUM_WARPS, num_stages=3
    )


_PHILOX = Kernel(_philox, {"ROWS": _ROWS}, num_warps=4)


def builds() -> Iterator[Build]:
    columns = dict.fromkeys(("seed", "position", "sample_index"), "*i64")
    yield Build(_PHILOX, columns | {"out": "*fp32", "purpose": "i32", "rows": "i32"})
    row = {"logits": "*fp32", "vocabulary": "i32"}
    for vocabulary in (1000, 1024):
        yield Build(
            _kernel(_draw, vocabulary, BLOCKS=_BLOCKS, NO_TOKEN=sampler.NO_TOKEN),
            row | {"greedy": "*u1", "u": "*fp32", "out": "*i64"},
        )
        yield Build(_kernel(_log_softmax, vocabulary), row | {"out": "*fp32"})


def philox(seed: Tensor, position: Tensor, sample_index: Tensor, purpose: int) -> Tensor:
    """`sampler.philox`."""
    rows = seed.shape[0]
    out = torch.empty(rows, dtype=torch.float32, device=seed.device)
    columns = seed.contiguous(), position.contiguous(), sample_index.contiguous()
    _PHILOX.launch((-(-rows // _ROWS),), *columns, out, purpose, rows)
    return out


def draw(logits: Tensor, greedy: Tensor, u: Tensor) -> Tensor:
    """`sampler.draw`."""
    logits, (rows, vocabulary) = aligned(logits), logits.shape
    out = torch.empty(rows, dtype=torch.int64, device=logits.device)
    kernel = _kernel(_draw, vocabulary, BLOCKS=_BLOCKS, NO_TOKEN=sampler.NO_TOKEN)
    kernel.launch((rows,), logits, greedy.contiguous(), u.contiguous(), out, vocabulary)
    return out


def log_softmax(logits: Tensor) -> Tensor:
    """`sampler.log_softmax`."""
    logits, (rows, vocabulary) = aligned(logits), logits.shape
    out = torch.empty_like(logits)
    _kernel(_log_softmax, vocabulary).launch((rows,), logits, out, vocabulary)
    return out


def pick_logprobs(logits: Tensor, ids: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`sampler.pick_logprobs`: its counts and top-k of integers, which are exact, after `log_softmax`."""
    return sampler.pick(log_softmax(logits), ids, k)
