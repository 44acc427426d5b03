"""One step of the engine: a function from (params, state, batch) to (state, tokens)."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from folo.config import COMPILE_MODES, CompileMode
from folo.errors import ConfigError, ParamsMismatchError, RequestError, StaleBatchError
from folo.inputs import NO_LOGPROBS, Inputs, Rows, output_logprobs
from folo.model import device
from folo.model.forward import layer_in_heap
from folo.model.params import Params
from folo.ops.sampler import NO_TOKEN
from folo.sampling import Context
from folo.state.advance import Results, advance
from folo.state.bind import Bound, bind
from folo.state.engine import EngineState
from folo.state.layout import Row, RowPlan, inputs_of, rows_of
from folo.state.schedule import Batch
from folo.state.sequence import Sequence, TokenLogprobs


@dataclass(frozen=True)
class Tokens:
    """The tokens that a step sampled, R of them.

    ids int64 `[R]`; logprobs float32 `[R]`, NaN where a request did not ask, None if none did; and
    for each the id of its request and its sample index.
    """

    ids: Tensor
    logprobs: Tensor | None
    request_ids: tuple[str, ...]
    sample_indices: tuple[int, ...]


def step(params: Params, state: EngineState, batch: Batch) -> tuple[EngineState, Tokens]:
    """Compute the batch, sample, and return the state after it. `state` stays as it was.

    Raises:
        StaleBatchError: `batch` was scheduled for another state.
        ParamsMismatchError: `state` belongs to other parameters.
        RequestError: a request's logits allow no token, or its logits processor returned something else.
        OutOfBlocksError: states that are still held pin the blocks that the step needs.
    """
    return _step(layer_in_heap, params, state, batch)


Step = Callable[[Params, EngineState, Batch], tuple[EngineState, Tokens]]


def compile(step: Step = step, mode: CompileMode = "auto") -> Step:
    """`folo.step` with its device function compiled: the same function, bit for bit.

    mode: "inductor" compiles one decoder layer with torch.compile, without a graph break, and calls
        it for each; shapes are dynamic. "eager" is `step` itself. "auto" is the faster of the two: on a
        CPU that is "eager", by 1.4 times for one request on the default model (`folo bench latency
        --mode`). The ops leave a compiler little to fuse, and its guards cost 0.15 ms a layer.

    Raises:
        ConfigError: an unknown mode.
    """
    if mode not in COMPILE_MODES:
        raise ConfigError(f"mode={mode!r}: expected one of {COMPILE_MODES}")
    if mode in ("auto", "eager"):
        return step
    layer = torch.compile(layer_in_heap, fullgraph=True, dynamic=True)

    def compiled(params: Params, state: EngineState, batch: Batch) -> tuple[EngineState, Tokens]:
        # Sizes of 1 get graphs of their own, and models of one process share the limit.
        with torch._dynamo.config.patch(recompile_limit=64):
            return _step(layer, params, state, batch)

    return compiled


@torch.no_grad()
def _step(
    layer_function: Any, params: Params, state: EngineState, batch: Batch
) -> tuple[EngineState, Tokens]:
    if batch is None:
        raise StaleBatchError("the batch is None: schedule(state) found nothing left to run")
    if batch.state is not state:
        raise StaleBatchError("this batch was scheduled for another state; call schedule(state) on this one")
    if state.params is not params:
        raise ParamsMismatchError(
            "this state belongs to other parameters: its K and V come from them; step it with those"
        )
    prepared = prologue(batch)
    inputs = prepared.inputs
    hidden = device.run(params, state.heap.k, state.heap.v, inputs, layer_function)
    rows = prepared.rows
    tiles = zip(inputs.rows, rows.tiles, strict=True)
    return epilogue(prepared, [_sample(params, hidden, tile, rows, numbers) for tile, numbers in tiles])


@dataclass(frozen=True)
class Prepared:
    """A batch with all that the device function reads, and what its rows of logits are for."""

    bound: Bound
    rows: RowPlan
    inputs: Inputs


def prologue(batch: Batch) -> Prepared:
    """The host's part before the device function. Raises OutOfBlocksError as `step` does."""
    bound, rows = bind(batch), rows_of(batch)
    return Prepared(bound, rows, inputs_of(bound, rows, batch.state.params.device))


def epilogue(prepared: Prepared, sampled: Items[device.Sampled]) -> tuple[EngineState, Tokens]:
    """The host's part after it, given what each tile of rows came to. Raises RequestError as `step` does."""
    rows = prepared.rows
    results = _to_host(sampled, rows)
    _refuse_unsampled(rows, results.ids)
    return advance(prepared.bound, rows, results), _tokens(rows, results)


def _sample(params: Params, hidden: Tensor, tile: Rows, rows: RowPlan, numbers: range) -> device.Sampled:
    raw, processed = device.row_logits(params, hidden, tile)
    own = [(place, rows[n]) for place, n in enumerate(numbers) if _has_processors(rows.sequences[n])]
    own = [(place, row) for place, row in own if not row.of_prompt]
    if own:
        processed = processed.clone()
        for place, row in own:
            processed[place] = _transformed(processed[place], row)
    return device.sample(raw, processed, tile)


def _has_processors(sequence: Sequence) -> bool:
    return bool(sequence.origin.request.sampling.logits_processors)


def _transformed(logits: Tensor, row: Row) -> Tensor:
    """The caller's transforms on one row: outside the device function, since they are any Python."""
    sequence = row.sequence
    request = sequence.origin.request
    origin, prompt = sequence.origin, tuple(request.prompt_token_ids)
    context = Context(
        prompt, tuple(sequence.tokens[origin.num_prompt : row.position]), row.position, origin.stream
    )
    shape = logits.shape
    for transform in request.sampling.logits_processors:
        logits = transform(logits, context)
        if not isinstance(logits, Tensor) or logits.shape != shape:
            got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise RequestError(
                f"request {request.id!r}: the logits processor {transform!r} returned {got}; it has to "
                f"return logits of shape {tuple(shape)}"
            )
    return logits


def _to_host(sampled: Items[device.Sampled], rows: RowPlan) -> Results:
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


def _tokens(rows: RowPlan, results: Results) -> Tokens:
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
