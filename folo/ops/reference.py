"""Every op of the forward pass in plain torch: the oracle that all kernels are held to.

The contract (`folo.ops`): a row of the output depends, bit for bit, on that row's inputs alone. In
plain torch it is kept by using only

- elementwise + - * / sqrt, comparisons and max, which IEEE 754 rounds in one way, and exp, cos and
  sin on contiguous float32, which torch computes with one vector routine throughout;
- sums over a row as pairwise halving (`row_sum`), an order that the length alone decides. torch.sum
  would split a long row between threads;
- matrix products of one fixed shape. Libraries choose their kernel, and with it the order of
  summation, by the shape: so rows go in tiles of ROW_TILE, and in float32 K goes in chunks of
  K_CHUNK, added in order, with N padded to a multiple of N_TILE (below that, kernels for the edge
  depend on the number of threads). Stock bfloat16 products keep the contract where the CPU has
  bfloat16 instructions. Elsewhere they are emulated and break it, so here they are widened to float32.

Everything is differentiable and works under torch.func. float64 stays float64 throughout.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from folo.ops import kv_cache
from folo.ops.quantized import placed, stored
from folo.ops.reduce import row_sum

ROW_TILE = 16  # rows of a matrix product, and query rows of an attention tile
K_CHUNK = 512  # columns of K that one float32 product sums
N_TILE = 64  # N is padded to a multiple of it
N_PART = 8192  # rows of a weight that are widened at a time
KV_TILE = 128  # keys of an attention tile, whatever the block size


def _wide(x: Tensor) -> Tensor:
    """In the accumulation dtype: float64 stays, all else becomes float32."""
    return x if x.dtype == torch.float64 else x.float()


def _native(x: Tensor) -> bool:
    """Whether stock products of this dtype and device keep one order of summation for a fixed shape."""
    if x.dtype == torch.bfloat16 and x.device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return x.dtype in (torch.float16, torch.bfloat16)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, wide: bool = False) -> Tensor:
    """x `[M, K]` @ weight `[N, K]`.T + bias `[N]` -> `[M, N]` in x's dtype, accumulated in float32.

    wide: the result stays in the dtype of accumulation, and is not rounded to x's.
    """
    if wide and x.dtype in (torch.float16, torch.bfloat16):  # a part at a time: widened, a weight is large
        parts = weight.split(N_PART)
        biases = [None] * len(parts) if bias is None else bias.split(N_PART)
        pairs = zip(parts, biases, strict=True)
        return torch.cat([linear(_wide(x), _wide(w), None if b is None else _wide(b)) for w, b in pairs], 1)
    m, n = x.shape[0], weight.shape[0]
    native = _native(x)
    a, b = (x, weight) if native else (_wide(x), _wide(weight))
    k_pad, n_pad = -a.shape[1] % 32, -n % N_TILE
    if k_pad or n_pad:
        b = F.pad(b, (0, k_pad, 0, n_pad))
    # A product's layout is part of its shape, for the library that chooses a kernel.
    a, b = F.pad(a, (0, k_pad, 0, -m % ROW_TILE)).contiguous(), b.contiguous()
    if bias is not None:
        bias = F.pad(bias.to(b.dtype), (0, n_pad))
    chunks = [(a, b)] if native else list(zip(a.split(K_CHUNK, 1), b.split(K_CHUNK, 1), strict=True))
    tiles = []
    for start in range(0, a.shape[0], ROW_TILE):
        first, *rest = [(u[start : start + ROW_TILE], w.t()) for u, w in chunks]
        # The bias goes into the product: added to what is rounded already, it would round twice.
        total = first[0] @ first[1] if bias is None else torch.addmm(bias, *first)
        for part in rest:
            total = total + part[0] @ part[1]
        tiles.append(total)
    out = torch.cat(tiles)[:m, :n] if tiles else a.new_empty((0, n))
    return out.to(x.dtype).contiguous()


def quantized_linear(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor,
    columns: Tensor | None,
    n: int,
    bias: Tensor | None = None,
    wide: bool = False,
) -> Tensor:
    """`linear` of a `Quantized` weight, dequantised without rounding: x `[M, K]` -> `[M, n]`."""
    rows = placed(_wide(x), codes, columns)
    weight = stored(codes, scales, zeros, rows.dtype)[:n]
    out = linear(rows, weight, None if bias is None else bias.to(rows.dtype))
    return out if wide else out.to(x.dtype)


def take_rows(x: Tensor, rows: Tensor) -> Tensor:
    """Rows, int64 `[R]`, of x `[T, D]` -> `[R, D]`."""
    return x[rows]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) * weight over the last dim (Zhang & Sennrich 2019), in float32 within.

    x `[..., D]`, weight `[D]` -> `[..., D]` in x's dtype.
    """
    wide = _wide(x)
    scale = 1 / torch.sqrt(row_sum(wide * wide).unsqueeze(-1) / x.shape[-1] + eps)
    return (wide * scale * _wide(weight)).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """-> (rms_norm(x + residual), x + residual); x and residual `[M, D]` in one dtype."""
    total = x + residual
    return rms_norm(total, weight, eps), total


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up; gate_up `[M, 2 I]`, gate first -> `[M, I]` in its dtype, in float32 within."""
    gate, up = _wide(gate_up).chunk(2, -1)
    gate = gate.contiguous()
    return (gate / (1 + torch.exp(-gate)) * up).to(gate_up.dtype)


def gated_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`silu_mul(linear(x, weight, bias))`, rounded between the two; weight `[2 I, K]`, gate first."""
    return silu_mul(linear(x, weight, bias))


def rope_angles(positions: Tensor, inv_freq: Tensor) -> Tensor:
    """cos and sin of position * inv_freq (Su et al. 2021).

    positions int64 `[T]`, inv_freq `[E/2]` float32 (or float64) -> `[T, E]`: E/2 cosines, E/2 sines.
    """
    angles = positions.to(inv_freq.dtype)[:, None] * inv_freq
    return torch.cat((torch.cos(angles), torch.sin(angles)), -1)


def qk_norm_rope(
    qkv: Tensor,
    angles: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    num_kv_heads: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Split, normalise each head of q and k where the model does, and rotate (half-split layout).

    qkv `[T, (Hq + 2 Hkv) E]`, angles `[T, E]`, norms `[E]` -> q `[T, Hq, E]`, k and v `[T, Hkv, E]`.
    """
    heads = qkv.view(qkv.shape[0], -1, angles.shape[-1])
    num_heads = heads.shape[1] - 2 * num_kv_heads
    q, k, v = heads.split((num_heads, num_kv_heads, num_kv_heads), 1)
    if q_norm is not None and k_norm is not None:
        q, k = rms_norm(q, q_norm, eps), rms_norm(k, k_norm, eps)
    cos, sin = angles.unsqueeze(1).chunk(2, -1)

    def rotate(x: Tensor) -> Tensor:
        first, second = _wide(x).chunk(2, -1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)

    return rotate(q), rotate(k), v


def qk_norm_rope_write(
    qkv: Tensor,
    angles: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
) -> Tensor:
    """`qk_norm_rope`, with k and v written to the caches; returns q `[T, Hq, E]`.

    caches of one layer, `[num_blocks, block_size, Hkv, ...]` as `folo.ops.kv_cache` lays them; slots int64
    `[T]`: block * block_size + offset, or negative for a padding row, which is written nowhere.
    """
    q, k, v = qk_norm_rope(qkv, angles, q_norm, k_norm, eps, k_cache.shape[2])
    live = slots >= 0
    size = k_cache.shape[1]
    kv_cache.write(k_cache, v_cache, slots[live] // size, slots[live] % size, k[live], v[live])
    return q


def copy_blocks(k: Tensor, v: Tensor, source: Tensor, target: Tensor) -> None:
    """Copy whole blocks in every layer of the heap; k and v `[L, num_blocks, ...]`, indices int64 `[C]`."""
    k[:, target] = k[:, source]
    v[:, target] = v[:, source]


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    query_start: Tensor,
    seq_lens: Tensor,
    scale: float,
) -> Tensor:
    """Causal attention of each sequence's last tokens to its whole context, K and V in blocks.

    q `[T, Hq, E]`: sequence s has rows query_start[s]:query_start[s+1], its last tokens, of
    seq_lens[s] in all. caches as `qk_norm_rope_write` takes them, block_tables int32 `[S, B]`,
    query_start int32 `[S+1]`, seq_lens int32 `[S]` -> `[T, Hq, E]` in q's dtype. A sequence with a
    seq_lens of 0 is padding: it sees no key, and its rows come to 0.

    One order for every row: tiles of KV_TILE keys from position 0 upward under an online softmax
    (Milakov & Gimelshein 2018; Dao et al. 2022), in float32. The query rows of a KV head go in
    tiles of ROW_TILE, so each product has one shape. A tile that a row cannot see is an exact
    no-op for it: its weights are exp(-inf) = 0, and the rescaling is exp(0) = 1. (So long as K and V
    of the sequence are finite: 0 * inf is not. Beyond its end they may be anything.)
    """
    return attention_of(q, k_cache, v_cache, block_tables, query_start.tolist(), seq_lens.tolist(), scale)


def attention_of(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    query_start: list[int],
    seq_lens: list[int],
    scale: float,
) -> Tensor:
    """`paged_attention` where the host knows the lengths: no value of a tensor decides what is computed."""
    if not q.shape[0]:
        return q.new_empty(q.shape)
    (block_size, num_kv_heads), head_dim = k_cache.shape[1:3], q.shape[-1]
    last, tile_sequence, rows, position, unsort = _query_tiles(q, num_kv_heads, query_start, seq_lens)
    lengths = torch.tensor(seq_lens, device=q.device)[:, None]
    top = position.new_full(position.shape, -torch.inf, dtype=rows.dtype)[:, None].expand(rows.shape[:-1])
    total, acc = torch.zeros_like(rows[..., 0]), torch.zeros_like(rows)
    for start in range(0, last[0] + 1, KV_TILE):
        n = sum(end >= start for end in last)  # tiles stand in descending order of their last position
        keys = torch.arange(start, start + KV_TILE, device=q.device)
        column = (keys // block_size).clamp(max=block_tables.shape[1] - 1)
        inside = keys < lengths
        block = torch.where(inside, block_tables[:, column].long(), 0)
        offset = torch.where(inside, keys % block_size, 0)
        keys_of, values_of = kv_cache.read(k_cache, v_cache, block, offset)
        # Slots beyond a sequence's end may hold anything, even NaN: zeroed, so that 0 * value is 0.
        values_of = torch.where(inside[..., None, None], values_of, 0)
        k_tile = _by_head(keys_of)[tile_sequence[:n]]
        v_tile = _by_head(values_of)[tile_sequence[:n]]
        scores = _batched(rows[:n], k_tile.transpose(-1, -2)) * scale
        visible = keys <= position[:n, None, :, None]
        scores = torch.where(visible, scores, -torch.inf)
        new_top = torch.maximum(top[:n], scores.amax(-1))
        fade = torch.exp(top[:n] - new_top)
        weights = torch.exp(scores - new_top[..., None])
        top = torch.cat((new_top, top[n:]))
        total = torch.cat((total[:n] * fade + row_sum(weights), total[n:]))
        acc = torch.cat((acc[:n] * fade[..., None] + _batched(weights, v_tile), acc[n:]))
    out = (
        (acc / torch.where(total == 0, 1, total)[..., None])
        .transpose(1, 2)
        .reshape(-1, num_kv_heads, head_dim)
    )
    return (
        out[unsort].view(q.shape[0], -1, num_kv_heads, head_dim).transpose(1, 2).reshape(q.shape).to(q.dtype)
    )


def _by_head(x: Tensor) -> Tensor:
    """`[..., T, H, E]` -> `[..., H, T, E]`, contiguous: a product's layout is part of its shape."""
    return _wide(x).transpose(1, 2).contiguous()


def _batched(a: Tensor, b: Tensor) -> Tensor:
    return torch.bmm(a.flatten(0, 1), b.flatten(0, 1)).view(*a.shape[:-1], b.shape[-1])


def _query_tiles(
    q: Tensor, num_kv_heads: int, query_start: list[int], seq_lens: list[int]
) -> tuple[list[int], Tensor, Tensor, Tensor, Tensor]:
    """Cut the query rows of each (sequence, KV head) into tiles, those with the longest context first.

    -> for each tile its last row's position and, `[N]`, its sequence; rows `[N, Hkv, ROW_TILE, E]`, their
    positions `[N, ROW_TILE]`; and for each (token, head of its group) in order the row that holds it
    `[T * Hq/Hkv]`.
    """
    group, device = q.shape[1] // num_kv_heads, q.device
    tiles: list[tuple[int, int, int, int]] = []  # last position, sequence, first row, end
    for s, length in enumerate(seq_lens):
        num_rows = (query_start[s + 1] - query_start[s]) * group
        for first in range(0, num_rows, ROW_TILE):
            end = min(first + ROW_TILE, num_rows)
            tiles.append((length - 1 - (num_rows - end) // group, s, first, end))
    order = sorted(range(len(tiles)), key=lambda number: -tiles[number][0])
    last, sequences, firsts, _ = zip(*(tiles[number] for number in order), strict=True)
    sequence, first = torch.tensor(sequences, device=device), torch.tensor(firsts, device=device)
    starts, lengths = torch.tensor(query_start, device=device), torch.tensor(seq_lens, device=device)
    count = (starts[1:] - starts[:-1])[sequence, None]
    row = first[:, None] + torch.arange(ROW_TILE, device=device)
    # Padding rows repeat row 0, whose position every tile reaches.
    row = torch.where(row < count * group, row, 0)
    token = starts[sequence, None] + row // group
    position = lengths[sequence, None] - count + row // group
    heads = q.view(q.shape[0], num_kv_heads, group, -1)
    rows = _by_head(heads[token, :, row % group])
    at = {number: place * ROW_TILE for place, number in enumerate(order)}
    held = [torch.arange(at[n], at[n] + end - first) for n, (_, _, first, end) in enumerate(tiles)]
    return list(last), sequence, rows, position, torch.cat(held).to(device)
