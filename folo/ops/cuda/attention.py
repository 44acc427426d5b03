"""Causal attention over paged K and V: one kernel for prefill and decode.

The order of every row, whatever else is in the batch: keys in tiles of fixed size from position 0 upward; the
tiles of SPLIT keys under an online softmax that begins afresh (Milakov & Gimelshein 2018; Dao et al. 2022);
the splits merged in order by `_merge`. A split is thus work of its own. Where the batch alone fills the GPU,
one program walks all splits of its query rows and merges in registers; where it does not, as in decoding a
few sequences (Dao et al. 2023, Flash-Decoding), programs share the splits out, and a second kernel merges.

The query rows of a KV head's group share its keys: a tile's rows are (token, head of the group). Tiles have
one height for all, since a lower one would be another matrix instruction: a decoding sequence leaves most
of its tile empty, which costs less than reading its keys takes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from folo.ops import reference
from folo.ops.cuda import ATTENTION_HEAD_DIMS
from folo.ops.cuda.kernel import DTYPES, Build, Kernel, aligned

SPLIT = 256  # keys whose softmax stands alone
_KEYS = 32  # of a tile; more would spill registers
_PROGRAMS = 512  # enough for any GPU: four on each of 128 multiprocessors
_WORKSPACE = 1 << 26  # bytes of unmerged sums at most
_SEARCH = 1024  # sequences that are looked at together
_LOG2_E = 1 / math.log(2)
_INTEGERS = [
    "group", "head_dim", "block_size", "num_tokens", "num_sequences", "table_stride",
    "block_stride", "token_stride", "head_stride",
]  # fmt: skip
_MERGE_INTEGERS = ["head_dim", "num_tokens", "num_sequences"]


@triton.jit
def _sequence_of(unit, query_start, num_sequences, group, HEIGHT: tl.constexpr, SEARCH: tl.constexpr):
    """The sequence of a query tile, or of a token if HEIGHT is 0; num_sequences if it comes after the last.

    Sequence s has the tiles from query_start[s] * group // HEIGHT + s up to the next one's: as many as its
    rows need or one more, and known without looking at other sequences.
    """
    before = 0
    for first in range(0, num_sequences + 1, SEARCH):
        s = first + tl.arange(0, SEARCH)
        start = tl.load(query_start + s, mask=s <= num_sequences, other=0)
        if HEIGHT:
            start = start * group // HEIGHT + s
        before += tl.sum(((s <= num_sequences) & (start <= unit)).to(tl.int32))
    return before - 1


@triton.jit
def _merge(top, total, sums, next_top, next_total, next_sums):
    """Merge the next split into what a row has seen. A split of which it sees nothing changes no bit."""
    new_top = tl.maximum(top, next_top)
    base = tl.where(new_top == float("-inf"), 0.0, new_top)
    kept, taken = tl.exp2(top - base), tl.exp2(next_top - base)
    return (
        new_top,
        total * kept + next_total * taken,
        sums * tl.expand_dims(kept, -1) + next_sums * tl.expand_dims(taken, -1),
    )


@triton.jit
def _normalised(total, sums):
    """The weighted mean; zeros for a row that saw no key. + 0.0: whether a zero is negative must not tell how
    many tiles without weight there were."""
    total = tl.expand_dims(total, -1)
    return tl.where(total == 0, 0.0, sums / tl.where(total == 0, 1.0, total)) + 0.0


@triton.jit(do_not_specialize=_INTEGERS)
def _attention(
    q, k_cache, v_cache, block_tables, query_start, seq_lens, out, part_sums, part_tops, part_totals, scale,
    group, head_dim, block_size, num_tokens, num_sequences,
    table_stride, block_stride, token_stride, head_stride,
    HEIGHT: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr, SPLIT: tl.constexpr, MERGED: tl.constexpr,
    SEARCH: tl.constexpr,
):  # fmt: skip
    """Program (query tile, KV head, n): the splits n, n + N, n + 2 N, ... of N programs; all if MERGED.

    part_sums float32 [splits, T, Hq, head_dim], part_tops and part_totals float32 [splits, T, Hq]: a split's
    sums of weighted values, largest score and sum of weights.
    """
    # Tells the compiler that rows begin at a multiple of 16.
    head_dim = head_dim // 16 * 16
    block_stride, token_stride = block_stride // 16 * 16, token_stride // 16 * 16
    head_stride = head_stride // 16 * 16
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # a long prompt's last rows, which see most keys, first
    head = tl.program_id(1)
    sequence = _sequence_of(tile, query_start, num_sequences, group, HEIGHT, SEARCH)
    real = sequence < num_sequences
    start = tl.load(query_start + sequence)
    end = tl.load(query_start + sequence + 1, mask=real, other=num_tokens)
    length = tl.load(seq_lens + sequence, mask=real, other=0)
    first = (tile - start * group // HEIGHT - sequence) * HEIGHT
    num_rows = (end - start) * group
    if first >= num_rows:
        return

    row = first + tl.arange(0, HEIGHT)
    inside = row < num_rows
    position = tl.where(inside, length - (end - start) + row // group, -1)
    num_keys = tl.max(position) + 1
    num_heads = tl.num_programs(1) * group
    # From the tile's first token on: all rows together may have more elements than 32 bits count.
    row = (row // group - first // group) * num_heads + head * group + row % group
    origin = (start + first // group).to(tl.int64) * num_heads
    column = tl.arange(0, WIDTH)
    in_head = column < head_dim
    places = row[:, None] * head_dim + column[None, :]
    stored = inside[:, None] & in_head[None, :]
    queries = tl.load(q + origin * head_dim + places, mask=stored, other=0.0)
    table = block_tables + sequence.to(tl.int64) * table_stride
    k_cache += head.to(tl.int64) * head_stride
    v_cache += head.to(tl.int64) * head_stride

    all_top = tl.full((HEIGHT,), float("-inf"), tl.float32)
    all_total = tl.zeros((HEIGHT,), tl.float32)
    all_sums = tl.zeros((HEIGHT, WIDTH), tl.float32)
    for split in range(tl.program_id(2), tl.cdiv(num_keys, SPLIT), tl.num_programs(2)):
        top = tl.full((HEIGHT,), float("-inf"), tl.float32)
        total = tl.zeros((HEIGHT,), tl.float32)
        sums = tl.zeros((HEIGHT, WIDTH), tl.float32)
        for at in range(split * SPLIT, tl.minimum(num_keys, split * SPLIT + SPLIT), KEYS):
            key = at + tl.arange(0, KEYS)
            block = tl.load(table + key // block_size, mask=key < length, other=0).to(tl.int64)
            offset = key % block_size
            # What lies beyond a sequence's end is of others, and may be NaN.
            loaded = (key < length)[:, None] & in_head[None, :]
            lines = (block * block_stride + offset * token_stride)[:, None] + column[None, :]
            keys = tl.load(k_cache + lines, mask=loaded, other=0.0)
            values = tl.load(v_cache + lines, mask=loaded, other=0.0)
            scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
            scores = tl.where(key[None, :] <= position[:, None], scores, float("-inf"))
            new_top = tl.maximum(top, tl.max(scores, 1))
            base = tl.where(new_top == float("-inf"), 0.0, new_top)
            fade = tl.exp2(top - base)
            weights = tl.exp2(scores - base[:, None])
            total = total * fade + tl.sum(weights, 1)
            sums = tl.dot(weights.to(values.dtype), values, sums * fade[:, None], input_precision="ieee")
            top = new_top
        if MERGED:
            all_top, all_total, all_sums = _merge(all_top, all_total, all_sums, top, total, sums)
        else:
            part = num_tokens.to(tl.int64) * num_heads * split + origin
            tl.store(part_tops + part + row, top, mask=inside)
            tl.store(part_totals + part + row, total, mask=inside)
            tl.store(part_sums + part * head_dim + places, sums, mask=stored)
    if MERGED:
        result = _normalised(all_total, all_sums).to(out.dtype.element_ty)
        tl.store(out + origin * head_dim + places, result, mask=stored)


@triton.jit(do_not_specialize=_MERGE_INTEGERS)
def _merge_splits(
    query_start, seq_lens, out, part_sums, part_tops, part_totals, head_dim, num_tokens, num_sequences,
    WIDTH: tl.constexpr, SPLIT: tl.constexpr, SEARCH: tl.constexpr,
):  # fmt: skip
    """Program (token, query head): its splits, which `_attention` left unmerged, merged in the same order."""
    token = tl.program_id(0)
    sequence = _sequence_of(token, query_start, num_sequences, 1, 0, SEARCH)
    real = sequence < num_sequences
    end = tl.load(query_start + sequence + 1, mask=real, other=0)
    num_keys = tl.where(real, tl.load(seq_lens + sequence, mask=real, other=0) - end + token + 1, 0)
    num_rows = num_tokens.to(tl.int64) * tl.num_programs(1)
    row = token.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    column = tl.arange(0, WIDTH)
    stored = column < head_dim

    # Of one row, as a tile is of many: the same formula for both.
    top = tl.full((1,), float("-inf"), tl.float32)
    total = tl.zeros((1,), tl.float32)
    sums = tl.zeros((1, WIDTH), tl.float32)
    for split in tl.range(0, tl.cdiv(num_keys, SPLIT), num_stages=4):
        part = split * num_rows + row
        next_top = tl.load(part_tops + part + tl.arange(0, 1))
        next_total = tl.load(part_totals + part + tl.arange(0, 1))
        next_sums = tl.load(part_sums + part * head_dim + column, mask=stored, other=0.0)[None, :]
        top, total, sums = _merge(top, total, sums, next_top, next_total, next_sums)
    result = _normalised(total, sums).to(out.dtype.element_ty)
    tl.store(out + row * head_dim + column[None, :], result, mask=stored[None, :])


def _height(dtype: torch.dtype, hopper: bool) -> int:
    """Query rows of a tile: 64 is the least that Hopper's wgmma takes, and more than others have registers
    for. Float32 has no matrix instruction."""
    if dtype == torch.float32:
        return 16
    return 64 if hopper else 32


def _width(head_dim: int) -> int:
    return 64 if head_dim <= 64 else 128 if head_dim <= 128 else 256


def _kernel(dtype: torch.dtype, head_dim: int, hopper: bool, merged: bool) -> Kernel:
    constants = {"HEIGHT": _height(dtype, hopper), "KEYS": _KEYS, "WIDTH": _width(head_dim), "SPLIT": SPLIT}
    # Two levels of loads, the block table's and the blocks': five stages keep two tiles of keys in flight.
    return Kernel(
        _attention,
        {**constants, "MERGED": merged, "SEARCH": _SEARCH},
        num_warps=4 if head_dim <= 128 else 8,
        num_stages=3 if dtype == torch.float32 else 5,
    )


def _merge_kernel(head_dim: int) -> Kernel:
    return Kernel(_merge_splits, {"WIDTH": _width(head_dim), "SPLIT": SPLIT, "SEARCH": _SEARCH}, num_warps=2)


def builds() -> Iterator[Build]:
    rows = dict.fromkeys(("query_start", "seq_lens"), "*i32")
    parts = dict.fromkeys(("part_sums", "part_tops", "part_totals"), "*fp32")
    for dtype, pointer in DTYPES.items():
        data = dict.fromkeys(("q", "k_cache", "v_cache", "out"), pointer)
        integers = dict.fromkeys(_INTEGERS, "i32")
        arguments = {**data, **rows, **parts, **integers, "block_tables": "*i32", "scale": "fp32"}
        of_merge = rows | parts | {"out": pointer} | dict.fromkeys(_MERGE_INTEGERS, "i32")
        for head_dim in (64, 128, 256):
            for hopper, merged in product((False, True), repeat=2):
                kernel = _kernel(dtype, head_dim, hopper, merged)
                yield Build(kernel, arguments, f"{pointer} {head_dim}", 90 if hopper else 80)
            yield Build(_merge_kernel(head_dim), of_merge)


def _programs(tiles: int, num_splits: int, workspace: int) -> int:
    """How many programs share the splits of a tile out: 1 if tiles are many, or unmerged sums too large."""
    return 1 if workspace > _WORKSPACE else max(1, min(num_splits, _PROGRAMS // tiles))


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    query_start: Tensor,
    seq_lens: Tensor,
    scale: float,
) -> Tensor:
    """`reference.paged_attention`; rows that no sequence has, or one without keys, are zeros.

    The grid follows from shapes alone. Weights are rounded to the values' dtype for their product, as in
    flash attention; all else is in float32.
    """
    strides, bases = k_cache.stride(), (k_cache.data_ptr(), v_cache.data_ptr())
    alike = strides == v_cache.stride() and not any(n % 16 for n in (*strides[:3], *bases))
    if not alike or q.shape[-1] not in ATTENTION_HEAD_DIMS:
        return reference.paged_attention(q, k_cache, v_cache, block_tables, query_start, seq_lens, scale)
    q, block_tables = aligned(q), aligned(block_tables)
    query_start, seq_lens = aligned(query_start), aligned(seq_lens)
    num_tokens, num_heads, head_dim = q.shape
    block_size, num_kv_heads = k_cache.shape[1:3]
    num_sequences, group = seq_lens.shape[0], num_heads // num_kv_heads
    num_splits = -(-block_tables.shape[1] * block_size // SPLIT)
    out = torch.empty_like(q)
    # The matrix instructions of smaller GPUs of later generations (12.0) are those from before Hopper.
    hopper = q.is_cuda and (9, 0) <= torch.cuda.get_device_capability(q.device) < (12, 0)
    tiles = num_tokens * group // _height(q.dtype, hopper) + num_sequences + 1
    programs = _programs(tiles * num_kv_heads, num_splits, 4 * num_splits * q.numel())
    parts = num_splits if programs > 1 else 0, num_tokens, num_heads
    sums = torch.empty((*parts, head_dim), dtype=torch.float32, device=q.device)
    tops = torch.empty(parts, dtype=torch.float32, device=q.device)
    totals = torch.empty_like(tops)
    _kernel(q.dtype, head_dim, hopper, programs == 1).launch(
        (tiles, num_kv_heads, programs),
        *(q, k_cache, v_cache, block_tables, query_start, seq_lens, out, sums, tops, totals),
        scale * _LOG2_E,
        *(group, head_dim, block_size, num_tokens, num_sequences, block_tables.shape[1], *strides[:3]),
    )
    if programs > 1:
        _merge_kernel(head_dim).launch(
            (num_tokens, num_heads),
            *(query_start, seq_lens, out, sums, tops, totals, head_dim, num_tokens, num_sequences),
        )
    return out
