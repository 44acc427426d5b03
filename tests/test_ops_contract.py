"""The invariance contract of the model's ops: a row of the output depends, bit for bit, on its own inputs.

What a row has to be equal to is always the plainest way to compute it: that row alone, one thread. What is
compared with it is the same op on many rows, with every instruction set of this CPU, and in plain torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from kv_caches import laid, plain
from torch import Tensor

from folo import ops
from folo.ops import cpu, kv_cache
from folo.ops.packed import Packed, pack

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
COUNTS = (1, 2, 3, 7, 15, 16, 17, 31, 33, 64, 70, 128, 257)
ROWS = max(COUNTS)
THREADS = (1, 2, 3)

pytestmark = [pytest.mark.no_cover, pytest.mark.usefixtures("threads", "each_instruction_set")]

Op = Callable[[Any, list[int]], tuple[Tensor, ...]]
"""`op(namespace, rows)` applies an op of the namespace to the chosen rows of a fixed problem."""


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """As torch.equal, but -0.0 differs from 0.0, and NaN equals itself."""
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(kind), b.contiguous().view(kind))


def check_rows(op: Op) -> None:
    """Every row of prefixes, permutations and repetitions is what it is alone, with 1, 2 and 3 threads."""
    torch.set_num_threads(1)
    alone = [torch.cat(column) for column in zip(*(op(ops, [r]) for r in range(ROWS)), strict=True)]
    shuffled = torch.randperm(ROWS, generator=torch.Generator().manual_seed(1)).tolist()
    batches = [list(range(n)) for n in COUNTS]
    batches += [shuffled, shuffled[:70], shuffled[:5], [200] * 20, list(range(ROWS))[40:57]]
    for count in THREADS:
        torch.set_num_threads(count)
        for rows in batches if count == 1 else [[0], list(range(17)), shuffled]:
            for together, expected in zip(op(ops, rows), alone, strict=True):
                assert same_bits(together, expected[rows]), (len(rows), count)


LINEAR_SHAPES = (
    (1, 576),
    (20, 20),
    (36, 130),
    (100, 576),
    (64, 1),
    (192, 512),
    (576, 1536),
    (960, 576),
)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), LINEAR_SHAPES)
def test_linear_rows_depend_on_themselves_alone(n: int, k: int, dtype: torch.dtype) -> None:
    x, weight = random(ROWS, k, dtype=dtype), random(n, k, dtype=dtype, seed=1)
    bias = random(n, dtype=dtype) if n % 3 else None
    check_rows(lambda op, rows: (op.linear(x[rows], weight, bias),))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), [(36, 130), (576, 576)])
def test_linear_takes_every_row_count_up_to_70(n: int, k: int, dtype: torch.dtype) -> None:
    torch.set_num_threads(1)
    x, weight = random(70, k, dtype=dtype), random(n, k, dtype=dtype, seed=1)
    alone = torch.cat([ops.linear(x[r : r + 1], weight) for r in range(70)])
    for m in range(71):
        assert same_bits(ops.linear(x[:m], weight), alone[:m]), m


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), [(36, 130), (576, 576)])
def test_rows_of_wide_results_depend_on_themselves_alone(n: int, k: int, dtype: torch.dtype) -> None:
    x, weight, bias = random(ROWS, k, dtype=dtype), random(n, k, dtype=dtype, seed=1), random(n, dtype=dtype)
    for given in (None, bias):
        check_rows(lambda op, rows, given=given: (op.linear(x[rows], weight, given, wide=True),))
    if cpu.instruction_set() != cpu.REFERENCE:  # whose own kernel rounds within
        assert same_bits(ops.linear(x, weight, bias, wide=True).to(dtype), ops.linear(x, weight, bias))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), LINEAR_SHAPES)
def test_packing_a_weight_changes_no_bit(n: int, k: int, dtype: torch.dtype) -> None:
    x, weight = random(33, k, dtype=dtype), random(n, k, dtype=dtype, seed=1)
    bias = random(n, dtype=dtype)
    data = pack(weight)
    packed = Packed(data, (n, k))
    assert same_bits(packed.plain(), weight)
    index = torch.tensor([n - 1, 0, n // 2, 0])
    assert same_bits(packed.rows(index), weight[index])
    for wide in (False, True):
        assert same_bits(ops.linear(x, packed, bias, wide), ops.linear(x, weight, bias, wide))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inner", [8, 16, 24, 48, 80, 208])
def test_a_gated_linear_is_a_linear_and_its_gate(inner: int, dtype: torch.dtype) -> None:
    """One pass over packed weights, two ops over plain ones: not a bit apart, for any number of rows."""
    k = 72
    x, weight = random(257, k, dtype=dtype), random(2 * inner, k, dtype=dtype, seed=1)
    packed = Packed(pack(weight), (2 * inner, k))
    for bias in (None, random(2 * inner, dtype=dtype, seed=2)):
        expected = ops.silu_mul(ops.linear(x, weight, bias))
        assert same_bits(ops.gated_linear(x, weight, bias), expected)
        for count in THREADS:
            torch.set_num_threads(count)
            for m in (*range(8), 31, 32, 33, 70, 95, 96, 97, 257):
                assert same_bits(ops.gated_linear(x[:m], packed, bias), expected[:m]), (m, count)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [130, 512])
def test_linear_does_not_see_how_its_input_is_stored(k: int, dtype: torch.dtype) -> None:
    x, weight = random(48, k, dtype=dtype), random(128, k, dtype=dtype, seed=1)
    expected = ops.linear(x, weight)
    shifted = torch.cat((x.new_ones(1), x.flatten()))[1:].view(x.shape)
    wide = torch.cat((x, x), 1)[:, :k]
    transposed = x.t().contiguous().t()
    spread = torch.stack((x, x), -1).flatten(1)[:, ::2]
    for stored in (shifted, wide, transposed, spread):
        assert same_bits(ops.linear(stored, weight), expected), stored.stride()
        assert same_bits(ops.linear(stored[:1], weight), expected[:1]), stored.stride()
    assert same_bits(ops.linear(x, weight.t().contiguous().t()), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 20, 64, 577, 1536])
def test_norm_rows_depend_on_themselves_alone(width: int, dtype: torch.dtype) -> None:
    x, residual = random(ROWS, width, dtype=dtype), random(ROWS, width, dtype=dtype, seed=1)
    weight = random(width, dtype=dtype)
    check_rows(lambda op, rows: (op.rms_norm(x[rows], weight, 1e-6),))
    check_rows(lambda op, rows: op.add_rms_norm(x[rows], residual[rows], weight, 1e-6))


def test_norm_of_a_long_row_is_not_divided_between_threads() -> None:
    """torch.sum divides a single row of more than 32768 elements."""
    x, weight = random(12, 100000), torch.ones(100000)
    torch.set_num_threads(1)
    expected = ops.rms_norm(x, weight, 1e-6)
    for count in THREADS:
        torch.set_num_threads(count)
        for row in range(12):
            assert same_bits(ops.rms_norm(x[row : row + 1], weight, 1e-6)[0], expected[row]), (row, count)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 20, 37, 1536])
def test_silu_mul_rows_depend_on_themselves_alone(width: int, dtype: torch.dtype) -> None:
    gate_up = random(ROWS, 2 * width, dtype=dtype) * 4
    check_rows(lambda op, rows: (op.silu_mul(gate_up[rows]),))


@pytest.mark.parametrize("frequencies", [1, 8, 37, 40, 64])
def test_rope_angles_depend_on_the_position_alone(frequencies: int) -> None:
    inv_freq = 10000 ** -torch.linspace(0, 1, frequencies)
    positions = torch.arange(ROWS) * 517
    check_rows(lambda op, rows: (op.rope_angles(positions[rows], inv_freq),))


HEADS = ((16, 1, 2), (64, 2, 1), (80, 3, 2), (96, 5, 1), (128, 8, 1), (256, 7, 1), (64, 1, 3))
"""(head_dim, query heads of a KV head, KV heads)"""


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(("head_dim", "group", "num_kv_heads"), HEADS)
def test_qk_norm_rope_write_rows_depend_on_themselves_alone(
    head_dim: int, group: int, num_kv_heads: int, norm: bool, dtype: torch.dtype
) -> None:
    qkv = random(ROWS, (group + 2) * num_kv_heads * head_dim, dtype=dtype)
    q_norm, k_norm = (random(head_dim, dtype=dtype, seed=s) if norm else None for s in (1, 2))
    angles = ops.rope_angles(torch.arange(ROWS) * 3, 10000 ** -torch.linspace(0, 1, head_dim // 2))
    slots = torch.randperm(ROWS, generator=torch.Generator().manual_seed(0))

    def apply(op: Any, rows: list[int]) -> tuple[Tensor, ...]:
        shape = 1, -(-ROWS // 8), 8, num_kv_heads, head_dim
        (k,), (v,) = kv_cache.zeros(shape, dtype, slots.device)
        q = op.qk_norm_rope_write(qkv[rows], angles[rows], q_norm, k_norm, 1e-6, k, v, slots[rows])
        return q, *kv_cache.read(k, v, slots[rows] // 8, slots[rows] % 8)

    check_rows(apply)


@pytest.mark.parametrize("dtype", DTYPES)
def test_qk_norm_rope_write_writes_nothing_but_its_slots(dtype: torch.dtype) -> None:
    k, v = laid(*torch.full((2, 4, 8, 2, 16), torch.nan, dtype=dtype))
    slots = torch.tensor([5, -1, 17, -1, 30])
    angles = ops.rope_angles(torch.arange(5), torch.ones(8))
    ops.qk_norm_rope_write(random(5, 4 * 2 * 16, dtype=dtype), angles, None, None, 1e-6, k, v, slots)
    for cache in plain(k, v):
        written = ~cache.flatten(0, 1).flatten(1).isnan().all(-1)
        assert written.nonzero().flatten().tolist() == [5, 17, 30]


def test_copy_blocks_copies_whole_blocks_of_every_layer_and_nothing_else() -> None:
    for dtype in DTYPES:
        k, v = kv_cache.zeros((3, 9, 8, 2, 16), dtype, torch.device("cpu"))
        for part in (k, v):
            part.copy_(random(part.numel(), dtype=dtype).view(part.shape))
        source, target = torch.tensor([7, 0, 7]), torch.tensor([3, 8, 1])
        expected_k, expected_v = k.clone(), v.clone()
        for s, t in zip(source.tolist(), target.tolist(), strict=True):
            expected_k[:, t], expected_v[:, t] = k[:, s], v[:, s]
        ops.copy_blocks(k, v, source, target)
        assert torch.equal(k, expected_k)
        assert torch.equal(v, expected_v)
        ops.copy_blocks(k, v, source[:0], target[:0])
        assert torch.equal(k, expected_k)


# --- attention


@dataclass(frozen=True)
class Context:
    """A sequence: q `[L, Hq, E]`, k and v `[L, Hkv, E]`."""

    q: Tensor
    k: Tensor
    v: Tensor

    @classmethod
    def random(cls, length: int, heads: tuple[int, int, int], dtype: torch.dtype, seed: int = 0) -> Context:
        head_dim, group, num_kv_heads = heads
        q = random(length, group * num_kv_heads, head_dim, dtype=dtype, seed=seed) * 3
        k, v = (random(length, num_kv_heads, head_dim, dtype=dtype, seed=seed + n) for n in (1, 2))
        return cls(q, k, v)


Piece = tuple[Context, int, int]
"""The queries start:end of a sequence, of which nothing after `end` exists yet."""


def attend(pieces: Sequence[Piece], block_size: int = 16, seed: int = 0, op: Any = ops) -> list[Tensor]:
    """Attention of a batch of pieces, their blocks scattered over a heap that is full of garbage.

    Blocks lie one after the other, or, with every other seed, with gaps.
    """
    counts = [-(-end // block_size) for _, _, end in pieces]
    places = torch.randperm(sum(counts) + 5, generator=torch.Generator().manual_seed(seed)) + 1
    tables = torch.zeros(len(pieces), max(counts) + seed % 3, dtype=torch.int32)
    head_shape, dtype = pieces[0][0].k.shape[1:], pieces[0][0].k.dtype
    garbage = torch.tensor([torch.nan, torch.inf, -torch.inf, 6e4], dtype=dtype)
    size = (2, len(places) + 1, block_size, *head_shape)
    which = torch.randint(4, size, generator=torch.Generator().manual_seed(seed))
    k, v = garbage[which]
    for row, ((context, _, end), blocks) in enumerate(zip(pieces, places.split([*counts, 5]), strict=False)):
        tables[row, : len(blocks)] = blocks
        for cache, own in ((k, context.k), (v, context.v)):
            for number, block in enumerate(blocks.tolist()):
                content = own[number * block_size : min(end, (number + 1) * block_size)]
                cache[block, : len(content)] = content
    spans = [end - start for _, start, end in pieces]
    query_start = torch.tensor([0, *spans]).cumsum(0).int()
    q = torch.cat([context.q[start:end] for context, start, end in pieces])
    seq_lens = torch.tensor([end for _, _, end in pieces]).int()
    k, v = laid(*(part.repeat_interleave(1 + seed % 2, 0) for part in (k, v)))
    k, v = k[:: 1 + seed % 2], v[:: 1 + seed % 2]
    out = op.paged_attention(q, k, v, tables, query_start, seq_lens, q.shape[-1] ** -0.5)
    return list(out.split(spans))


def chunked(context: Context, size: int, **layout: Any) -> Tensor:
    length = len(context.q)
    pieces = [(context, start, min(start + size, length)) for start in range(0, length, size)]
    return torch.cat([attend([piece], **layout)[0] for piece in pieces])


EDGES = (0, 1, 2, 14, 15, 16, 17, 30, 126, 127, 128, 129, 254, 255, 256, 257, 299)


def at_edges(context: Context) -> Tensor:
    """The rows at EDGES, each computed alone, as decoding would."""
    torch.set_num_threads(1)
    return torch.cat([attend([(context, p, p + 1)])[0] for p in EDGES])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", HEADS)
def test_attention_of_a_row_depends_on_its_own_context_alone(
    heads: tuple[int, int, int], dtype: torch.dtype
) -> None:
    context = Context.random(300, heads, dtype)
    edges = at_edges(context)
    for count, size in zip(THREADS, (7, 16, 64), strict=True):
        torch.set_num_threads(count)
        (whole,) = attend([(context, 0, 300)])
        assert same_bits(whole[list(EDGES)], edges), count
        assert same_bits(chunked(context, size), whole), (size, count)
        mates = [Context.random(length, heads, dtype, seed=length) for length in (1, 77, 40)]
        pieces = [(mates[0], 0, 1), (context, 0, 300), (mates[1], 76, 77), (mates[2], 13, 40)]
        (alone,) = attend([pieces[3]], block_size=32)
        for order in ([0, 1, 2, 3], [3, 1, 0, 2]):
            out = attend([pieces[n] for n in order], seed=sum(order[:2]))
            assert same_bits(out[order.index(1)], whole), (order, count)
            assert same_bits(out[order.index(3)], alone), (order, count)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [8, 16, 32, 64, 256])
def test_attention_does_not_see_blocks(block_size: int, dtype: torch.dtype) -> None:
    context = Context.random(300, (64, 3, 1), dtype)
    edges = at_edges(context)
    for seed in range(3):
        (whole,) = attend([(context, 0, 300)], block_size=block_size, seed=seed)
        assert same_bits(whole[list(EDGES)], edges), seed
        assert same_bits(chunked(context, 64, block_size=block_size, seed=seed), whole), seed


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [8, 16, 24, 256])
def test_attention_to_shared_blocks_is_as_if_they_were_not_shared(
    block_size: int, dtype: torch.dtype
) -> None:
    """Sequences that begin with the same blocks may be computed together: nothing may show of it."""
    lengths, spans, shared = [300, 513, 600, 256, 257, 777, 530, 12, 770], [1, 1, 3, 1, 2, 1, 1, 1, 9], 520
    heads, num_kv_heads, head_dim = 6, 2, 32
    k, v = random(2, 400, block_size, num_kv_heads, head_dim, dtype=dtype)
    width = -(-max(lengths) // block_size)
    tables = torch.arange(1, 1 + len(lengths) * width).view(len(lengths), width) % 400
    tables[:, : shared // block_size] = tables[0, : shared // block_size]
    tables[3, 0] = 399  # all but one begin alike
    starts = torch.tensor([0, *spans]).cumsum(0)
    q = random(int(starts[-1]), heads, head_dim, dtype=dtype) * 3

    def attend(rows: Sequence[int], tables: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        query = torch.cat([q[starts[r] : starts[r + 1]] for r in rows])
        counts = torch.tensor([0, *(spans[r] for r in rows)]).cumsum(0).int()
        lens = torch.tensor([lengths[r] for r in rows]).int()
        out = ops.paged_attention(query, *laid(k, v), tables[list(rows)].int(), counts, lens, head_dim**-0.5)
        return list(out.split([spans[r] for r in rows]))

    alone = [attend([r], tables, k, v)[0] for r in range(len(lengths))]
    for count in THREADS:
        torch.set_num_threads(count)
        for order in (range(len(lengths)), [5, 2, 8, 1, 0, 6, 4], [1, 2] * 12):
            for r, out in zip(order, attend(order, tables, k, v), strict=True):
                assert same_bits(out, alone[r]), (count, r)
    # The same K and V with blocks for each alone.
    own = torch.arange(tables.numel()).view_as(tables)
    for out, expected in zip(
        attend(range(len(lengths)), own, k[tables.flatten()], v[tables.flatten()]), alone, strict=True
    ):
        assert same_bits(out, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_padding_sees_no_key_and_changes_no_row(dtype: torch.dtype) -> None:
    """Sequences of length 0: with a row each, with several, with none."""
    k, v = laid(*(random(4, 8, 2, 64, dtype=dtype, seed=n) for n in range(2)))
    q = random(8, 4, 64, dtype=dtype, seed=2)
    tables = torch.tensor([[1, 2], [3, 0], [0, 0], [0, 0], [0, 0]], dtype=torch.int32)
    start = torch.tensor([0, 2, 3, 4, 4, 8], dtype=torch.int32)
    lens = torch.tensor([9, 4, 0, 0, 0], dtype=torch.int32)
    together = ops.paged_attention(q, k, v, tables, start, lens, 0.125)
    alone = ops.paged_attention(q[:3], k, v, tables[:2], start[:3], lens[:2], 0.125)
    assert same_bits(together[:3], alone)
    assert not together[3:].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_keeps_the_contract_over_long_contexts_and_many_mates(dtype: torch.dtype) -> None:
    heads = (16, 2, 2)
    contexts = [Context.random(length, heads, dtype, seed=length) for length in (600, 599, 513, 512, 1, 130)]
    alone = [attend([(c, 0, len(c.q))])[0] for c in contexts]
    for end in (1, 128, 129, 385, 512, 513, 600):
        assert same_bits(attend([(contexts[0], end - 1, end)])[0], alone[0][end - 1 : end]), end
    for count in THREADS:
        torch.set_num_threads(count)
        together = attend([(c, 0, len(c.q)) for c in contexts], seed=count)
        for a, b in zip(together, alone, strict=True):
            assert same_bits(a, b), count
        decoding = attend([(c, len(c.q) - 1, len(c.q)) for c in contexts], block_size=8)
        for a, b in zip(decoding, alone, strict=True):
            assert same_bits(a, b[-1:]), count


def test_attention_takes_an_empty_batch_and_sequences_without_queries() -> None:
    context = Context.random(40, (16, 2, 2), torch.float32)
    (whole,) = attend([(context, 0, 40)])
    first, none, second = attend([(context, 0, 9), (context, 9, 9), (context, 9, 40)])
    assert none.shape == (0, 4, 16)
    assert same_bits(torch.cat((first, second)), whole)
    assert attend([(context, 5, 5)])[0].shape == (0, 4, 16)
