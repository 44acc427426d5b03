"""The results of a step's rows: the tokens that `step` returns, and what the state records of them."""

from __future__ import annotations

from collections.abc import Callable
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


@dataclass(frozen=True, eq=False)
class Tokens:
    """The tokens that a step sampled, R of them.

    ids int64 `[R]`; logprobs float32 `[R]`, NaN where a request did not ask, None if none did; and
    for each the id of its request and its sample index. The tensors are on the device of the params,
    where the step may still be in flight (`folo.compile`); so this is compared by identity.
    """

    ids: Tensor
    logprobs: Tensor | None
    request_ids: tuple[str, ...]
    sample_indices: tuple[int, ...]


def results_of(copied: Callable[[], Items[Sampled]], rows: RowPlan) -> Results:
    """The result of each row, once `copied` has it on the host. Raises RequestError if a row has no token."""
    ids: list[int] = []
    scores: list[TokenLogprobs | None] = []
    for tile, numbers in zip(copied(), rows.tiles, strict=True):
        ids += tile.ids.tolist()
        if tile.scores is None:
            scores += [None] * len(numbers)
            continue
        columns = [column.tolist() for column in tile.scores]
        for n, logprob, rank, top_ids, top_logprobs in zip(numbers, *columns, strict=True):
            k = _num_logprobs(rows[n])
            score = TokenLogprobs(logprob, rank, tuple(top_ids[:k]), tuple(top_logprobs[:k]))
            scores.append(None if k == NO_LOGPROBS else score)
    if NO_TOKEN in ids:
        row = rows[ids.index(NO_TOKEN)]
        raise RequestError(
            f"request {row.sequence.id!r}: no token can be sampled at position {row.position}: its "
            f"logits hold NaN or inf, or every token is banned; abort it, and the others go on"
        )
    return Results(ids, scores)


def _num_logprobs(row: Row) -> int:
    params = row.sequence.origin.request.sampling
    return params.prompt_logprobs or 0 if row.of_prompt else output_logprobs(params)


def tokens_of(flight: Flight, sampled: Items[Sampled]) -> Tokens:
    """The tokens of a launched step, without waiting for them."""
    rows, ids, logprobs = flight.bound.batch.rows, flight.ids, None
    at, asked = rows.sampled, []
    if any(tile.scores is not None for tile in sampled):
        asked = [_num_logprobs(rows[n]) != NO_LOGPROBS for n in at]
    if any(asked):
        none = (torch.full(tile.ids.shape, torch.nan, device=ids.device) for tile in sampled)
        pairs = zip(sampled, none, strict=True)
        logprobs = torch.cat([nan if tile.scores is None else tile.scores[0] for tile, nan in pairs])
    if len(at) < len(ids):
        index = upload(torch.from_numpy(np.array([flight.places[n] for n in at], np.int64)), ids.device)
        ids, logprobs = ids[index], None if logprobs is None else logprobs[index]
    if logprobs is not None:
        logprobs = torch.where(upload(torch.from_numpy(np.array(asked)), ids.device), logprobs, torch.nan)
    origins = [rows.sequences[n].origin for n in at]
    requests, samples = [origin.request.id for origin in origins], [origin.sample for origin in origins]
    return Tokens(ids, logprobs, tuple(requests), tuple(samples))
