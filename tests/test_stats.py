"""`folo.stats`: numbers that can be checked by hand."""

from __future__ import annotations

import pytest
from engine import finish_all, prompt

import folo


def test_an_empty_state_has_nothing_but_free_blocks(tiny: folo.Params) -> None:
    state = folo.init(tiny, folo.CacheConfig(num_blocks=9))
    assert folo.stats(state) == folo.Stats(
        running=0,
        waiting=0,
        finished=0,
        num_blocks=9,
        blocks_used=0,
        blocks_shared=0,
        blocks_cached=0,
        blocks_free=9,
        kv_use=1.0,
        hit_rate=0.0,
        preemptions=0,
        steps=0,
    )


def test_blocks_are_counted_by_who_holds_them(tiny: folo.Params) -> None:
    sampling = folo.SamplingParams(max_tokens=4, ignore_eos=True)
    state = folo.init(tiny, folo.CacheConfig(block_size=8, num_blocks=9))
    state = folo.submit(state, folo.Request(prompt(20), sampling, "a"))
    state = folo.submit(state, folo.Request(prompt(20), sampling, "b"))
    batch = folo.schedule(state)
    assert batch is not None
    state, _ = folo.step(tiny, state, batch)
    numbers = folo.stats(state)
    # Both hold the prompt's two full blocks and a tail of 4 tokens of their own.
    assert (numbers.running, numbers.blocks_used, numbers.blocks_shared) == (2, 4, 2)
    assert numbers.kv_use == (8 + 8 + 4 + 4) / 32
    assert numbers.hit_rate == 16 / 40, "the second one's 16 tokens, of 40 looked up"
    forked = folo.stats(folo.fork(state, "a", ["c"]))
    assert (forked.running, forked.blocks_used, forked.blocks_shared) == (3, 4, 3)
    state = finish_all(tiny, state)
    numbers = folo.stats(state)
    assert (numbers.running, numbers.finished, numbers.blocks_used) == (0, 2, 0)
    assert (numbers.blocks_cached, numbers.blocks_free, numbers.steps) == (2, 7, 4)


def test_kv_use_on_mixed_lengths_is_above_96_percent(tiny: folo.Params) -> None:
    """At block size 16: only the last block of a sequence has slots to spare, and none is taken ahead."""
    state = folo.init(tiny, folo.CacheConfig(block_size=16, num_blocks=400))
    for n, length in enumerate(range(130, 240, 9)):
        sampling = folo.SamplingParams(max_tokens=16, ignore_eos=True)
        state = folo.submit(state, folo.Request(prompt(length, n), sampling, str(n)))
    use: list[float] = []
    while (batch := folo.schedule(state)) is not None:
        state, _ = folo.step(tiny, state, batch)
        use.append(folo.stats(state).kv_use)
    assert sum(use) / len(use) > 0.96


@pytest.mark.parametrize("num_blocks", [12, 40])
def test_preemptions_are_counted(tiny: folo.Params, num_blocks: int) -> None:
    state = folo.init(tiny, folo.CacheConfig(block_size=8, num_blocks=num_blocks))
    for n in range(4):
        sampling = folo.SamplingParams(max_tokens=24, ignore_eos=True)
        state = folo.submit(state, folo.Request(prompt(20, n), sampling, str(n)))
    state = finish_all(tiny, state)
    assert bool(folo.stats(state).preemptions) == (num_blocks == 12)
