"""What a step's rows came to: its tokens, and what the state learns of them."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from folo.errors import RequestError
from folo.inputs import NO_LOGPROBS, output_logprobs
from folo.model.device import Sampled
from folo.ops.sampler import NO_TOKEN
from folo.state.advance import Results
from folo.state.batch import Row, RowPlan
from folo.state.flight import Flight
from folo.state.sequence import TokenLogprobs
from folo.transfer import upload


@dataclass(frozen=True)
class Tokens:
    """The tokens that a step sampled, R of them.

    ids int64 `[R]`; logprobs float32 `[R]`, NaN where a request did not ask, None if none did; and
    for each the id of its request and its sample index. The tensors are on the host, or on the device
    if the step may still be in flight (`folo.compile`).
    """

    ids: Tensor
    logprobs: Tensor | None
    request_ids: tuple[str, ...]
    sample_indices: tuple[int, ...]


def results_of(sampled: Items[Sampled], rows: RowPlan) -> Results:
    """What each row came to, from the host's copy. Raises RequestError for a row that found no token."""
    ids: list[int] = []
    scores: list[TokenLogprobs | None] = []
    for tile, numbers in zip(sampled, rows.tiles, strict=True):
        ids += tile.ids.tolist()
        if tile.logprob is None or tile.rank is None or tile.top_ids is None or tile.top_logprobs is None:
            scores += [None] * len(numbers)
            continue
        columns = (
            tile.logprob.tolist(),
            tile.rank.tolist(),
            tile.top_ids.tolist(),
            tile.top_logprobs.tolist(),
        )
        for n, logprob, rank, top_ids, top_logprobs in zip(numbers, *columns, strict=True):
            k = _num_logprobs(rows[n])
            score = TokenLogprobs(logprob, rank, tuple(top_ids[:k]), tuple(top_logprobs[:k]))
            scores.append(None if k == NO_LOGPROBS else score)
    _refuse_unsampled(rows, ids)
    return Results(ids, scores)


def _num_logprobs(row: Row) -> int:
    params = row.sequence.origin.request.sampling
    return params.prompt_logprobs or 0 if row.of_prompt else output_logprobs(params)


def _refuse_unsampled(rows: RowPlan, ids: list[int]) -> None:
    if NO_TOKEN in ids:
        row = rows[ids.index(NO_TOKEN)]
        raise RequestError(
            f"request {row.sequence.id!r}: no token can be sampled at position {row.position}: its "
            f"logits hold NaN or inf, or every token is banned; abort it, and the others go on"
        )


def tokens_of(rows: RowPlan, results: Results) -> Tokens:
    """The sampled ones among the results."""
    ids, scores = results.ids, results.scores
    origins = [sequence.origin for sequence in rows.sequences]
    if max(rows.targets, default=-1) >= 0:  # some rows only score a token
        at = [n for n, target in enumerate(rows.targets) if target < 0]
        ids, scores, origins = [ids[n] for n in at], [scores[n] for n in at], [origins[n] for n in at]
    logprobs = None
    if any(scores):
        values = [float("nan") if score is None else score.logprob for score in scores]
        logprobs = torch.tensor(values, dtype=torch.float32)
    return Tokens(
        ids=torch.from_numpy(np.array(ids, np.int64)),  # a third of torch.tensor's time
        logprobs=logprobs,
        request_ids=tuple([origin.request.id for origin in origins]),
        sample_indices=tuple([origin.sample for origin in origins]),
    )


def tokens_in_flight(flight: Flight, sampled: Items[Sampled]) -> Tokens:
    """The tokens of a launched step, without waiting for them."""
    rows, ids = flight.bound.batch.rows, flight.ids
    at = [n for n, target in enumerate(rows.targets) if target < 0]
    origins = [rows.sequences[n].origin for n in at]
    places = [flight.places[n] for n in at]
    index = None if len(places) == len(ids) else upload(torch.tensor(places, dtype=torch.int64), ids.device)
    asked = [_num_logprobs(rows[n]) != NO_LOGPROBS for n in at]
    logprobs = None
    if any(asked):
        none = (torch.full(tile.ids.shape, torch.nan, device=ids.device) for tile in sampled)
        pairs = zip(sampled, none, strict=True)
        logprobs = torch.cat([nan if tile.logprob is None else tile.logprob for tile, nan in pairs])
        logprobs = logprobs if index is None else logprobs[index]
        logprobs = torch.where(upload(torch.tensor(asked), ids.device), logprobs, torch.nan)
    return Tokens(
        ids=ids if index is None else ids[index],
        logprobs=logprobs,
        request_ids=tuple([origin.request.id for origin in origins]),
        sample_indices=tuple([origin.sample for origin in origins]),
    )
