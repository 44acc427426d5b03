"""Temperature, min-p, top-k and top-p, one program a row: what `folo.ops.sampler.warp` describes, on a GPU.

Nothing is sorted. The least token that is kept is found by bisection: over the float32 values, in the order
of their bits, then over the ids that have that value. Each step counts or weighs tokens, in integers, which
add up to the same in any order. So that a step need not walk the whole row, the likeliest tokens, a thousand
or some more, are listed first; only where the answer is not among them (a flat distribution, many ties)
is the row itself walked, with the same result.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

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

_LISTED = 4096  # tokens that the list has room for
_LANES = 1024  # as many lanes, at least, have their largest logit in the list


@triton.jit
def _lane_bound(tops, lanes):
    """The `lanes`-th largest top: at least so many tokens reach it, and few more if these are scattered."""
    low, high = tl.full((), NEGATIVE_INF, tl.int64), tl.max(tops).to(tl.int64)
    while low < high:
        middle = low + (high - low + 1) // 2
        enough = tl.sum((tops >= middle).to(tl.int32)) >= lanes
        low, high = tl.where(enough, middle, low), tl.where(enough, high, middle - 1)
    return low.to(tl.int32)


@triton.jit
def _kth(tokens, count, k, low, high, BLOCK: tl.constexpr):
    """The k-th largest of tokens[:count], `ordered`, known to be in [low, high]."""
    while low < high:
        middle = low + (high - low + 1) // 2
        lanes = tl.zeros((BLOCK,), tl.int32)
        for first in range(0, count, BLOCK):
            at = first + tl.arange(0, BLOCK)
            lanes += ordered(tl.load(tokens + at, mask=at < count, other=float("-inf"))) >= middle
        enough = tl.sum(lanes) >= k
        low, high = tl.where(enough, middle, low), tl.where(enough, high, middle - 1)
    return low


@triton.jit
def _weight_before(tokens, ids, listed, count, floor, value, last, top, BLOCK: tl.constexpr):
    """The weight of tokens of at least `floor` that are larger than `value`, or as large with an id below
    `last`. Of tokens[:count], whose ids are their places, or ids[:count] if `listed`."""
    lanes = tl.zeros((BLOCK,), tl.int64)
    for first in range(0, count, BLOCK):
        at = first + tl.arange(0, BLOCK)
        x = tl.load(tokens + at, mask=at < count, other=float("-inf"))
        id = tl.where(listed, tl.load(ids + at, mask=listed & (at < count), other=0), at)
        order = ordered(x)
        before = (order >= floor) & ((order > value) | ((order == value) & (id < last)))
        lanes += tl.where(before, fixed_point(x, top), 0)
    return tl.sum(lanes)


@triton.jit
def _is_kept(before, wanted):
    return (before.to(tl.float64) < wanted) | (before == 0)


@triton.jit(do_not_specialize=["temperature", "min_p", "top_k", "top_p", "vocabulary"])
def _warp(
    logits, temperature, min_p, top_k, top_p, out, list_tokens, list_ids, vocabulary,
    BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
    TRUNCATE: tl.constexpr, LISTED: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """list_tokens float32 [R, LISTED], list_ids int32 [R, LISTED]: the tokens that reach the LANES-th largest
    of the lanes' tops; none of them if there is no room for all."""
    if ALIGNED:
        vocabulary = vocabulary // 16 * 16  # tells the compiler that rows begin at a multiple of 16
    number = tl.program_id(0).to(tl.int64)
    logits += number * vocabulary
    out += number * vocabulary
    divisor = tl.load(temperature + number)
    divisor = tl.where(divisor == 0, 1.0, divisor)
    tops = lane_tops(logits, vocabulary, BLOCK)
    top = tl.div_rn(value_of(tl.max(tops)), divisor)
    highest = ordered(top)
    sound = (highest > NEGATIVE_INF) & (highest < INF)  # `draw` refuses other rows
    least = tl.where(sound, tl.load(min_p + number), 0.0)
    for first in tl.range(0, vocabulary, BLOCK, num_stages=STAGES):
        at = first + tl.arange(0, BLOCK)
        x = tl.div_rn(tl.load(logits + at, mask=at < vocabulary, other=0.0), divisor)
        tl.store(out + at, tl.where(tl.exp(x - top) < least, float("-inf"), x), mask=at < vocabulary)
    if not TRUNCATE:
        return
    k, p = tl.load(top_k + number), tl.load(top_p + number)
    if (not sound) | ((k <= 0) | (k >= vocabulary)) & (p >= 1):
        return
    tl.debug_barrier()

    bound = ordered(tl.div_rn(value_of(_lane_bound(tops, LANES)), divisor))
    alive = tl.zeros((BLOCK,), tl.int32)
    places = tl.zeros((BLOCK,), tl.int32)
    for first in tl.range(0, vocabulary, BLOCK, num_stages=STAGES):
        at = first + tl.arange(0, BLOCK)
        order = ordered(tl.load(out + at, mask=at < vocabulary, other=float("-inf")))
        alive += order > NEGATIVE_INF
        places += (order > NEGATIVE_INF) & (order >= bound)
    num_alive, num_listed = tl.sum(alive), tl.sum(places)
    num_listed = tl.where(num_listed <= LISTED, num_listed, 0)
    list_tokens += number * LISTED
    list_ids += number * LISTED
    if num_listed > 0:
        places = tl.cumsum(places) - places
        for first in tl.range(0, vocabulary, BLOCK, num_stages=STAGES):
            at = first + tl.arange(0, BLOCK)
            x = tl.load(out + at, mask=at < vocabulary, other=float("-inf"))
            listed = (x > float("-inf")) & (ordered(x) >= bound)
            tl.store(list_tokens + places, x, mask=listed)
            tl.store(list_ids + places, at, mask=listed)
            places += listed
    tl.debug_barrier()

    # The tokens that top-k keeps, of the list if they are all in it.
    floor = tl.full((), NEGATIVE_INF + 1, tl.int64)
    high = highest.to(tl.int64)
    listed = (k > 0) & (k <= num_listed)
    tokens, count = tl.where(listed, list_tokens, out), tl.where(listed, num_listed, vocabulary)
    if (k > 0) & (k < num_alive):
        floor = _kth(tokens, count, k, tl.where(listed, bound, floor), high, BLOCK)
    value, last = floor, vocabulary - 1
    if p < 1:
        total = _weight_before(tokens, list_ids, listed, count, floor, floor - 1, 0, top, BLOCK)
        wanted = p.to(tl.float64) * total.to(tl.float64)
        # The shortest prefix, again of the list if it is in there.
        value = tl.maximum(floor, bound)
        reached = _weight_before(list_tokens, list_ids, True, num_listed, floor, value - 1, 0, top, BLOCK)
        listed = (num_listed > 0) & (reached.to(tl.float64) >= wanted)
        tokens, count = tl.where(listed, list_tokens, out), tl.where(listed, num_listed, vocabulary)
        value = tl.where(listed, value, floor)
        while value < high:
            middle = value + (high - value) // 2
            before = _weight_before(tokens, list_ids, listed, count, floor, middle, 0, top, BLOCK)
            kept = _is_kept(before, wanted)
            value, high = tl.where(kept, value, middle + 1), tl.where(kept, middle, high)
        first_id = 0
        while first_id < last:
            middle = first_id + (last - first_id + 1) // 2
            before = _weight_before(tokens, list_ids, listed, count, floor, value, middle, top, BLOCK)
            kept = _is_kept(before, wanted)
            first_id, last = tl.where(kept, middle, first_id), tl.where(kept, last, middle - 1)
    for first in tl.range(0, vocabulary, BLOCK, num_stages=STAGES):
        at = first + tl.arange(0, BLOCK)
        order = ordered(tl.load(out + at, mask=at < vocabulary, other=0.0))
        dropped = (order < value) | ((order == value) & (at > last))
        tl.store(out + at, float("-inf"), mask=dropped & (at < vocabulary))


def _kernel(vocabulary: int, truncate: bool) -> Kernel:
    constants = {"BLOCK": BLOCK, "ALIGNED": vocabulary % 16 == 0, "TRUNCATE": truncate}
    return Kernel(_warp, {**constants, "LISTED": _LISTED, "LANES": _LANES}, NUM_WARPS)


def builds() -> Iterator[Build]:
    columns = {"temperature": "*fp32", "min_p": "*fp32", "top_k": "*i64", "top_p": "*fp32"}
    listed = {"list_tokens": "*fp32", "list_ids": "*i32"}
    for vocabulary in (1000, 1024):
        for truncate in (False, True):
            yield Build(
                _kernel(vocabulary, truncate),
                {"logits": "*fp32", **columns, "out": "*fp32", **listed, "vocabulary": "i32"},
            )


def warp(
    logits: Tensor, temperature: Tensor, min_p: Tensor, top_k: Tensor, top_p: Tensor, truncate: bool = True
) -> Tensor:
    """`sampler.warp`."""
    logits, (rows, vocabulary) = aligned(logits), logits.shape
    out = torch.empty_like(logits)
    room = rows if truncate else 0, _LISTED
    list_tokens = torch.empty(room, dtype=torch.float32, device=logits.device)
    list_ids = torch.empty(room, dtype=torch.int32, device=logits.device)
    columns = (column.contiguous() for column in (temperature, min_p, top_k, top_p))
    _kernel(vocabulary, truncate).launch((rows,), logits, *columns, out, list_tokens, list_ids, vocabulary)
    return out
