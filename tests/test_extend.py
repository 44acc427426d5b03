"""Extend: the next turn of a conversation goes on with the K and V of the turns before it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from branches import LONG, SMALL, recipe_of, started, unharmed
from engine import Oracle, finish_all, ids_of, prompt, run, stepped

import folo


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("x", [3]), "no request 'x'"),
        (("n", [3]), "'n' has 2 samples: fork the one to go on with"),
        (("a", []), "no token ids; give at least one"),
        (("a", [300]), r"token id 300 is outside the vocabulary, \[0, 300\)"),
        (("a", [1.5]), "token ids must be ints"),
        (("a", 5), "token ids must be ints"),
        (("a", b"ab"), "token ids must be ints, got b'ab': encode text"),
        (("a", [4] * 242), "256 tokens leave no room for output under max_model_len=256"),
    ],
)
def test_an_extension_that_is_refused_names_why_and_changes_nothing(
    tiny: folo.Params, arguments: Any, message: str
) -> None:
    state = folo.submit(started(tiny), folo.Request([3], replace(LONG, n=2), "n"))
    unharmed(tiny, state, lambda: folo.extend(state, *arguments), message)


@pytest.mark.parametrize("caching", [True, False])
def test_a_finished_request_goes_on_with_what_the_cache_has_of_it(tiny: folo.Params, caching: bool) -> None:
    cache = replace(SMALL, enable_prefix_caching=caching)
    ended = finish_all(tiny, started(tiny, cache=cache))  # 28 tokens are computed, 24 in full blocks
    other = folo.submit(ended, folo.Request(prompt(4), LONG, "other"))
    state = folo.extend(other, "a", [7, 8, 9])
    folo.check(state)
    assert [s.id for s in state.waiting] == ["other", "a"], "it has come anew"
    assert not state.finished.length
    after = finish_all(tiny, state)
    output = folo.outputs(after)["a"]
    whole = (*prompt(9), *ids_of(ended, "a"), 7, 8, 9)
    Oracle(tiny).verify([replace(recipe_of(ended), prompt=whole, given=())], output)
    assert output.num_cached_tokens == (24 if caching else 0)
    assert output.outputs[0].finish_reason == "length"
    assert len(output.outputs[0].token_ids) == 20, "max_tokens counts anew"
    asked = replace(LONG, seed=5)
    again = run(tiny, [folo.Request(whole, asked, "a")], cache)["a"]
    assert replace(output, num_cached_tokens=0) == again


def test_a_running_request_is_cut_off_and_keeps_its_place_and_its_blocks(
    tiny: folo.Params, copied: list[int]
) -> None:
    state = folo.submit(started(tiny), folo.Request(prompt(4), LONG, "later"))
    state = stepped(tiny, state)
    (before,) = (s for s in state.running if s.id == "a")
    extended = folo.extend(state, "a", [7] * 9)
    folo.check(extended)
    (after,) = (s for s in extended.running if s.id == "a")
    assert [s.id for s in extended.running] == ["a", "later"]
    assert after.table.blocks == before.table.blocks
    batch = folo.schedule(extended)
    assert batch is not None
    planned = {s.sequence.id: (s.start, s.end) for s in batch.scheduled}
    assert planned == {"a": (before.num_computed, before.num_computed + 10), "later": (4, 5)}
    ended = finish_all(tiny, extended)
    assert not copied
    whole = (*prompt(9), *ids_of(state, "a"), *[7] * 9)
    Oracle(tiny).verify([replace(recipe_of(state), prompt=whole, given=())], folo.outputs(ended)["a"])
    # The state before it was extended goes on as if nothing had been: where both write, it copies.
    Oracle(tiny).verify([recipe_of(state)], folo.outputs(finish_all(tiny, state))["a"])


@pytest.mark.parametrize("count", [1, 2, 3, 10, 11, 18])
def test_tokens_that_fill_blocks_are_found_in_the_cache_by_others(tiny: folo.Params, count: int) -> None:
    state = started(tiny)  # 14 tokens
    new = prompt(count, 3)
    after = finish_all(tiny, folo.extend(state, "a", new))
    whole = [*prompt(9), *ids_of(state, "a"), *new]
    later = folo.submit(after, folo.Request([*whole, 3], LONG, "later"))
    output = folo.outputs(finish_all(tiny, later))["later"]
    assert output.num_cached_tokens == len(whole) // 8 * 8


def test_what_was_output_counts_as_prompt(tiny: folo.Params) -> None:
    rough = replace(
        LONG,
        temperature=0.7,
        frequency_penalty=1.5,
        presence_penalty=1.0,
        repetition_penalty=1.3,
        prompt_logprobs=2,
        logprobs=1,
        min_tokens=2,
        stop_token_ids=[250, 251],
    )
    running = started(tiny, rough)
    half = started(tiny, rough, length=40, steps=1, max_num_batched_tokens=18)
    for state in (running, finish_all(tiny, running), half):
        new = [*ids_of(state, "a"), 4, 4]
        before = state.held("a").request.prompt_token_ids
        whole = (*before, *ids_of(state, "a"), *new)
        extended = folo.extend(state, "a", new)
        folo.check(extended)
        output = folo.outputs(finish_all(tiny, extended))["a"]
        Oracle(tiny).verify([replace(recipe_of(state), prompt=whole, given=())], output)
        assert output.prompt_logprobs is not None
        assert len(output.prompt_logprobs) == len(whole)


def test_turn_follows_turn(tiny: folo.Params, tokenizer: Any) -> None:
    """A conversation, forked in its middle: each turn's text, stops and lineage are its own."""
    state = started(tiny, replace(LONG, stop=["e", "t"]), steps=1, tokenizer=tokenizer)
    oracle, recipe = Oracle(tiny, tokenizer), recipe_of(state)
    recipe = replace(recipe, given=())
    for turn in range(3):
        state = finish_all(tiny, state)
        oracle.verify([recipe], folo.outputs(state)["a"])
        recipe = replace(recipe, prompt=(*recipe.prompt, *ids_of(state, "a"), 5 + turn))
        state = folo.extend(state, "a", [5 + turn])
        assert folo.outputs(state)["a"].outputs[0].text == ""
    state = stepped(tiny, state, 2)
    length = len(recipe.prompt) + len(ids_of(state, "a"))
    state = folo.fork(state, "a", ["b"], append=[9], seeds=[1])
    kept = ids_of(state, "b")
    state = folo.extend(finish_all(tiny, state), "b", [6])
    child = replace(recipe, given=tuple(kept), seed=1)
    prompt_of_b = folo.outputs(state)["b"].prompt_token_ids
    assert prompt_of_b[: length + 1] == [*recipe.prompt, *kept]
    after = folo.outputs(finish_all(tiny, state))
    oracle.verify([replace(child, prompt=tuple(prompt_of_b), given=())], after["b"])
    oracle.verify([recipe], after["a"])
    assert after["b"].lineage == (("a", length, 1),)


def test_the_text_of_a_prompt_is_not_that_of_the_next(tiny: folo.Params) -> None:
    request = folo.Request(prompt(9), LONG, "a", prompt="the cat")
    state = folo.submit(folo.init(tiny, SMALL), request)
    assert folo.outputs(state)["a"].prompt == "the cat"
    assert folo.outputs(folo.extend(state, "a", [7]))["a"].prompt is None


def test_the_turn_after_a_stop_token_shows_all_of_its_text(tiny: folo.Params, tokenizer: Any) -> None:
    token = ids_of(started(tiny), "a")[3]
    sampling = replace(LONG, stop_token_ids=[token])
    ended = finish_all(tiny, started(tiny, sampling, steps=1, tokenizer=tokenizer))
    (before,) = folo.outputs(ended)["a"].outputs
    assert before.stop_reason == token
    state = stepped(tiny, folo.extend(ended, "a", [7]), 2)
    (output,) = folo.outputs(state)["a"].outputs
    assert output.finish_reason is None
    assert output.text == tokenizer.decode(output.token_ids)


def test_a_prompt_that_is_scored_is_not_scored_again(tiny: folo.Params) -> None:
    state = started(tiny, replace(LONG, prompt_logprobs=1))
    batch = folo.schedule(folo.extend(state, "a", [7]))
    assert batch is not None
    assert [item.start for item in batch.scheduled] == [8], "where the first output token is scored"


def test_who_comes_after_an_extension_ranks_behind_it(tiny: folo.Params) -> None:
    state = folo.extend(finish_all(tiny, started(tiny)), "a", [7])
    state = folo.submit(state, folo.Request(prompt(4), LONG, "later"))
    first, second = map(state.rank, state.waiting)
    assert first < second
