"""Who runs next: a pure function from a state to a plan for one step of it."""

from __future__ import annotations

from folo.state.engine import EngineState
from folo.state.flight import foreseen, landed
from folo.state.plan import Batch, plan


def schedule(state: EngineState) -> Batch | None:
    """The next step's batch, or None when nothing is left to run. Reads nothing but `state`.

    Every sequence catches up with its tokens under one budget. Those that lack one token go first;
    then prefill chunks of running sequences; then the waiting ones are admitted, in order.

    Behind a step in flight it plans decodes without waiting for that one's tokens: a sequence that they
    end has one row too many in the batch, which counts for nothing.

    Raises:
        RequestError: a step in flight found no token for a request (`folo.step`).
    """
    if (ahead := foreseen(state)) is not None:
        batch = plan(ahead, state, foreseen=True)
        if batch is not None and batch.decoding and not batch.preempted:
            return batch
    return plan(landed(state), state)
