"""One step of the engine: a function from (params, state, batch) to (state, tokens)."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import replace
from functools import partial
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from torch.fx.experimental import _config as fx_config
from torch.utils import _pytree as pytree

from folo.config import COMPILE_MODES, CompileMode
from folo.errors import ConfigError, ParamsMismatchError, RequestError, StaleBatchError
from folo.graph import CudaGraphs, Graphs, Kind, Recorder, bucketed, kind_of
from folo.inputs import ROWS_PER_TILE, Inputs, Rows
from folo.model import device
from folo.model.forward import layer_in_heap
from folo.model.params import Params
from folo.sampling import Context
from folo.state.batch import Batch, Row, RowPlan
from folo.state.bind import Bound, bind
from folo.state.engine import EngineState
from folo.state.evolve import evolve
from folo.state.flight import Flight, landed
from folo.state.layout import inputs_of
from folo.state.sequence import Sequence
from folo.tokens import Tokens, results_of, tokens_of
from folo.transfer import download, upload


def step(params: Params, state: EngineState, batch: Batch) -> tuple[EngineState, Tokens]:
    """Compute the batch, sample, and return the state after it. `state` stays as it was.

    Raises:
        StaleBatchError: `batch` was scheduled for another state.
        ParamsMismatchError: `state` belongs to other parameters.
        RequestError: a request's logits allow no token, or its logits processor returned no logits.
        OutOfBlocksError: states that are still held pin the blocks that the step needs.
    """
    return _step(partial(_run, layer_in_heap), True, params, state, batch)


Step = Callable[[Params, EngineState, Batch], tuple[EngineState, Tokens]]
_EAGER: Step = step


def compile(step: Step = step, mode: CompileMode = "auto") -> Step:
    """`folo.step` with its device function compiled: the same function, bit for bit.

    mode: "eager" is `step` itself.
        "inductor" compiles one decoder layer with torch.compile, without a graph break, and calls it
        for each; shapes are dynamic.
        "cudagraph" (CUDA only) replays graphs of decode steps, captured at first use for padded
        batches of 1, 2, 4, 8, 16, 32, 48, ... sequences, and runs the rest compiled. A step returns as
        soon as it is launched, with its tokens still on the device; decodes of the next step do not wait
        for them. Whatever needs the tokens does: `outputs`, `collect`, `save`, `fork`,
        `has_unfinished`, ... A request counts as ended only once its last token is known. If a step finds
        that no token is allowed, the next `schedule` raises its RequestError; all other functions then
        treat the state as the one from before that step.
        "auto" is the fastest: "cudagraph" on CUDA, "eager" on a CPU (`folo bench latency --mode`), where
        the ops leave a compiler nothing to fuse and its guards take time in each layer.

    Raises:
        ConfigError: an unknown mode; `step` is not `folo.step`; or, when stepping, "cudagraph" with params
            that are not on CUDA.
    """
    if step is not _EAGER:
        raise ConfigError(f"step={step!r}: expected folo.step itself, since its parts are what is compiled")
    if mode not in COMPILE_MODES:
        raise ConfigError(f"mode={mode!r}: expected one of {COMPILE_MODES}")
    if mode == "eager" or (mode == "auto" and not torch.cuda.is_available()):
        return step
    layer = torch.compile(layer_in_heap, fullgraph=True, dynamic=True)
    if mode == "inductor":
        return partial(_step, _compiled(partial(_run, layer)), True)
    graphed = replayed(CudaGraphs(), layer)

    def cudagraph(params: Params, state: EngineState, batch: Batch) -> tuple[EngineState, Tokens]:
        if params.device.type == "cuda":
            return graphed(params, state, batch)
        if mode == "auto":
            return step(params, state, batch)
        raise ConfigError(f'mode="cudagraph" needs params on a CUDA device, these are on {params.device}')

    return cudagraph


def launched(layer_function: Any) -> Step:
    """`folo.step` that returns when it is launched, its tokens on the device; see `compile`."""
    return partial(_step, _compiled(partial(_run, layer_function)), False)


def replayed(recorder: Recorder, layer_function: Any) -> Step:
    """`launched`, over graphs that `recorder` captures."""
    return partial(_step, _compiled(_graphed(Graphs(recorder, layer_function), layer_function)), False)


Run = Callable[[Params, Bound, Inputs], list[device.Sampled]]
"""The device function of a step, given its inputs on the host: the ids and scores of each tile of rows."""


@torch.inference_mode(False)  # what outlives a step must not become an inference tensor
@torch.no_grad()
def _step(
    run: Run, wait: bool, params: Params, state: EngineState, batch: Batch
) -> tuple[EngineState, Tokens]:
    if not isinstance(batch, Batch):
        why = ": schedule(state) found nothing left to run" if batch is None else ""
        raise StaleBatchError(f"the batch is {batch!r}, not one that schedule(state) made{why}")
    if batch.origin is not state:
        raise StaleBatchError("this batch was scheduled for another state; call schedule(state) on this one")
    if state.params is not params:
        raise ParamsMismatchError(
            "this state belongs to other parameters: its K and V come from them; step it with those"
        )
    # Events are recorded, and graphs captured, on the current device, which need not be that of the state.
    with torch.cuda.device_of(state.heap.k):
        bound, inputs = prologue(batch)
        return epilogue(bound, run(params, bound, inputs), wait)


def prologue(batch: Batch) -> tuple[Bound, Inputs]:
    """The host's part before the device function. Raises OutOfBlocksError as `step` does."""
    bound = bind(batch)
    return bound, inputs_of(bound)


def epilogue(bound: Bound, sampled: list[device.Sampled], wait: bool = True) -> tuple[EngineState, Tokens]:
    """The host's part after the device function, given what it made of each tile of rows.

    wait: for the tokens; if not, the state holds the step in flight. Raises RequestError as `step` does.
    """
    batch, rows, copied = bound.batch, bound.batch.rows, download(sampled)
    # `origin` may hold a flight of its own, which the new state would keep alive.
    bound = replace(bound, batch=evolve(batch, origin=batch.state, behind=None))
    ids = (
        torch.cat([tile.ids for tile in sampled])
        if sampled
        else torch.empty(0, dtype=torch.int64, device="cpu")
    )
    flight = Flight(bound, ids, list(range(len(ids))), partial(results_of, copied, rows))
    before = batch.state
    if batch.behind is not None:  # only now, with this step under way, does anyone wait for the one before
        before = landed(batch.origin)
        flight = flight.seen_from(before)
    after = evolve(before, flight=flight) if flight.bound.batch.scheduled else before
    return landed(after) if wait else after, tokens_of(flight, sampled)


def _graphed(graphs: Graphs, layer_function: Any) -> Run:
    def run(params: Params, bound: Bound, inputs: Inputs) -> list[device.Sampled]:
        batch, state = bound.batch, bound.batch.state
        widest = -(-state.max_model_len // state.cache.block_size)
        if not batch.decoding or state.attention == "reference":  # it reads lengths on the host: no graph
            return _run(layer_function, params, bound, bucketed(inputs, widest))
        kind = kind_of(inputs, widest)
        if any(has_processors(sequence) for sequence in batch.rows.sequences):
            kind = Kind(kind.width, sampling=False)
        previous = None if batch.behind is None else batch.behind.ids
        output = graphs.decode(params, state, inputs, previous, kind)
        if not kind.sampling:
            return _sampled(params, output, upload(inputs.rows, params.device), batch.rows)
        return [device.Sampled(ids) for ids in output.split(ROWS_PER_TILE)]

    return run


def _compiled(run: Run) -> Run:
    marked = WeakSet[Params]()

    def limited(params: Params, bound: Bound, inputs: Inputs) -> list[device.Sampled]:
        if params not in marked:  # with symbolic sizes of weights, compilation takes twice as long
            for weight in pytree.tree_leaves(params):
                torch._dynamo.mark_static(weight)
            marked.add(params)
        # Sizes of 0 and 1 are hardly ever cases of their own, and equal sizes are not taken for one. Ints are
        # constants of the configuration. What is compiled for the models of a process shares the limit.
        symbols = fx_config.patch(use_duck_shape=False, backed_size_oblivious=True)  # pyright: ignore[reportAttributeAccessIssue]
        with torch._dynamo.config.patch(recompile_limit=64, specialize_int=True), symbols:
            return run(params, bound, inputs)

    return limited


def _run(layer_function: Any, params: Params, bound: Bound, inputs: Inputs) -> list[device.Sampled]:
    batch, state = bound.batch, bound.batch.state
    inputs = upload(inputs, params.device)
    if batch.behind is not None:
        device.resolve(inputs, batch.behind.ids)
    hidden = device.run(params, state.heap.k, state.heap.v, inputs, state.attention, layer_function)
    return _sampled(params, hidden, inputs.rows, batch.rows)


def _sampled(params: Params, hidden: Tensor, tiles: Items[Rows], rows: RowPlan) -> list[device.Sampled]:
    # No comprehension: before Python 3.12 it is a closure, which keeps blocks though a traceback is cleared.
    # And no starmap, which would take a processor's StopIteration for the end of the tiles.
    sampled: list[device.Sampled] = []
    for tile, numbers in zip(device.tiles_of(hidden, tiles), rows.tiles, strict=True):
        sampled.append(_sample(params, rows, tile, numbers))
    return sampled


def _sample(params: Params, rows: RowPlan, tiled: tuple[Tensor, Rows], numbers: range) -> device.Sampled:
    hidden, tile = tiled
    raw, processed = device.row_logits(params, hidden, tile)
    own = [place for place, n in enumerate(numbers) if has_processors(rows.sequences[n])]
    processed = processed.clone() if own else processed
    for place in own:
        if not (row := rows[numbers[place]]).of_prompt:
            processed[place] = _transformed(processed[place].clone(), row)  # it may keep the clone
    return device.sample(raw, processed, tile)


def has_processors(sequence: Sequence) -> bool:
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
        if not isinstance(logits, Tensor) or logits.shape != shape or not logits.is_floating_point():
            known = isinstance(logits, Tensor)
            got = f"{logits.dtype} {tuple(logits.shape)}" if known else type(logits).__name__
            raise RequestError(
                f"request {request.id!r}: the logits processor {transform!r} returned {got}; it has to "
                f"return floating-point logits of shape {tuple(shape)}"
            )
    return logits
