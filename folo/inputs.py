"""The arrays that cross from the host to the device for one step: all that the device function reads."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor
from torch.utils import _pytree as pytree

from folo.sampling import SamplingParams

# A sequence's sampling parameters, one C struct: packed once when the request is submitted, joined
# to columns at every step.
SAMPLING = np.dtype(
    [
        ("temperature", "<f4"),
        ("min_p", "<f4"),
        ("top_p", "<f4"),
        ("repetition", "<f4"),
        ("presence", "<f4"),
        ("frequency", "<f4"),
        ("top_k", "<i8"),
        ("seed", "<i8"),
        ("sample_index", "<i8"),
        ("num_logprobs", "<i8"),  # of output tokens
        ("processed", "?"),  # whether those are of the processed logits
        ("punished", "?"),  # by repetition, presence or frequency
        ("biased", "?"),  # by logit_bias or min_tokens
        ("warped", "?"),  # by temperature, min-p, top-k or top-p
        ("truncated", "?"),  # by top-k or top-p, which sort
    ]
)
SAMPLE = -1  # the target of a row that a token is sampled from
UNRESOLVED = -1  # a token that was sampled, and that only the device knows yet
NO_LOGPROBS = -1  # a row's num_logprobs if it wants none, not even its own token's


def output_logprobs(params: SamplingParams) -> int:
    """How many of the likeliest tokens to report besides an output token's own, or NO_LOGPROBS."""
    default = NO_LOGPROBS if params.best_of is None else 0  # best_of compares sums of them
    return default if params.logprobs is None else params.logprobs


def pack_sampling(params: SamplingParams, seed: int, sample_index: int) -> bytes:
    """One SAMPLING as bytes."""
    row = np.zeros((), SAMPLING)
    row["temperature"], row["top_k"] = params.temperature, params.top_k
    row["min_p"], row["top_p"] = params.min_p, params.top_p
    row["repetition"] = params.repetition_penalty
    row["presence"], row["frequency"] = params.presence_penalty, params.frequency_penalty
    row["seed"] = seed - 2**64 if seed >= 2**63 else seed  # the same bits, signed: torch has no uint64 ops
    row["sample_index"] = sample_index
    row["num_logprobs"] = output_logprobs(params)
    row["processed"] = params.logprobs_mode == "processed"
    row["punished"] = params.penalizes
    row["biased"] = bool(params.logit_bias) or params.min_tokens > 0
    row["truncated"] = params.top_k > 0 or params.top_p < 1
    row["warped"] = row["truncated"] or params.min_p > 0 or params.temperature not in (0, 1)
    return row.tobytes()


ROWS_PER_TILE = 64  # bounds the memory of float32 logits: 64 rows of the vocabulary at a time


@dataclass(frozen=True)
class Penalties:
    """Penalties and biases of a tile's R rows, with H history tokens and B biases: see `ops.penalize`."""

    history: Tensor  # int64[H]
    history_start: Tensor  # int64[R + 1]
    prompt_len: Tensor  # int64[R]
    repetition: Tensor  # float32[R]
    presence: Tensor  # float32[R]
    frequency: Tensor  # float32[R]
    bias_row: Tensor  # int64[B]
    bias_id: Tensor  # int64[B]
    bias_value: Tensor  # float32[B]


@dataclass(frozen=True)
class Rows:
    """A tile of R rows, at most ROWS_PER_TILE, of which logits are wanted: to sample from, or to score.

    What no row of the tile asks for is left out (None, or NO_LOGPROBS): the ops are exact
    no-ops for rows that do not ask, so leaving one out changes no bit.
    """

    target: Tensor  # int64[R], the token to score, or SAMPLE
    temperature: Tensor  # float32[R]
    min_p: Tensor  # float32[R]
    top_k: Tensor  # int64[R]
    top_p: Tensor  # float32[R]
    seed: Tensor  # int64[R], bits of the unsigned seed
    position: Tensor  # int64[R], absolute index of the token to sample
    sample_index: Tensor  # int64[R]
    processed: Tensor  # bool[R], logprobs of the processed logits, not the raw ones
    penalties: Penalties | None
    warped: bool
    truncated: bool  # by top-k or top-p, which sort
    num_logprobs: int


@dataclass(frozen=True)
class Inputs:
    """T tokens of S sequences, in order; B is the longest block table. Padding: `folo.padding`."""

    token_ids: Tensor  # int64[T]
    positions: Tensor  # int64[T]
    slots: Tensor  # int64[T], block * block_size + offset; -1 for padding, which is written nowhere
    query_start: Tensor  # int32[S + 1]
    seq_lens: Tensor  # int32[S], context length including this step's tokens
    block_tables: Tensor  # int32[S, B], 0 where a table is shorter
    copy_source: Tensor  # int64[C], blocks to copy before anything is written
    copy_target: Tensor  # int64[C]
    logits_rows: Tensor | None  # int64[rows of all tiles, or 1], whose logits are wanted; None: all T
    rows: tuple[Rows, ...]  # what for, in tiles
    source: Tensor | None = None  # int64[T], the row of `Flight.ids` whose token this is, or -1 if known


for _arrays in (Penalties, Rows, Inputs):
    pytree.register_dataclass(_arrays)
