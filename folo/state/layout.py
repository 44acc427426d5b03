"""The host prologue of a step, second half: lay out the arrays that the device function reads."""

from __future__ import annotations

from collections.abc import Sequence as Items
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from folo.inputs import ROWS_PER_TILE, SAMPLING, Inputs, Penalties, Rows, pack_sampling
from folo.sampling import SamplingParams
from folo.state.batch import Batch, Row, RowPlan, Scheduled
from folo.state.bind import Bound
from folo.state.flight import Flight
from folo.state.log import gather

# Sampling parameters that change nothing, for rows that only score a prompt token.
_NEUTRAL = pack_sampling(SamplingParams(), seed=0, sample_index=0)
# The columns of `Rows`, by what they hold.
_KINDS = (
    (np.int64, ("target", "position", "top_k", "seed", "sample_index")),
    (np.float32, ("temperature", "min_p", "top_p")),
    (np.bool_, ("processed",)),
)


def inputs_of(bound: Bound) -> Inputs:
    """All arrays of a step, on the host."""
    scheduled, size = bound.batch.scheduled, bound.batch.state.cache.block_size
    starts = np.array([item.start for item in scheduled])
    ends = np.array([item.end for item in scheduled])
    query_start = np.concatenate(([0], np.cumsum(ends - starts)))
    number = np.repeat(np.arange(len(scheduled)), ends - starts)  # which sequence each token is of
    positions = np.arange(query_start[-1]) + (starts - query_start[:-1])[number]
    packed = [table.packed for table in bound.tables]
    width = max(map(len, packed))
    tables = np.frombuffer(b"".join([row.ljust(width, b"\0") for row in packed]), "<i4")
    tables = tables.reshape(len(scheduled), -1)
    slots = tables[number, positions // size].astype(np.int64) * size + positions % size
    wanted = bound.batch.rows.hidden
    source = None if bound.batch.behind is None else _sources(scheduled, bound.batch.behind)

    return Inputs(
        token_ids=_put(_token_ids(scheduled, len(positions), source), np.int64),
        positions=_put(positions, np.int64),
        slots=_put(slots, np.int64),
        query_start=_put(query_start, np.int32),
        seq_lens=_put(ends, np.int32),
        block_tables=_put(tables, np.int32),
        copy_source=_put([source.index for source, _ in bound.copies], np.int64),
        copy_target=_put([target.index for _, target in bound.copies], np.int64),
        # If none is wanted, one is computed for nothing: a compiler would specialise on an empty index.
        logits_rows=None if len(wanted) == len(positions) else _put(wanted or [0], np.int64),
        rows=_tiled(bound.batch),
        source=None if source is None else _put(source, np.int64),
    )


def _put(values: Any, dtype: type) -> Tensor:
    return torch.from_numpy(np.array(values, dtype))


def _token_ids(scheduled: Items[Scheduled], count: int, source: list[int] | None) -> list[int]:
    if source is not None:  # all decodes; a token that only the device knows is 0 here and filled in there
        pairs = zip(source, scheduled, strict=True)
        return [item.sequence.tokens[item.start] if place < 0 else 0 for place, item in pairs]
    if count == len(scheduled):
        return gather([item.sequence.tokens for item in scheduled], [item.start for item in scheduled])
    return [token for item in scheduled for token in item.sequence.tokens[item.start : item.end]]


def _sources(scheduled: Items[Scheduled], flight: Flight) -> list[int]:
    """For the token of each decode, the row of the flight that it comes from, or -1 if it is known."""
    pairs = zip(flight.bound.batch.rows.sequences, flight.places, strict=True)
    places = {sequence.key: place for sequence, place in pairs}
    return [places.get(item.sequence.key, -1) for item in scheduled]


def _tiled(batch: Batch) -> tuple[Rows, ...]:
    rows = batch.rows
    packed = [sequence.origin.packed_sampling for sequence in rows.sequences]
    of_prompt = [] if batch.decoding else [n for n in range(len(rows)) if rows[n].of_prompt]
    for n in of_prompt:
        packed[n] = _NEUTRAL
    columns = np.frombuffer(bytearray(b"".join(packed)), SAMPLING)
    num_logprobs = columns["num_logprobs"]
    for n in of_prompt:
        num_logprobs[n] = rows.sequences[n].origin.request.sampling.prompt_logprobs
    starts = [tile.start for tile in rows.tiles]
    adjusted = np.logical_or.reduceat(columns["punished"] | columns["biased"], starts)
    warped = np.logical_or.reduceat(columns["warped"], starts)
    truncated = np.logical_or.reduceat(columns["truncated"], starts)
    most = np.maximum.reduceat(num_logprobs, starts)
    planned = {"target": rows.targets, "position": rows.positions}
    split = []  # for each kind, its columns in tiles: one array of a kind crosses to the device
    for dtype, names in _KINDS:
        values = np.empty((len(names), len(rows)), dtype)
        for place, name in enumerate(names):
            values[place] = planned[name] if name in planned else columns[name]
        split.append((names, torch.from_numpy(values).split(ROWS_PER_TILE, dim=1)))
    tiles = []
    for number, tile in enumerate(rows.tiles):
        fields = {}
        for names, parts in split:
            fields.update(zip(names, parts[number].unbind(), strict=True))
        tiles.append(
            Rows(
                **fields,
                penalties=_penalties(rows, tile, columns) if adjusted[number] else None,
                warped=bool(warped[number]),
                truncated=bool(truncated[number]),
                num_logprobs=int(most[number]),
            )
        )
    return tuple(tiles)


def _penalties(rows: RowPlan, tile: range, columns: np.ndarray) -> Penalties:
    punished, own = columns["punished"], columns[tile.start : tile.stop]
    tokens = [rows.sequences[n].tokens[: rows.positions[n]] if punished[n] else [] for n in tile]
    histories = [np.array(history, np.int64) for history in tokens]
    prompts = [rows.sequences[n].origin.num_prompt if punished[n] else 0 for n in tile]
    biased = [(place, rows[n]) for place, n in enumerate(tile) if columns["biased"][n]]
    biases = [(place, token, value) for place, row in biased for token, value in _biases(row)]
    return Penalties(
        history=torch.from_numpy(np.concatenate(histories)),
        history_start=_put([0, *accumulate(len(history) for history in histories)], np.int64),
        prompt_len=_put(prompts, np.int64),
        repetition=_put(own["repetition"], np.float32),
        presence=_put(own["presence"], np.float32),
        frequency=_put(own["frequency"], np.float32),
        bias_row=_put([place for place, _, _ in biases], np.int64),
        bias_id=_put([token for _, token, _ in biases], np.int64),
        bias_value=_put([value for _, _, value in biases], np.float32),
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
