"""Steps, recorded in plain numbers: what was computed for whom, when, and what the state held then."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from typing import Any

from folo.bench.workloads import Arrival
from folo.model.params import Params
from folo.state.batch import Batch
from folo.state.engine import EngineState
from folo.state.lifecycle import submit
from folo.state.schedule import schedule
from folo.state.sequence import Sequence
from folo.state.stats import Stats, stats
from folo.step import step as default_step

Step = Callable[[Params, EngineState, Batch], tuple[EngineState, Any]]


@dataclass(frozen=True, slots=True)
class Chunk:
    """A sequence's part in a step: its tokens from `start` up to `end` were computed.

    track: the request's id, with the sample if it has several. decode: it is one output token, and all
    before it are computed; anything else is prefill. cached: tokens before `start` that were there when
    this step admitted the sequence; 0 if it did not. sampled: a token came out.
    """

    track: str
    start: int
    end: int
    decode: bool
    admitted: bool
    cached: int
    sampled: bool

    @property
    def num_tokens(self) -> int:
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One step in plain numbers and strings: holding it pins no blocks.

    begin, end: seconds. waiting: tracks for which nothing was computed: not admitted yet, or running
    without a block or budget to go on. preempted: tracks sent back to the queue. stats: of the state after.
    """

    begin: float
    end: float
    chunks: tuple[Chunk, ...]
    waiting: tuple[str, ...]
    preempted: tuple[str, ...]
    stats: Stats

    def num_tokens(self, decode: bool) -> int:
        return sum(chunk.num_tokens for chunk in self.chunks if chunk.decode == decode)


def record(batch: Batch, after: EngineState, begin: float, end: float) -> StepRecord:
    """What this batch did; `after` is the state that the step returned."""
    before = batch.state

    def track(sequence: Sequence) -> str:
        several = before.held(sequence.id).num_samples > 1
        return f"{sequence.id} #{sequence.origin.sample}" if several else sequence.id

    chunks = tuple(
        Chunk(
            track=track(s := item.sequence),
            start=item.start,
            end=item.end,
            decode=not item.admitted and s.remaining == 1 and item.start >= s.origin.num_prompt,
            admitted=item.admitted,
            cached=item.start if item.admitted else 0,
            sampled=item.end == s.tokens.length,
        )
        for item in batch.scheduled
    )
    moved = {id(item.sequence) for item in batch.scheduled} | {id(s) for s in batch.preempted}
    return StepRecord(
        begin=begin,
        end=end,
        chunks=chunks,
        waiting=tuple(track(s) for s in (*before.running, *before.waiting) if id(s) not in moved),
        preempted=tuple(track(s) for s in batch.preempted),
        stats=stats(after),
    )


def recorded(
    params: Params,
    state: EngineState,
    step: Step = default_step,
    arrivals: Iterable[Arrival] = (),
    each: Callable[[StepRecord], object] = lambda record: None,
) -> tuple[EngineState, list[StepRecord]]:
    """Step a state to the end, submitting `arrivals` (in the order of their steps) on the way.

    A step's time is that of `schedule` and `step` together. each: called with every record.
    """
    records: list[StepRecord] = []
    coming = deque(arrivals)
    while True:
        while coming and coming[0].step <= len(records):
            state = submit(state, coming.popleft().request)
        begin = time.perf_counter()
        batch = schedule(state)
        if batch is None:
            if not coming:
                return state, records
            state = submit(state, coming.popleft().request)  # nothing else to do until then
            continue
        state, _ = step(params, state, batch)
        records.append(record(batch, state, begin, time.perf_counter()))
        each(records[-1])


@dataclass(slots=True)
class Span:
    """What a track did from step `first` up to step `stop`: "wait", "prefill", "decode" or "preempted"."""

    kind: str
    first: int
    stop: int
    args: dict[str, int | bool] = field(default_factory=dict)

    @property
    def idle(self) -> bool:
        return self.kind in ("wait", "preempted")


def lanes(records: Items[StepRecord]) -> dict[str, list[Span]]:
    """The spans of each track, in order, by track in the order of appearance; none overlaps the next.

    Each prefill chunk is a span; decode steps in a row are one; "preempted" lasts until re-admission.
    """
    found: dict[str, list[Span]] = {}
    again: set[str] = set()  # tracks that were preempted, and do not decode again yet
    for number, step in enumerate(records):
        for chunk in step.chunks:
            found.setdefault(chunk.track, [])
        for track in step.preempted:
            found.setdefault(track, []).append(Span("preempted", number, number + 1))
            again.add(track)
        for track in step.waiting:
            lane = found.setdefault(track, [])
            if lane and lane[-1].idle:
                lane[-1].stop = number + 1
            else:
                lane.append(Span("wait", number, number + 1))
        for chunk in step.chunks:
            lane = found[chunk.track]
            last = lane[-1] if lane else None
            if chunk.decode:
                again.discard(chunk.track)
                if last is not None and last.kind == "decode" and last.stop == number:
                    last.stop = number + 1
                    last.args |= {"tokens": chunk.end - int(last.args["start"]), "end": chunk.end}
                    continue
            args: dict[str, int | bool] = {"tokens": chunk.num_tokens, "start": chunk.start, "end": chunk.end}
            if not chunk.decode:
                args |= {"cached": chunk.cached, "after_preemption": chunk.track in again}
            lane.append(Span("decode" if chunk.decode else "prefill", number, number + 1, args))
    return found
