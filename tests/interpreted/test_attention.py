"""The attention kernels, interpreted: what they compute, and that a row of it depends on that row alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from tensors import DTYPES, check_rounded_once, random, same_bits
from torch import Tensor

from folo.ops.cuda import attention
from folo.ops.cuda.attention import paged_attention

SPLIT = 64  # for the tests: the interpreter is slow
HEADS = ((4, 4, 16), (6, 2, 80), (7, 1, 64), (3, 1, 48))
"""Query heads, KV heads, head dimension."""


@dataclass(frozen=True)
class Context:
    """A sequence: q `[T, Hq, E]`, k and v `[T, Hkv, E]` of its tokens from position 0 on."""

    q: Tensor
    k: Tensor
    v: Tensor

    @staticmethod
    def random(tokens: int, heads: tuple[int, int, int], dtype: torch.dtype, seed: int = 0) -> Context:
        num_heads, num_kv_heads, head_dim = heads
        q = random(tokens, num_heads, head_dim, dtype=dtype, seed=seed) * 2
        k, v = random(2, tokens, num_kv_heads, head_dim, dtype=dtype, seed=seed)
        return Context(q, k, v)

    def exact(self) -> Tensor:
        group = self.q.shape[1] // self.k.shape[1]
        k, v = (x.double().repeat_interleave(group, 1) for x in (self.k, self.v))
        scores = torch.einsum("qhe,khe->hqk", self.q.double(), k) * self.q.shape[-1] ** -0.5
        scores = scores.masked_fill(torch.ones(scores.shape[1:]).triu(1).bool(), -torch.inf)
        return torch.einsum("hqk,khe->qhe", scores.softmax(-1), v)


Chunk = tuple[Context, int, int]
"""The tokens [begin, end) of a context are the queries; those before them are in the cache."""


def attend(
    chunks: Sequence[Chunk], block_size: int = 16, seed: int = 0, width: int = 0, padding: int = 0
) -> list[Tensor]:
    """One call for all; blocks lie anywhere in a heap that is NaN elsewhere.

    width: columns of the block table at least; padding: sequences of one row and no key, and as many rows
    of no sequence.
    """
    first = chunks[0][0]
    num_kv_heads, head_dim = first.k.shape[1:]
    counts = [-(-end // block_size) for _, _, end in chunks]
    free = torch.randperm(sum(counts) + 3, generator=torch.Generator().manual_seed(seed)).tolist()
    heap = torch.full((2, len(free), num_kv_heads, block_size, head_dim), torch.nan, dtype=first.k.dtype)
    caches = heap.transpose(2, 3)
    tables = torch.full((len(chunks) + padding, max(width, *counts)), 2**30, dtype=torch.int32)
    for s, (context, _, end) in enumerate(chunks):
        blocks = [free.pop() for _ in range(counts[s])]
        tables[s, : counts[s]] = torch.tensor(blocks)
        for place in range(end):
            block, offset = blocks[place // block_size], place % block_size
            caches[:, block, offset] = torch.stack((context.k[place], context.v[place]))
    rows = [end - begin for _, begin, end in chunks]
    q = torch.cat([context.q[begin:end] for context, begin, end in chunks])
    q = torch.cat((q, q.new_full((2 * padding, *q.shape[1:]), torch.nan)))
    start = torch.tensor([0, *rows, *[1] * padding]).cumsum(0).int()
    lengths = torch.tensor([*(end for _, _, end in chunks), *[0] * padding]).int()
    out = paged_attention(q, caches[0], caches[1], tables, start, lengths, head_dim**-0.5)
    *parts, rest = out.split([*rows, 2 * padding])
    assert same_bits(rest, torch.zeros_like(rest))
    return list(parts)


def alone(context: Context) -> Tensor:
    return attend([(context, 0, len(context.q))])[0]


@pytest.fixture(autouse=True)
def _short_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "SPLIT", SPLIT)


@pytest.fixture(params=[True, False], ids=["merged", "split"])
def programs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """One program walks all splits of a tile, or two share them and a second kernel merges."""
    count = 1 if request.param else 2
    monkeypatch.setattr(attention, "_programs", lambda tiles, splits, workspace: count)
    return count


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_rounds_once(heads: tuple[int, int, int], dtype: torch.dtype, programs: int) -> None:
    contexts = [Context.random(length, heads, dtype, seed=length) for length in (1, 40, 17)]
    chunks = [(context, 0, len(context.q)) for context in contexts]
    for context, out in zip(contexts, attend(chunks), strict=True):
        # Weights are rounded as well as the result: two errors of one size come to 1.41 of it, give or take.
        check_rounded_once(out, context.exact(), 1.5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_rounds_once_over_several_splits(dtype: torch.dtype, programs: int) -> None:
    length = 3 * SPLIT + 40
    context = Context.random(length, (2, 1, 64), dtype)
    out = attend([(context, length - 2, length)])[0]
    check_rounded_once(out, context.exact()[-2:], 1.5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(4, 2, 80), (3, 1, 16)])
def test_rows_do_not_see_how_a_prompt_was_chunked(heads: tuple[int, int, int], dtype: torch.dtype) -> None:
    context = Context.random(70, heads, dtype)
    whole = alone(context)
    for chunk in (1, 7, 16, 64):
        begins = range(0, 70, chunk) if chunk > 7 else (0, 28, 31, 33, 63, 69)
        for begin in begins:
            end = min(begin + chunk, 70)
            assert same_bits(attend([(context, begin, end)])[0], whole[begin:end]), (chunk, begin)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_do_not_see_their_mates(dtype: torch.dtype) -> None:
    contexts = [Context.random(n, (6, 2, 16), dtype, seed=n) for n in (1, 40, 17, 33, 64, 9)]
    whole = [alone(context) for context in contexts]
    chunks = [(context, n % 3 * len(context.q) // 3, len(context.q)) for n, context in enumerate(contexts)]
    for order in ([5, 2, 0, 1, 3, 4], [1, 1, 4], [3]):
        for n, out in zip(order, attend([chunks[n] for n in order], seed=len(order)), strict=True):
            assert same_bits(out, whole[n][chunks[n][1] :]), n
    decoding = [(context, len(context.q) - 1, len(context.q)) for context in contexts]
    for out, expected in zip(attend(decoding), whole, strict=True):
        assert same_bits(out, expected[-1:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_do_not_see_where_their_blocks_lie(dtype: torch.dtype) -> None:
    context = Context.random(150, (4, 2, 16), dtype)
    chunk = context, 140, 150
    expected = attend([chunk])[0]
    for seed, block_size in enumerate((8, 16, 24, 32, 128, 256)):
        assert same_bits(attend([chunk], block_size, seed)[0], expected), block_size


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_do_not_see_who_walks_their_splits(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """By one program and by up to five, alone and with mates, at the ends of tiles and splits."""
    context = Context.random(3 * SPLIT + 10, (2, 1, 16), dtype)
    mate = Context.random(20, (2, 1, 16), dtype, seed=1)
    for end in (1, 33, SPLIT, SPLIT + 1, 3 * SPLIT, 3 * SPLIT + 10):
        outs = []
        for programs in (1, 2, 5):
            monkeypatch.setattr(
                attention, "_programs", lambda tiles, splits, workspace, programs=programs: programs
            )
            outs.append(attend([(context, end - 1, end)])[0])
            outs.append(attend([(mate, 3, 20), (context, end - 1, end)], 128)[1])
            outs.append(attend([(context, max(0, end - 3), end)])[0][-1:])
        for out in outs[1:]:
            assert same_bits(out, outs[0]), end


def test_padding_reads_nothing_and_is_zero(programs: int) -> None:
    """Rows of sequences without keys, rows of no sequence, and block tables as wide as a graph's."""
    context = Context.random(40, (4, 2, 16), torch.float32)
    expected = alone(context)
    assert same_bits(attend([(context, 0, 40)], padding=3, width=40)[0], expected)
    (decoded,) = attend([(context, 39, 40)], padding=20, width=70)
    assert same_bits(decoded, expected[-1:])


def test_sequences_without_queries_and_an_empty_batch(programs: int) -> None:
    context = Context.random(40, (4, 2, 16), torch.float32)
    first, none, second = attend([(context, 0, 9), (context, 9, 9), (context, 9, 40)])
    assert none.shape == (0, 4, 16)
    assert same_bits(torch.cat((first, second)), alone(context))
    assert attend([(context, 5, 5)])[0].shape == (0, 4, 16)


def test_sequences_find_their_tiles_however_many_are_looked_at_together(
    monkeypatch: pytest.MonkeyPatch, programs: int
) -> None:
    context = Context.random(40, (2, 1, 16), torch.float32)
    chunks = [(context, n, n + 1 + n % 3 * 9) for n in range(13)]
    together = attend(chunks)
    monkeypatch.setattr(attention, "_SEARCH", 4)
    for out, expected in zip(attend(chunks), together, strict=True):
        assert same_bits(out, expected)


def test_a_head_dimension_that_is_no_multiple_of_16_runs_as_the_reference() -> None:
    context = Context.random(20, (2, 1, 20), torch.float32)
    check_rounded_once(alone(context), context.exact())


def test_attention_survives_large_scores() -> None:
    context = Context.random(16, (1, 1, 16), torch.float32)
    context = Context(context.q * 1e4, context.k, context.v)
    check_rounded_once(alone(context), context.exact())


def test_attention_to_one_key_is_its_value() -> None:
    context = Context.random(1, (3, 1, 16), torch.float32)
    assert torch.equal(alone(context), context.v.expand(1, 3, 16))


def test_programs_share_the_splits_out_where_tiles_are_few() -> None:
    assert attention._programs(tiles=16, num_splits=32, workspace=1 << 20) == 32
    assert attention._programs(tiles=16, num_splits=160, workspace=1 << 24) == 32
    assert attention._programs(tiles=2048, num_splits=32, workspace=1 << 24) == 1
    assert attention._programs(tiles=16, num_splits=32, workspace=1 << 28) == 1
