"""The device function of a step: tensors in, tensors out; nothing here knows of states or requests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from folo import ops
from folo.inputs import NO_LOGPROBS, ROWS_PER_TILE, Inputs, Penalties, Rows
from folo.model.forward import hidden_in_heap, layer_in_heap, logits
from folo.model.params import Params
from folo.ops.sampler import PURPOSE_DRAW

_PENALTIES = [field.name for field in fields(Penalties)]  # `vars` is beyond torch 2.11's compiler


@dataclass(frozen=True)
class Sampled:
    """ids int64 `[R]`, and what `folo.ops.pick_logprobs` tells of them, if any row asked."""

    ids: Tensor
    scores: tuple[Tensor, Tensor, Tensor, Tensor] | None = None


pytree.register_dataclass(Sampled)


def run(
    params: Params,
    k: Tensor,
    v: Tensor,
    inputs: Inputs,
    attention: str,
    layer_function: Any = layer_in_heap,
) -> Tensor:
    """Write K and V of the step's tokens into the heap (in place) -> the wanted hidden states `[R, D]`."""
    if inputs.copy_source.numel():
        ops.copy_blocks(k, v, inputs.copy_source, inputs.copy_target)
    return hidden_in_heap(params, k, v, inputs, attention, layer_function)


def resolve(inputs: Inputs, previous: Tensor) -> None:
    """Fill in the token ids that only the device knows: rows `inputs.source` of `previous`, int64 `[P]`."""
    assert inputs.source is not None
    # A row that found no token is refused when it lands; until then any token will do.
    found = previous[inputs.source.clamp(min=0)].clamp(min=0)
    inputs.token_ids.copy_(torch.where(inputs.source >= 0, found, inputs.token_ids))


def tiles_of(hidden: Tensor, tiles: Sequence[Rows]) -> list[tuple[Tensor, Rows]]:
    """Each tile of rows with its hidden states; padding at the end of `hidden` is left out."""
    return [(hidden[n * ROWS_PER_TILE :][: tile.target.shape[0]], tile) for n, tile in enumerate(tiles)]


def row_logits(params: Params, hidden: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
    """hidden `[R, D]` -> the model's logits of the rows and the processed ones, float32 `[R, V]` each."""
    raw = logits(params, hidden, ops)
    if raw.dtype == torch.float64:  # of float64 params: sampling is float32 arithmetic
        raw = raw.float()
    processed = raw
    if (p := rows.penalties) is not None:
        processed = ops.penalize(processed, **{name: getattr(p, name) for name in _PENALTIES})
    if rows.warped:
        processed = ops.warp(processed, rows.temperature, rows.min_p, rows.top_k, rows.top_p, rows.truncated)
    return raw, processed


def sample(raw: Tensor, processed: Tensor, rows: Rows) -> Sampled:
    """Draw a token from each row's processed logits, or take its target, and score it."""
    u = ops.philox(rows.seed, rows.position, rows.sample_index, PURPOSE_DRAW)
    drawn = ops.draw(processed, rows.temperature == 0, u)
    ids = torch.where(rows.target >= 0, rows.target, drawn)
    if rows.num_logprobs == NO_LOGPROBS:
        return Sampled(ids)
    scored = torch.where(rows.processed[:, None], processed, raw)
    # A row that allows no token (id NO_TOKEN) has none to score; `results_of` raises for it.
    return Sampled(ids, ops.pick_logprobs(scored, ids.clamp(min=0), rows.num_logprobs))
