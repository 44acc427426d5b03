"""A step in flight: launched, and perhaps still running on the device while its state is already in use.

Only the device knows the tokens of such a step. The state that it returns is the one that it was launched
from, with a Flight beside it. Whatever needs the tokens lands the flight first, which waits for them. The
next step does not wait as long as it only decodes: it is planned on the foreseen state, whose new tokens are
UNRESOLVED, and launched; only then does the flight land, and the new step become one of the landed state
(`seen_from`). So the host works on a step while the device works on the one before:

    host     launch 1 | plan 2 on foreseen, launch 2 | land 1 | plan 3 on foreseen, launch 3 | land 2 | ...
    device            [--------- step 1 ---------][--------- step 2 ---------][--------- step 3 ...
    state    s1: flight 1                    s2: tokens of 1, flight 2    s3: tokens of 2, flight 3
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from folo.errors import RequestError
from folo.inputs import UNRESOLVED
from folo.state.advance import Results, advance
from folo.state.batch import Batch, Scheduled
from folo.state.bind import Bound
from folo.state.engine import EngineState, require_state
from folo.state.evolve import evolve
from folo.state.sequence import BlockTable


@dataclass(frozen=True, eq=False)
class Flight:
    """A step that was launched from the state that holds it.

    ids: the token of every row that was launched, int64, on the device (empty, on the host, if none was).
    places: where in `ids` the rows of this flight are; surplus rows have been left out (`seen_from`).
    fetch: waits for the results of all rows that were launched, in the order of `ids`. May be called again.

    Raises:
        RequestError: (fetch) a request's logits allow no token.
    """

    bound: Bound
    ids: Tensor
    places: list[int]
    fetch: Callable[[], Results]

    @property
    def results(self) -> Results:
        """The results of this flight's own rows, for which it waits."""
        found = self.fetch()
        if len(self.places) == len(found.ids):  # all of them, in order
            return found
        return Results([found.ids[n] for n in self.places], [found.scores[n] for n in self.places])

    def seen_from(self, state: EngineState) -> Flight:
        """The flight as a step of `state`, which was only foreseen when it was launched.

        Sequences that have ended with those tokens are surplus: their rows are left out, their new blocks
        given up.
        """
        now = {sequence.key: sequence for sequence in state.running}
        kept = [n for n, item in enumerate(self.bound.batch.scheduled) if item.sequence.key in now]
        pool, tables, scheduled = state.pool, list[BlockTable](), list[Scheduled]()
        for n in kept:
            item, taken = self.bound.batch.scheduled[n], self.bound.tables[n].blocks
            sequence, before = now[item.sequence.key], item.sequence.table.blocks
            table = sequence.table
            if taken is not before:  # one token takes at most one block
                if len(taken) > len(before):
                    pool = pool.take(1)
                else:  # it is a copy of the last one
                    pool, table = pool.part(table.blocks), table.first(len(before) - 1)
                table = table.extended([taken[-1]])
            tables.append(table)
            scheduled.append(item._replace(sequence=sequence))
        batch = Batch(state, tuple(scheduled), (), True, state)
        bound = Bound(batch, tables, pool.evict(), self.bound.copies)
        return Flight(bound, self.ids, [self.places[n] for n in kept], self.fetch)


def landed(state: EngineState) -> EngineState:
    """The state with its flight's tokens, for which this waits; itself if nothing is in flight.

    Raises:
        RequestError: a request's logits allow no token. The state stays as it was.
    """
    require_state(state)
    flight = state.flight
    if flight is None:
        return state
    return advance(evolve(state, flight=None), flight.bound, flight.results)


def landed_or_before(state: EngineState) -> EngineState:
    """`landed`, or, where that raises, the state from before the flight, which can be stepped again.

    Functions that read or change a state use this one, so they see what an eager step that raised would have
    left; `schedule` raises the error.
    """
    try:
        return landed(state)
    except RequestError:
        return evolve(state, flight=None)


def foreseen(state: EngineState) -> EngineState | None:
    """The state after its flight with UNRESOLVED tokens; None without one, or if a plan needs the tokens."""
    require_state(state)
    flight = state.flight
    if flight is None or not flight.bound.batch.decoding:
        return None
    if any(sequence.origin.looks_back for sequence in flight.bound.batch.rows.sequences):
        return None
    count = len(flight.places)
    unknown = Results([UNRESOLVED] * count, [None] * count)
    return advance(evolve(state, flight=None), flight.bound, unknown)
