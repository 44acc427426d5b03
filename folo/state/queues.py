"""The order of the queues, and where a sequence goes when it ends."""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable

from folo.state.engine import EngineState
from folo.state.evolve import evolve
from folo.state.sequence import Sequence


def queued(state: EngineState, queue: Iterable[Sequence], new: Iterable[Sequence]) -> tuple[Sequence, ...]:
    """`queue` with the `new` sequences inserted in order of `EngineState.rank`."""
    if not (new := tuple(new)):  # as in nearly all decode steps, and the queue may be long
        return tuple(queue)
    merged = list(queue)
    for sequence in new:
        insort(merged, sequence, key=state.rank)
    return tuple(merged)


def settle(state: EngineState, ended: Iterable[Sequence]) -> EngineState:
    """Move ended sequences to their requests, and requests whose sequences have all ended to `finished`."""
    requests, finished = state.requests, state.finished
    for sequence in ended:
        held = requests[sequence.id]
        held = evolve(held, ended=(*held.ended, sequence))
        if held.finished:
            requests, finished = requests.delete(sequence.id), finished.set(sequence.id, held)
        else:
            requests = requests.set(sequence.id, held)
    return evolve(state, requests=requests, finished=finished)
