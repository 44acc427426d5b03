"""Short ways to drive the functional API in tests."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable

import folo


def prompt(length: int, seed: int = 0, vocab_size: int = 300) -> list[int]:
    """Random token ids, away from the special ones."""
    return random.Random(seed * 1000 + length).choices(range(3, vocab_size), k=length)


def finish_all(
    params: folo.Params,
    state: folo.EngineState,
    each: Callable[[folo.EngineState], None] = folo.check,
) -> folo.EngineState:
    """Step until nothing is left to run, with `each` called on every state."""
    while (batch := folo.schedule(state)) is not None:
        state, _ = folo.step(params, state, batch)
        each(state)
    return state


def run(
    params: folo.Params,
    requests: Iterable[folo.Request],
    cache: folo.CacheConfig | None = None,
    scheduler: folo.SchedulerConfig | None = None,
    **options: object,
) -> dict[str, folo.RequestOutput]:
    """The outputs of these requests, submitted together to a fresh state."""
    cache = folo.CacheConfig(num_blocks=64) if cache is None else cache
    state = folo.init(params, cache, scheduler, **options)  # pyright: ignore[reportArgumentType]
    for request in requests:
        state = folo.submit(state, request)
    return folo.outputs(finish_all(params, state))
