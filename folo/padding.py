"""A step's arrays padded to one of few shapes, which graphs are captured for.

Padding changes no bit of the rows that are real: by the contract of the ops, a row depends on itself. Padding
rows are of sequences without a context, which read and write no block.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from folo.inputs import NO_LOGPROBS, ROWS_PER_TILE, SAMPLE, Inputs, Rows

_NOWHERE = -1  # the slot of a padding row
_NEUTRAL = {"target": SAMPLE, "top_p": 1}  # the columns of `Rows` in which what changes nothing is not 0


def decode_sizes(max_num_seqs: int) -> list[int]:
    """The batches that decodes are padded to: 1, 2, 4, 8, then every 16, up to max_num_seqs or just above."""
    sizes = [1, 2, 4, 8, *range(16, max_num_seqs + 16, 16)]
    return sizes[: 1 + next(place for place, size in enumerate(sizes) if size >= max_num_seqs)]


def bucket(count: int) -> int:
    """The next power of two up to 64, the next multiple of 64 from there."""
    return 1 << (count - 1).bit_length() if count <= 64 else -(-count // 64) * 64


def table_width(count: int, most: int) -> int:
    """The columns of padded block tables: 64, 256, 1024, ..., at most `most`."""
    width = 64
    while width < count:
        width *= 4
    return min(width, most)


def padded(inputs: Inputs, num_tokens: int, num_seqs: int, width: int) -> Inputs:
    """`inputs` padded to `num_tokens`, `num_seqs` and block tables of `width` columns; `rows` stay unpadded.

    A padding sequence has one padding token, the last one has all that are left.
    """
    tokens, seqs = inputs.token_ids.shape[0], inputs.seq_lens.shape[0]
    extra, empty = num_tokens - tokens, num_seqs - seqs
    assert extra >= 0
    assert empty >= min(extra, 1), "padding tokens are of a padding sequence"
    columns = width - inputs.block_tables.shape[1]
    tables = F.pad(inputs.block_tables, (0, columns, 0, empty))
    if not empty:  # always so for a single decoding sequence, whose short step should cost the host little
        return replace(inputs, block_tables=tables)
    starts = tokens + torch.arange(1, empty + 1, dtype=torch.int32, device="cpu").clamp(max=extra)
    starts[-1] = num_tokens
    return replace(
        inputs,
        token_ids=F.pad(inputs.token_ids, (0, extra)),
        positions=F.pad(inputs.positions, (0, extra)),
        slots=F.pad(inputs.slots, (0, extra), value=_NOWHERE),
        query_start=torch.cat((inputs.query_start, starts)),
        seq_lens=F.pad(inputs.seq_lens, (0, empty)),
        block_tables=tables,
        source=None if inputs.source is None else F.pad(inputs.source, (0, extra), value=-1),
    )


def padded_rows(tiles: tuple[Rows, ...], count: int, warped: bool, truncated: bool) -> tuple[Rows, ...]:
    """`tiles` padded to `count` rows with greedy ones; all with these flags, no logprobs, no penalties."""
    common: dict[str, Any] = {"penalties": None, "num_logprobs": NO_LOGPROBS}
    common |= {"warped": warped, "truncated": truncated}
    if count == sum(tile.target.shape[0] for tile in tiles):
        return tuple(replace(tile, **common) for tile in tiles)
    columns: dict[str, tuple[Tensor, ...]] = {}
    for field in fields(Rows):
        parts = [getattr(tile, field.name) for tile in tiles]
        if isinstance(parts[0], Tensor):
            whole = torch.cat(parts)
            extra = (0, count - whole.shape[0])
            columns[field.name] = F.pad(whole, extra, value=_NEUTRAL.get(field.name, 0)).split(ROWS_PER_TILE)
    each = [dict(zip(columns, parts, strict=True)) for parts in zip(*columns.values(), strict=True)]
    return tuple(Rows(**own, **common) for own in each)
