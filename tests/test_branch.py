"""Fork: a branch shares what it can, and its tokens are those of its own sequence alone."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from branches import LONG, SMALL, recipe_of, started, unharmed
from engine import Oracle, finish_all, ids_of, prompt, run, stepped
from torch import Tensor
from torch.utils import _pytree as pytree

import folo
from folo import detokenize
from folo.sampling import Context


def tables(state: folo.EngineState) -> dict[str, tuple[Any, ...]]:
    return {sequence.id: sequence.table.blocks for sequence in state.running}


# --- fork: sharing


@pytest.mark.parametrize("children", [["b"], ["b", "c", "d"]])
def test_nothing_is_copied_until_histories_part_and_then_one_block_for_each_that_leaves(
    tiny: folo.Params, copied: list[int], children: list[str]
) -> None:
    state = started(tiny)  # 13 tokens are computed: a full block, and 5 slots of the next
    free, count = state.heap.num_free, len(children)
    forked = folo.fork(state, "a", children, seeds=list(range(count)))
    folo.check(forked)
    assert [s.id for s in forked.running] == ["a", *children]
    assert set(tables(forked).values()) == {tables(state)["a"]}
    assert forked.heap.num_free == free
    assert folo.stats(forked).blocks_used == folo.stats(forked).blocks_shared == 2
    after = stepped(tiny, forked)
    assert copied == [count], "the last to write has the block to itself"
    assert after.heap.num_free == free - count
    assert (folo.stats(after).blocks_used, folo.stats(after).blocks_shared) == (2 + count, 1)
    assert len({blocks[0] for blocks in tables(after).values()}) == 1
    assert len({blocks[1] for blocks in tables(after).values()}) == 1 + count
    finish_all(tiny, after)
    assert copied == [count], "and nothing is copied again"
    del forked, after
    assert state.heap.num_free == free


def test_a_decode_goes_on_in_its_own_block(tiny: folo.Params, copied: list[int]) -> None:
    finish_all(tiny, started(tiny, length=2, steps=1))
    assert not copied


def test_what_a_step_takes_does_not_depend_on_what_else_was_done_with_the_heap(tiny: folo.Params) -> None:
    forked = folo.fork(started(tiny), "a", ["b"])
    state = folo.reconfigure(forked, folo.SchedulerConfig(max_num_batched_tokens=1))  # "b" stays behind
    assert folo.stats(stepped(tiny, state)) == folo.stats(stepped(tiny, state))


def test_branches_that_part_between_blocks_copy_nothing(tiny: folo.Params, copied: list[int]) -> None:
    state = started(tiny, steps=8)  # 16 tokens are computed
    finish_all(tiny, folo.fork(state, "a", ["b", "c"], seeds=[1, 2]))
    finish_all(tiny, folo.fork(state, "a", ["b"], keep=9, append=[7] * 8))  # parts at 9, in the block
    assert copied == [1]


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("steps", [1, 8, 12])
def test_a_child_keeps_as_much_as_it_is_told_to(tiny: folo.Params, caching: bool, steps: int) -> None:
    sampling = replace(LONG, logprobs=2)
    state = started(tiny, sampling, steps=steps, cache=replace(SMALL, enable_prefix_caching=caching))
    recipe, oracle, blocks = recipe_of(state), Oracle(tiny), tables(state)["a"]
    forked, children = state, {}
    for keep in range(9, 9 + steps + 1):
        for seed in (None, 3):
            id = f"{keep} {seed}"
            children[id] = recipe.forked(keep, seed=seed)
            forked = folo.fork(forked, "a", [id], keep=keep, seeds=[seed])
            folo.check(forked)
            assert ids_of(forked, id) == ids_of(state, "a")[: keep - 9]
            assert tables(forked)[id] == blocks[: -(-(keep - 1) // 8)]
    outputs = folo.outputs(finish_all(tiny, forked))
    for id, expected in {"a": recipe, **children}.items():
        oracle.verify([expected], outputs[id])


def test_a_child_of_a_prompt_that_is_half_computed_shares_that_half(tiny: folo.Params) -> None:
    state = started(tiny, length=40, steps=1, max_num_batched_tokens=18)
    forked = folo.fork(state, "a", ["b"], seeds=[1])
    assert {s.id: s.num_computed for s in forked.running} == {"a": 18, "b": 18}
    outputs = folo.outputs(finish_all(tiny, forked))
    Oracle(tiny).verify([recipe_of(state).forked(40, seed=1)], outputs["b"])
    Oracle(tiny).verify([recipe_of(state)], outputs["a"])


def test_pool_accounting_counts_a_shared_block_once(tiny: folo.Params) -> None:
    state = started(tiny, steps=8)  # 16 tokens are computed, in 2 full blocks
    three = folo.stats(folo.fork(state, "a", ["b", "c"]))
    assert (three.running, three.blocks_used, three.blocks_shared) == (3, 2, 2)
    assert three.blocks_free == 62
    assert three.kv_use == 1.0
    one_less = folo.abort(folo.fork(state, "a", ["b", "c"], keep=12), "a")
    folo.check(one_less)
    left = folo.stats(one_less)  # b and c hold 11 tokens of 16 slots; "a" fills its second block alone
    assert (left.blocks_used, left.blocks_shared, left.kv_use) == (2, 2, 11 / 16)
    gone = folo.stats(folo.abort(folo.abort(one_less, "b"), "c"))
    assert (gone.blocks_used, gone.blocks_cached, gone.blocks_free) == (0, 2, 62)


@pytest.mark.parametrize("num_blocks", [2, 3, 4])
def test_branches_preempt_one_another_where_no_block_is_left_for_a_copy(
    tiny: folo.Params, num_blocks: int
) -> None:
    sampling = replace(LONG, max_tokens=7)
    state = started(tiny, sampling, cache=replace(SMALL, num_blocks=num_blocks))
    forked = folo.fork(state, "a", ["b", "c"], seeds=[1, 2])
    after = finish_all(tiny, forked)
    assert folo.stats(after).preemptions == 4 - num_blocks
    outputs = folo.outputs(after)
    for id, seed in (("a", None), ("b", 1), ("c", 2)):
        Oracle(tiny).verify([recipe_of(state).forked(14, seed=seed)], outputs[id])


def test_a_branch_with_much_to_compute_counts_its_copy_among_the_blocks(tiny: folo.Params) -> None:
    state = folo.fork(started(tiny, cache=replace(SMALL, num_blocks=3)), "a", ["b"], seeds=[1])
    for id in "ab":
        state = folo.extend(state, id, [7] * 9)
    batch = folo.schedule(state)
    assert batch is not None
    assert [item[1:3] for item in batch.scheduled] == [(13, 16), (13, 16)]
    folo.check(finish_all(tiny, state))


def test_children_rank_in_their_order_and_before_who_comes_later(tiny: folo.Params) -> None:
    state = folo.submit(folo.init(tiny, SMALL), folo.Request(prompt(9), LONG, "a"))
    state = folo.submit(folo.fork(state, "a", ["b", "c"]), folo.Request(prompt(4), LONG, "later"))
    ranks = list(map(state.rank, state.waiting))
    assert [sequence.id for sequence in state.waiting] == ["a", "b", "c", "later"]
    assert ranks == sorted(set(ranks))


def test_branches_that_part_between_blocks_need_none_for_a_copy(tiny: folo.Params) -> None:
    state = started(tiny, replace(LONG, max_tokens=12), steps=8, cache=replace(SMALL, num_blocks=4))
    batch = folo.schedule(folo.fork(state, "a", ["b"]))  # 16 tokens are computed
    assert batch is not None
    assert [item.sequence.id for item in batch.scheduled] == ["a", "b"]


def test_a_child_waits_where_no_more_may_run(tiny: folo.Params) -> None:
    for caching, cached in ((True, 8), (False, 0)):
        state = started(tiny, cache=replace(SMALL, enable_prefix_caching=caching), max_num_seqs=2)
        forked = folo.fork(state, "a", ["b", "c", "d"], seeds=[1, 2, 3])
        folo.check(forked)
        assert [s.id for s in forked.running] == ["a", "b"]
        assert [s.id for s in forked.waiting] == ["c", "d"]
        outputs = folo.outputs(finish_all(tiny, forked))
        for id, seed in (("b", 1), ("c", 2), ("d", 3)):
            Oracle(tiny).verify([recipe_of(state).forked(14, seed=seed)], outputs[id])
        # What "b" took over was there at once; the others found full blocks in the prefix cache, or none.
        assert [outputs[id].num_cached_tokens for id in "bcd"] == [13, cached, cached]


# --- fork: tokens


def test_a_child_without_a_seed_goes_on_in_its_parents_stream(tiny: folo.Params) -> None:
    state = started(tiny)
    expected = folo.outputs(finish_all(tiny, state))["a"].outputs
    for keep in (None, 9, 11):
        forked = folo.fork(state, "a", ["b", "c"], keep=keep, seeds=[None, 6])
        outputs = folo.outputs(finish_all(tiny, forked))
        assert outputs["a"].outputs == outputs["b"].outputs == expected
        assert outputs["c"].outputs[0].token_ids != expected[0].token_ids
        assert outputs["c"].outputs[0].seed == 6


def test_forced_tokens_are_output_for_all_children_or_for_each(tiny: folo.Params) -> None:
    state = started(tiny, replace(LONG, logprobs=1, frequency_penalty=0.5, repetition_penalty=1.2))
    recipe, oracle = recipe_of(state), Oracle(tiny)
    forms: list[tuple[Any, list[list[int]]]] = [
        ([7, 7, 8], [[7, 7, 8]] * 3),
        ([torch.tensor(7), torch.tensor(8)], [[7, 8]] * 3),
        ([[7], [], [8] * 11], [[7], [], [8] * 11]),
    ]
    for append, each in forms:
        forked = folo.fork(state, "a", ["b", "c", "d"], keep=12, append=append, seeds=[None, 1, 2])
        folo.check(forked)
        outputs = folo.outputs(finish_all(tiny, forked))
        for id, tokens, seed in zip("bcd", each, (None, 1, 2), strict=True):
            kept = recipe.given[:3]
            assert outputs[id].outputs[0].token_ids[: 3 + len(tokens)] == [*kept, *tokens]
            oracle.verify([recipe.forked(12, tokens, seed)], outputs[id])


def test_a_sample_of_several_is_forked_with_its_own_stream(tiny: folo.Params) -> None:
    many = replace(LONG, n=3, prompt_logprobs=1, logprobs=0)
    state = started(tiny, many, steps=4)
    expected = folo.outputs(finish_all(tiny, state))["a"].outputs
    oracle = Oracle(tiny)
    for sample in range(3):
        recipe = replace(recipe_of(state, sample), sampling=replace(many, n=1))
        forked = folo.fork(state, "a", ["same", "other"], sample, seeds=[None, 9])
        folo.check(forked)
        outputs = folo.outputs(finish_all(tiny, forked))
        assert outputs["same"].outputs[0].token_ids == expected[sample].token_ids
        # A child has one sample, which scores the prompt whichever its parent was.
        oracle.verify([recipe], outputs["same"])
        oracle.verify([recipe.forked(9 + len(recipe.given), seed=9)], outputs["other"])


def test_a_child_of_one_of_several_is_scored_only_where_that_was(tiny: folo.Params) -> None:
    state = folo.fork(started(tiny, replace(LONG, n=2)), "a", ["b"], sample=1)
    (child,) = folo.outputs(finish_all(tiny, state))["b"].outputs
    assert child.cumulative_logprob is None


def test_scores_of_the_prompt_do_not_count_with_those_of_a_child(tiny: folo.Params) -> None:
    state = started(tiny, replace(LONG, prompt_logprobs=0, logprobs=0))
    after = finish_all(tiny, folo.fork(state, "a", ["b"], keep=12))
    Oracle(tiny).verify([recipe_of(state).forked(12)], folo.outputs(after)["b"])


def test_a_child_of_the_best_of_several_is_one_sample(tiny: folo.Params) -> None:
    state = started(tiny, replace(LONG, best_of=3))
    outputs = folo.outputs(finish_all(tiny, folo.fork(state, "a", ["b"], sample=2)))
    alone = replace(recipe_of(state, 2), sampling=LONG)
    (child,) = outputs["b"].outputs
    scores = run(tiny, [folo.Request(prompt(9), replace(LONG, n=3, logprobs=0), "a")])["a"].outputs[2]
    assert child.cumulative_logprob == scores.cumulative_logprob
    Oracle(tiny).verify_sample(alone, replace(child, cumulative_logprob=None))


def test_parents_that_wait_or_have_finished_are_forked_too(tiny: folo.Params) -> None:
    waiting = folo.submit(folo.init(tiny, SMALL), folo.Request(prompt(9), LONG, "a"))
    ended = finish_all(tiny, waiting)
    collected, _ = folo.collect(folo.fork(ended, "a", ["b"], keep=15, append=[4], seeds=[2]))
    recipe = recipe_of(ended)
    for state, child in (
        (folo.fork(waiting, "a", ["b"], append=[4]), recipe.forked(9, [4])),
        (folo.fork(ended, "a", ["b"], keep=20), recipe.forked(20)),
        (collected, recipe.forked(15, [4], 2)),
    ):
        folo.check(state)
        assert not state.running
        after = finish_all(tiny, state)
        Oracle(tiny).verify([child], folo.outputs(after)["b"])
    assert folo.outputs(after)["b"].num_cached_tokens == 8, "the child found what its parent left"


def test_a_child_goes_on_where_a_stop_token_ended_its_parent(tiny: folo.Params) -> None:
    stops = replace(LONG, stop_token_ids=range(3, 120))
    state = finish_all(tiny, started(tiny, stops, steps=1))
    (parent,) = folo.outputs(state)["a"].outputs
    assert parent.finish_reason == "stop"
    after = finish_all(tiny, folo.fork(state, "a", ["b"]))
    Oracle(tiny).verify([recipe_of(state)], folo.outputs(after)["b"])


def test_nothing_of_the_stop_that_ended_its_parent_is_left_to_a_child(
    tiny: folo.Params, tokenizer: Any
) -> None:
    stops = replace(LONG, stop_token_ids=ids_of(started(tiny), "a")[3:4])
    ended = finish_all(tiny, started(tiny, stops, steps=1, tokenizer=tokenizer))
    assert folo.outputs(ended)["a"].outputs[0].finish_reason == "stop"
    state = stepped(tiny, folo.fork(ended, "a", ["b"]), 2)
    assert folo.outputs(state)["b"].outputs[0].finish_reason is None
    Oracle(tiny, tokenizer).verify([recipe_of(ended)], folo.outputs(state)["b"])


def test_lineage_tells_every_fork_from_the_root_on(tiny: folo.Params) -> None:
    state = folo.fork(started(tiny), "a", ["b", "c"], keep=12, seeds=[None, 6])
    state = folo.fork(stepped(tiny, state, 2), "c", ["d"], keep=13, append=[4, 4])
    state = folo.fork(stepped(tiny, state, 2), "d", ["e"], seeds=[8])
    length = 9 + len(ids_of(state, "d"))
    recipe = recipe_of(state)
    shown = folo.outputs(state)
    assert shown["a"].lineage == ()
    assert shown["b"].lineage == (("a", 12, 5),)
    assert shown["c"].lineage == (("a", 12, 6),)
    assert shown["d"].lineage == (("a", 12, 6), ("c", 13, 6))
    assert shown["e"].lineage == (("a", 12, 6), ("c", 13, 6), ("d", length, 8))
    outputs = folo.outputs(finish_all(tiny, state))
    c = replace(recipe.forked(12, seed=6), given=tuple(ids_of(state, "c")))
    d = replace(c.forked(13, [4, 4]), given=tuple(ids_of(state, "d")))
    for id, expected in {"c": c, "d": d, "e": d.forked(length, seed=8)}.items():
        Oracle(tiny).verify([expected], outputs[id])


def test_max_tokens_goes_on_counting_from_the_prompt(tiny: folo.Params) -> None:
    state = started(tiny, steps=12)
    forked = folo.fork(state, "a", ["b", "c"], keep=15, append=[[], [4] * 13])
    outputs = folo.outputs(finish_all(tiny, forked))
    for id in "bc":
        (output,) = outputs[id].outputs
        assert (len(output.token_ids), output.finish_reason) == (20, "length")
    with pytest.raises(folo.RequestError, match=r"29 tokens leave no room for output.*end it at 29"):
        folo.fork(state, "a", ["b"], keep=15, append=[4] * 14)


def test_a_forced_stop_token_has_its_text_since_it_stopped_nothing(tiny: folo.Params, tokenizer: Any) -> None:
    sampling = replace(LONG, stop_token_ids=(100,))
    state = folo.init(tiny, SMALL, tokenizer=tokenizer)
    state = folo.fork(
        folo.submit(state, folo.Request(prompt(9), sampling, "a")), "a", ["b"], append=[50, 100]
    )
    ended = folo.outputs(folo.finish(state, "b", "stop"))["b"].outputs[0]
    assert (ended.token_ids, ended.finish_reason) == ([50, 100], "stop")
    assert ended.text == folo.outputs(state)["b"].outputs[0].text == tokenizer.decode([50, 100])


@pytest.mark.parametrize(
    "forced",
    [(4, 9), np.array([4, 9]), torch.tensor([4, 9]), [torch.tensor([4, 9])], [np.array([4, 9])]],
    ids=["tuple", "array", "tensor", "list of a tensor", "list of an array"],
)
def test_forced_tokens_may_come_as_any_list(forced: Any, tiny: folo.Params) -> None:
    state = folo.fork(started(tiny, steps=12), "a", ["b"], append=forced)
    assert ids_of(state, "b") == [*ids_of(state, "a"), 4, 9]


def test_logprobs_of_forced_tokens_are_those_of_scoring_them_in_a_prompt(tiny: folo.Params) -> None:
    sampling = replace(LONG, logprobs=3)
    state = started(tiny, sampling)
    given = ids_of(state, "a")
    for keep, forced in ((14, [4, 9, 250]), (11, [given[2], 9]), (11, [4]), (9, [*given[:4], 8])):
        child = folo.fork(state, "a", ["b"], keep=keep, append=forced, seeds=[1])
        (output,) = folo.outputs(finish_all(tiny, child))["b"].outputs
        whole = [*prompt(9), *given[: keep - 9], *forced]
        scored = folo.SamplingParams(max_tokens=1, prompt_logprobs=3)
        expected = run(tiny, [folo.Request(whole, scored, "x")])["x"].prompt_logprobs
        assert expected is not None
        assert output.logprobs is not None
        assert output.logprobs[: len(whole) - 9] == expected[9:]
        total = 0.0
        for token, table in zip(output.token_ids, output.logprobs, strict=True):
            total += table[token].logprob
        assert output.cumulative_logprob == total


def test_a_forced_token_behind_a_scored_prompt_has_the_scores_of_its_own_place(tiny: folo.Params) -> None:
    state = started(tiny, replace(LONG, prompt_logprobs=3, logprobs=3))
    recipe = recipe_of(state)
    child = folo.fork(state, "a", ["b"], keep=12, append=[recipe.given[3]], seeds=[1])
    expected = recipe.forked(12, [recipe.given[3]], 1)
    Oracle(tiny).verify([expected], folo.outputs(finish_all(tiny, child))["b"])


def test_a_score_does_not_depend_on_how_far_the_parent_was(tiny: folo.Params) -> None:
    """A logits processor sees the child's stream, also where the parent's row has the forced token."""

    def shift(logits: Tensor, context: Context) -> Tensor:
        return logits * (1 + context.sample_index)

    rough = replace(LONG, n=2, logprobs=2, logprobs_mode="processed", logits_processors=(shift,))
    early = started(tiny, rough, steps=4)
    late = stepped(tiny, early, 2)
    kept, token = ids_of(early, "a", 1), ids_of(late, "a", 1)[len(ids_of(early, "a", 1))]
    scores = []
    for state in (early, late):
        child = folo.fork(state, "a", ["b"], 1, keep=9 + len(kept), append=[token], seeds=[7])
        (output,) = folo.outputs(finish_all(tiny, child))["b"].outputs
        assert output.logprobs is not None
        scores.append(output.logprobs)
    assert scores[0] == scores[1]


def test_branches_have_the_text_and_the_stops_of_their_own_tokens(tiny: folo.Params, tokenizer: Any) -> None:
    readable = {id for id in range(tiny.config.vocab_size) if tokenizer.decode([id]).strip().isalpha()}
    banned = {id: -math.inf for id in range(tiny.config.vocab_size) if id not in readable}
    letters = folo.SamplingParams(max_tokens=24, seed=5, logit_bias=banned)
    state = started(tiny, letters, steps=24, tokenizer=tokenizer)
    text = folo.outputs(state)["a"].outputs[0].text
    stop = text[len(text) // 2 :][:2]
    assert text.find(stop) > 8
    state = started(tiny, replace(letters, stop=[stop]), steps=6, tokenizer=tokenizer)
    recipe, oracle = recipe_of(state), Oracle(tiny, tokenizer)
    forced = tokenizer.encode(f"x{stop}y", add_special_tokens=False)
    for keep in (None, 9, 12):
        kept = 9 + len(recipe.given) if keep is None else keep
        forked = folo.fork(state, "a", ["b", "c", "d"], keep=keep, append=[[], forced, forced[:-1]])
        outputs = folo.outputs(finish_all(tiny, forked))
        for id, tokens in (("b", ()), ("c", forced), ("d", forced[:-1])):
            oracle.verify([recipe.forked(kept, tokens)], outputs[id])
        assert outputs["b"].outputs[0].stop_reason == stop
        assert len(outputs["c"].outputs[0].token_ids) > kept - 9 + len(forced), "a forced stop stops nothing"


def test_what_children_keep_is_decoded_once_for_all(
    tiny: folo.Params, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = started(tiny, replace(LONG, stop=["never"]), steps=6, tokenizer=tokenizer)
    decoded, advance = list[int](), detokenize.advance

    def counted(tokenizer: Any, state: Any, new_ids: Any) -> Any:
        decoded.extend(new_ids)
        return advance(tokenizer, state, new_ids)

    monkeypatch.setattr(detokenize, "advance", counted)
    folo.fork(state, "a", ["b", "c", "d"], keep=12, append=[[], [40], [50]])
    assert decoded == [*ids_of(state, "a")[: 12 - 9], 40, 50]


def test_the_same_fork_twice_is_the_same_twice_and_the_parent_never_notices(tiny: folo.Params) -> None:
    state = started(tiny)
    shown, leaves = folo.outputs(state), pytree.tree_leaves(state)
    first, second = (folo.fork(state, "a", ["b"], keep=12, append=[3, 4], seeds=[1]) for _ in range(2))
    ends = [folo.outputs(finish_all(tiny, forked)) for forked in (first, second)]
    assert ends[0] == ends[1]
    assert folo.outputs(state) == shown
    assert all(a is b for a, b in zip(pytree.tree_leaves(state), leaves, strict=True))
    alone = folo.outputs(finish_all(tiny, state))["a"]
    assert ends[0]["a"] == alone


def test_a_child_lives_under_the_limits_of_its_state_not_of_its_parents_time(tiny: folo.Params) -> None:
    free = folo.SamplingParams(max_tokens=None, seed=5, ignore_eos=True)
    ended = finish_all(tiny, started(tiny, free, max_model_len=30, cache=replace(SMALL, reserve_blocks=9)))
    for limit in (24, 40):
        state = folo.reconfigure(ended, replace(ended.scheduler, max_model_len=limit))
        after = finish_all(tiny, folo.fork(state, "a", ["b"], keep=12))
        assert len(ids_of(after, "b")) == limit - 9


def test_a_child_of_a_restored_parent_fits_the_heap_that_it_was_restored_into(
    tiny: folo.Params, tmp_path: Path
) -> None:
    folo.save(finish_all(tiny, started(tiny, replace(LONG, max_tokens=100))), tmp_path / "state")
    small = folo.restore(tiny, tmp_path / "state", replace(SMALL, num_blocks=4))
    after = finish_all(tiny, folo.fork(small, "a", ["b"], keep=12))
    assert not folo.has_unfinished(after)
    assert len(ids_of(after, "b")) == 4 * 8 - 9


def test_seeds_and_tokens_may_be_numpys_and_are_kept_as_ints(tiny: folo.Params, tmp_path: Path) -> None:
    seeds, tokens = np.array([3, 4]), np.array([[7, 8], [9, 9]])
    keep = np.int64(10)
    forked = folo.fork(started(tiny), "a", ["b", "c"], 0, keep, list(tokens), list(seeds))  # pyright: ignore
    extended = folo.extend(forked, "c", tokens[0])
    folo.save(extended, tmp_path / "state")
    assert folo.outputs(folo.restore(tiny, tmp_path / "state")) == folo.outputs(extended)


# --- fork: what is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"id": "x"}, r"no request 'x'.*never submitted, or collected"),
        ({"sample": 1}, "'a' has no sample 1: it has 1, from 0 on"),
        ({"sample": -1}, "has no sample -1"),
        ({"keep": 8}, r"keep=8, but it counts tokens with the prompt: 9 \(the prompt\) to 14 \(all\)"),
        ({"keep": 15}, "keep=15"),
        ({"keep": 9.0}, r"keep=9\.0"),
        ({"children": []}, r"children=\[\] is not a list of different ids"),
        ({"children": "b"}, "children='b' is not a list"),
        ({"children": ["b", "b"]}, "'b', 'b'.*different"),
        ({"children": ["b", "a"]}, "the id 'a' is .*taken"),
        ({"children": ["b", "done"]}, "the id 'done' is .*taken"),
        ({"children": [""]}, "the id '' is empty"),
        ({"children": [3]}, "the id 3 is .*no string"),
        ({"children": [["b"]]}, r"the id \['b'\] is .*no string"),
        ({"children": 2}, "children=2 is not a list"),
        ({"append": [300]}, r"token id 300 is outside the vocabulary, \[0, 300\)"),
        ({"append": [-1]}, "token id -1"),
        ({"append": [1.5]}, "token ids must be ints"),
        ({"append": b"ab"}, "token ids must be ints, got b'ab'"),
        ({"append": 5}, "append=5 is no list of token ids"),
        ({"append": [[4], [4], [4]], "children": ["b", "c"]}, "3 lists to append for 2 children"),
        ({"append": [[4], [300]], "children": ["b", "c"]}, "token id 300"),
        ({"append": [4] * 15}, "29 tokens leave no room for output.*end it at 29; keep fewer"),
        ({"append": [[], [4] * 15], "children": ["b", "c"]}, "29 tokens leave no room"),
        ({"seeds": [1, 2]}, "2 seeds for 1 children"),
        ({"seeds": 3}, "seeds=3 is not a list"),
        ({"seeds": [-1]}, r"seed must be .*got -1"),
        ({"seeds": [2**64]}, "seed must be .*got 18446744073709551616"),
    ],
)
def test_a_fork_that_is_refused_names_why_and_changes_nothing(
    tiny: folo.Params, arguments: dict[str, Any], message: str
) -> None:
    state = started(tiny)
    state = folo.abort(folo.submit(state, folo.Request([3], LONG, "done")), "done")
    unharmed(tiny, state, lambda: folo.fork(state, **{"id": "a", "children": ["b"], **arguments}), message)
