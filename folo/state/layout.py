"""The host prologue of a step, second half: lay out the arrays that the device function reads."""

from __future__ import annotations

from collections.abc import Sequence as Items
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from folo.inputs import ROWS_PER_TILE, SAMPLING, Inputs, Penalties, Rows, pack_sampling
from folo.sampling import SamplingParams
from folo.state.bind import Bound
from folo.state.log import gather
from folo.state.schedule import Scheduled
from folo.state.sequence import Sequence

# Sampling parameters that change nothing, for rows that only score a prompt token.
_NEUTRAL = pack_sampling(SamplingParams(), seed=0, sample_index=0)
_SAMPLE = -1  # the target of a row that is sampled


class Row(NamedTuple):
    """One row of logits: which hidden state it comes from and what it is for.

    position: of the token that is sampled or scored. target: the token to score, or -1 to sample.
    """

    number: int  # of the scheduled sequence
    sequence: Sequence
    hidden: int
    position: int
    target: int

    @property
    def of_prompt(self) -> bool:
        """Whether it scores a prompt token, by the model alone: no sampling parameter has a say."""
        return self.position < self.sequence.origin.num_prompt


def rows_of(scheduled: Items[Scheduled]) -> list[Row]:
    """The rows of logits that a step computes, in the order of its tokens."""
    rows: list[Row] = []
    first = 0
    for number, (sequence, start, end, *_) in enumerate(scheduled):
        if sequence.origin.scored_to > sequence.origin.scored_from:
            for position in _scored(sequence, start, end):
                target = sequence.tokens[position]
                rows.append(Row(number, sequence, first + position - 1 - start, position, target))
        first += end - start
        if end == sequence.tokens.length:
            rows.append(Row(number, sequence, first - 1, end, _SAMPLE))
    return rows


def _scored(sequence: Sequence, start: int, end: int) -> range:
    """The tokens whose logprobs this chunk gives, and no earlier step has given."""
    unscored = sequence.unscored
    return range(max(unscored.start, start + 1), min(unscored.stop, end + 1))


def tiles_of(rows: list[Row]) -> list[list[Row]]:
    """The rows, at most ROWS_PER_TILE together."""
    return [rows[start : start + ROWS_PER_TILE] for start in range(0, len(rows), ROWS_PER_TILE)]


def inputs_of(bound: Bound, rows: list[Row], device: torch.device) -> Inputs:
    """All arrays of a step, on the device."""
    scheduled, size = bound.batch.scheduled, bound.batch.state.cache.block_size
    starts = np.array([item.start for item in scheduled])
    ends = np.array([item.end for item in scheduled])
    query_start = np.concatenate(([0], np.cumsum(ends - starts)))
    number = np.repeat(np.arange(len(scheduled)), ends - starts)  # which sequence each token is of
    positions = np.arange(query_start[-1]) + (starts - query_start[:-1])[number]
    width = max([len(table.packed) for table in bound.tables])
    packed = b"".join([table.packed.ljust(width, b"\0") for table in bound.tables])
    tables = np.frombuffer(packed, "<i4").reshape(len(scheduled), -1)
    slots = tables[number, positions // size].astype(np.int64) * size + positions % size

    def put(values: Any, dtype: type) -> Tensor:
        return torch.from_numpy(np.array(values, dtype)).to(device)

    return Inputs(
        token_ids=put(_token_ids(scheduled, len(positions)), np.int64),
        positions=put(positions, np.int64),
        slots=put(slots, np.int64),
        query_start=put(query_start, np.int32),
        seq_lens=put(ends, np.int32),
        block_tables=put(tables, np.int32),
        copy_source=put([source.index for source, _ in bound.copies], np.int64),
        copy_target=put([target.index for _, target in bound.copies], np.int64),
        rows=_tiled(rows, put),
    )


def _token_ids(scheduled: Items[Scheduled], count: int) -> list[int]:
    if count == len(scheduled):
        return gather([item.sequence.tokens for item in scheduled], [item.start for item in scheduled])
    return [token for item in scheduled for token in item.sequence.tokens[item.start : item.end]]


def _tiled(rows: list[Row], put: Any) -> tuple[Rows, ...]:
    packed = [_NEUTRAL if r.of_prompt else r.sequence.origin.packed_sampling for r in rows]
    columns = np.frombuffer(b"".join(packed), SAMPLING)
    target = np.array([r.target for r in rows], np.int64)
    num_logprobs = columns["num_logprobs"].copy()
    for n in np.flatnonzero(target >= 0).tolist():
        if rows[n].of_prompt:
            num_logprobs[n] = rows[n].sequence.origin.request.sampling.prompt_logprobs
    scaled = (columns["temperature"] != 0) & (columns["temperature"] != 1)
    truncated = (columns["top_k"] > 0) | (columns["top_p"] < 1)
    warped = scaled | truncated | (columns["min_p"] > 0)
    names = ("temperature", "min_p", "top_k", "top_p", "seed", "sample_index", "processed")
    whole = {name: put(columns[name], columns[name].dtype.type) for name in names}
    whole |= {
        "index": put([r.hidden for r in rows], np.int64),
        "target": put(target, np.int64),
        "position": put([r.position for r in rows], np.int64),
    }
    tiles = (slice(start, start + ROWS_PER_TILE) for start in range(0, len(rows), ROWS_PER_TILE))
    return tuple(
        Rows(
            **{name: column[tile] for name, column in whole.items()},
            penalties=_penalties(rows[tile], columns[tile], put),
            warped=bool(warped[tile].any()),
            truncated=bool(truncated[tile].any()),
            num_logprobs=int(num_logprobs[tile].max()),
        )
        for tile in tiles
    )


def _penalties(rows: Items[Row], columns: np.ndarray, put: Any) -> Penalties | None:
    punished = (columns["repetition"] != 1) | (columns["presence"] != 0) | (columns["frequency"] != 0)
    if not (punished.any() or columns["biased"].any()):
        return None
    histories = [r.sequence.tokens[: r.position] if p else [] for r, p in zip(rows, punished, strict=True)]
    prompts = [r.sequence.origin.num_prompt if p else 0 for r, p in zip(rows, punished, strict=True)]
    biased = [(n, rows[n]) for n in np.flatnonzero(columns["biased"]).tolist()]
    biases = [(n, token, value) for n, row in biased for token, value in _biases(row)]
    return Penalties(
        history=put([token for history in histories for token in history], np.int64),
        history_start=put([0, *accumulate(len(history) for history in histories)], np.int64),
        prompt_len=put(prompts, np.int64),
        repetition=put(columns["repetition"], np.float32),
        presence=put(columns["presence"], np.float32),
        frequency=put(columns["frequency"], np.float32),
        bias_row=put([n for n, _, _ in biases], np.int64),
        bias_id=put([token for _, token, _ in biases], np.int64),
        bias_value=put([value for _, _, value in biases], np.float32),
    )


def _biases(row: Row) -> list[tuple[int, float]]:
    """The request's logit_bias, and -inf for what would stop it before min_tokens."""
    origin = row.sequence.origin
    params = origin.request.sampling
    early = row.position - origin.num_prompt < params.min_tokens
    banned = origin.stop_ids if early else frozenset()
    own = dict(params.logit_bias or ())
    return [
        *((token, -np.inf) for token in banned),
        *((token, value) for token, value in own.items() if token not in banned),
    ]
