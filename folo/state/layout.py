"""The host prologue of a step, second half: lay out the arrays that the device function reads."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from folo.inputs import NO_LOGPROBS, ROWS_PER_TILE, SAMPLING, Inputs, Penalties, Rows, pack_sampling
from folo.sampling import SamplingParams
from folo.state.bind import Bound
from folo.state.schedule import Scheduled
from folo.state.sequence import Sequence

# Sampling parameters that change nothing, for rows that only score a prompt token.
_NEUTRAL = pack_sampling(SamplingParams(), seed=0, sample_index=0)


@dataclass(frozen=True, slots=True)
class Row:
    """One row of logits: which hidden state it comes from and what it is for.

    position: of the token that is sampled or scored. target: the token to score, or -1 to sample.
    """

    number: int  # of the scheduled sequence
    sequence: Sequence
    hidden: int
    position: int
    target: int

    @property
    def num_logprobs(self) -> int:
        """How many of the likeliest tokens to report besides the row's own, or NO_LOGPROBS."""
        params = self.sequence.origin.request.sampling
        if self.target >= 0:
            return params.prompt_logprobs or 0
        if params.logprobs is None:
            return 0 if params.best_of is not None else NO_LOGPROBS
        return params.logprobs


def tiles_of(bound: Bound) -> list[list[Row]]:
    """The rows of logits that a step computes, in the order of its tokens, at most ROWS_PER_TILE a tile."""
    rows: list[Row] = []
    first = 0
    for number, item in enumerate(bound.batch.scheduled):
        sequence = item.sequence
        for position in _scored(item):
            target = sequence.tokens[position]
            rows.append(Row(number, sequence, first + position - 1 - item.start, position, target))
        if item.end == len(sequence.tokens):
            rows.append(Row(number, sequence, first + item.num_tokens - 1, item.end, -1))
        first += item.num_tokens
    return [rows[start : start + ROWS_PER_TILE] for start in range(0, len(rows), ROWS_PER_TILE)]


def _scored(item: Scheduled) -> range:
    """The prompt tokens whose logprobs this chunk gives, and no earlier step has given."""
    if not item.sequence.scores_prompt:
        return range(0)
    known = len(item.sequence.prompt_logprobs) + 1
    return range(max(known, item.start + 1), min(item.end + 1, item.sequence.origin.num_prompt))


def inputs_of(bound: Bound, tiles: Items[Items[Row]], device: torch.device) -> Inputs:
    """All arrays of a step, on the device."""
    scheduled, size = bound.batch.scheduled, bound.batch.state.cache.block_size
    token_ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    for item, table in zip(scheduled, bound.tables, strict=True):
        token_ids += item.sequence.tokens[item.start : item.end]
        span = range(item.start, item.end)
        positions += span
        blocks = table.blocks
        slots += [blocks[p // size].index * size + p % size for p in span]
    width = max(len(table.packed) for table in bound.tables)
    packed = b"".join([table.packed.ljust(width, b"\0") for table in bound.tables])
    tables = np.frombuffer(packed, "<i4").reshape(len(scheduled), -1)
    starts = [0, *accumulate(item.num_tokens for item in scheduled)]

    def put(values: Any, dtype: type) -> Tensor:
        return torch.from_numpy(np.array(values, dtype)).to(device)

    return Inputs(
        token_ids=put(token_ids, np.int64),
        positions=put(positions, np.int64),
        slots=put(slots, np.int64),
        query_start=put(starts, np.int32),
        seq_lens=put([item.end for item in scheduled], np.int32),
        block_tables=put(tables, np.int32),
        copy_source=put([source.index for source, _ in bound.copies], np.int64),
        copy_target=put([target.index for _, target in bound.copies], np.int64),
        rows=tuple(_tile(rows, put) for rows in tiles),
    )


def _tile(rows: Items[Row], put: Any) -> Rows:
    packed = [_NEUTRAL if r.target >= 0 else r.sequence.origin.packed_sampling for r in rows]
    columns = np.frombuffer(b"".join(packed), SAMPLING)
    scaled = (columns["temperature"] != 0) & (columns["temperature"] != 1)
    truncated = (columns["top_k"] > 0) | (columns["top_p"] < 1)
    warped = scaled | truncated | (columns["min_p"] > 0)
    return Rows(
        index=put([r.hidden for r in rows], np.int64),
        target=put([r.target for r in rows], np.int64),
        temperature=put(columns["temperature"], np.float32),
        min_p=put(columns["min_p"], np.float32),
        top_k=put(columns["top_k"], np.int64),
        top_p=put(columns["top_p"], np.float32),
        seed=put(columns["seed"], np.int64),
        position=put([r.position for r in rows], np.int64),
        sample_index=put(columns["sample_index"], np.int64),
        processed=put([_scores_processed(r) for r in rows], np.bool_),
        penalties=_penalties(rows, columns, put),
        warped=bool(warped.any()),
        truncated=bool(truncated.any()),
        num_logprobs=max(r.num_logprobs for r in rows),
    )


def _scores_processed(row: Row) -> bool:
    return row.target < 0 and row.sequence.origin.request.sampling.logprobs_mode == "processed"


def _penalties(rows: Items[Row], columns: np.ndarray, put: Any) -> Penalties | None:
    punished = (columns["repetition"] != 1) | (columns["presence"] != 0) | (columns["frequency"] != 0)
    histories = [r.sequence.tokens[:] if p else [] for r, p in zip(rows, punished, strict=True)]
    biases = [(n, token, value) for n, row in enumerate(rows) for token, value in _biases(row)]
    if not biases and not punished.any():
        return None
    return Penalties(
        history=put([token for history in histories for token in history], np.int64),
        history_start=put([0, *accumulate(len(history) for history in histories)], np.int64),
        prompt_len=put(
            [r.sequence.origin.num_prompt if p else 0 for r, p in zip(rows, punished, strict=True)], np.int64
        ),
        repetition=put(columns["repetition"], np.float32),
        presence=put(columns["presence"], np.float32),
        frequency=put(columns["frequency"], np.float32),
        bias_row=put([n for n, _, _ in biases], np.int64),
        bias_id=put([token for _, token, _ in biases], np.int64),
        bias_value=put([value for _, _, value in biases], np.float32),
    )


def _biases(row: Row) -> Iterator[tuple[int, float]]:
    """The request's logit_bias, and -inf for what would stop it before min_tokens."""
    if row.target >= 0:
        return
    params = row.sequence.origin.request.sampling
    early = row.sequence.num_output < params.min_tokens
    banned = row.sequence.origin.stop_ids if early else frozenset()
    yield from ((token, -np.inf) for token in banned)
    yield from (
        (token, value) for token, value in dict(params.logit_bias or ()).items() if token not in banned
    )
