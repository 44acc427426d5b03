"""A request under way, to be forked or extended, and what has to hold of it afterwards."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from engine import Oracle, Recipe, finish_all, ids_of, prompt, stepped
from torch.utils import _pytree as pytree

import folo

LONG = folo.SamplingParams(max_tokens=20, seed=5, ignore_eos=True)


SMALL = folo.CacheConfig(block_size=8, num_blocks=64)


def started(
    params: folo.Params,
    sampling: folo.SamplingParams = LONG,
    length: int = 9,
    steps: int = 5,
    cache: folo.CacheConfig = SMALL,
    tokenizer: Any = None,
    **scheduler: Any,
) -> folo.EngineState:
    """A state in which request "a" has made this many steps."""
    state = folo.init(params, cache, folo.SchedulerConfig(**scheduler), tokenizer)
    return stepped(params, folo.submit(state, folo.Request(prompt(length), sampling, "a")), steps)


def recipe_of(state: folo.EngineState, sample: int = 0) -> Recipe:
    """The recipe of a sample of "a", with its tokens so far as `given`."""
    recipe = Recipe.of(state, state.held("a").request, sample)
    return replace(recipe, given=tuple(ids_of(state, "a", sample)))


def unharmed(params: folo.Params, state: folo.EngineState, call: Any, message: str) -> None:
    """The call raises RequestError with this message, and the state is as it was: it goes on as before."""
    shown, free, leaves = folo.outputs(state), state.heap.num_free, pytree.tree_leaves(state)
    with pytest.raises(folo.RequestError, match=message):
        call()
    folo.check(state)
    assert folo.outputs(state) == shown
    assert state.heap.num_free == free
    assert all(a is b for a, b in zip(pytree.tree_leaves(state), leaves, strict=True))
    Oracle(params).verify([recipe_of(state)], folo.outputs(finish_all(params, state))["a"])
