"""`folo.rebind` and `folo.reconfigure`: other weights or limits around the same requests."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import tiny_checkpoint
from engine import finish_all, prompt, stepped
from torch.utils import _pytree as pytree

import folo


@pytest.fixture(scope="module")
def other(tiny: folo.Params) -> folo.Params:
    """The same architecture with other weights."""
    params: Any = pytree.tree_map(lambda leaf: leaf.flip(0).contiguous(), tiny)
    return params


def sampling(seed: int, **options: Any) -> folo.SamplingParams:
    return folo.SamplingParams(**{"seed": seed, "max_tokens": 12, "ignore_eos": True, **options})


def begun(params: folo.Params, steps: int = 5, **limits: Any) -> folo.EngineState:
    scheduler = folo.SchedulerConfig(**{"max_num_batched_tokens": 32, "max_num_seqs": 4, **limits})
    state = folo.init(params, folo.CacheConfig(block_size=8, num_blocks=40), scheduler)
    for n in range(4):
        request = folo.Request(prompt(9 + 8 * n, n), sampling(n, logprobs=1), str(n), priority=-n)
        state = folo.submit(state, request)
    for _ in range(steps):
        batch = folo.schedule(state)
        assert batch is not None
        state, _ = folo.step(params, state, batch)
    return state


def alone(params: folo.Params, request: folo.Request) -> folo.CompletionOutput:
    state = folo.submit(folo.init(params, folo.CacheConfig(num_blocks=40)), request)
    return folo.outputs(finish_all(params, state))[request.id].outputs[0]


def test_after_rebind_each_token_is_the_new_weights_own(tiny: folo.Params, other: folo.Params) -> None:
    old = begun(tiny)
    state = folo.rebind(old, other)
    folo.check(state)
    assert folo.stats(state).blocks_used == folo.stats(state).blocks_cached == 0
    before, after = folo.outputs(old), folo.outputs(finish_all(other, state))
    assert any(before[id].outputs[0].token_ids for id in before)
    for id, output in after.items():
        kept = before[id].outputs[0].token_ids
        ids = output.outputs[0].token_ids
        assert ids[: len(kept)] == kept
        rest = sampling(int(id), logprobs=1, max_tokens=12 - len(kept))
        fresh = alone(other, folo.Request([*output.prompt_token_ids, *kept], rest))
        assert ids[len(kept) :] == fresh.token_ids
        logprobs, fresh_logprobs = output.outputs[0].logprobs, fresh.logprobs
        assert logprobs is not None
        assert fresh_logprobs is not None
        assert logprobs == [*(before[id].outputs[0].logprobs or []), *fresh_logprobs]


def test_the_old_state_goes_on_with_the_old_weights(tiny: folo.Params, other: folo.Params) -> None:
    state = begun(tiny)
    expected = folo.outputs(finish_all(tiny, state))
    finish_all(other, folo.rebind(state, other))
    assert folo.outputs(finish_all(tiny, state)) == expected


@pytest.mark.parametrize("length", [9, 30], ids=["scored to its end", "scored in part"])
def test_a_prompt_without_output_is_scored_by_the_new_weights_alone(
    tiny: folo.Params, other: folo.Params, length: int
) -> None:
    request = folo.Request(prompt(length), sampling(0, prompt_logprobs=2))
    scheduler = folo.SchedulerConfig(max_num_batched_tokens=8)
    state = folo.submit(folo.init(tiny, folo.CacheConfig(num_blocks=40), scheduler), request)
    batch = folo.schedule(state)
    assert batch is not None
    state, _ = folo.step(tiny, state, batch)
    state = finish_all(other, folo.rebind(state, other))
    fresh = folo.submit(folo.init(other, folo.CacheConfig(num_blocks=40)), request)
    expected = folo.outputs(finish_all(other, fresh))["0"]
    assert folo.outputs(state)["0"].prompt_logprobs == expected.prompt_logprobs


def test_a_prompt_with_output_keeps_the_scores_of_the_old_ones(tiny: folo.Params, other: folo.Params) -> None:
    request = folo.Request(prompt(9), sampling(0, prompt_logprobs=2), "a")
    state = stepped(tiny, folo.submit(folo.init(tiny, folo.CacheConfig(num_blocks=40)), request))
    after = finish_all(other, folo.rebind(state, other))
    assert folo.outputs(after)["a"].prompt_logprobs == folo.outputs(state)["a"].prompt_logprobs


def test_so_is_one_whose_fork_was_forced_an_output(tiny: folo.Params, other: folo.Params) -> None:
    request = folo.Request(prompt(30), sampling(0, prompt_logprobs=0, logprobs=0), "a")
    scheduler = folo.SchedulerConfig(max_num_batched_tokens=8)
    state = folo.submit(folo.init(tiny, folo.CacheConfig(num_blocks=40), scheduler), request)
    state = folo.fork(stepped(tiny, state), "a", ["b"], append=[7])
    output = folo.outputs(finish_all(other, folo.rebind(state, other)))["b"]
    assert shown(output) == scored(other, [*output.prompt_token_ids, *output.outputs[0].token_ids])


def test_weights_of_another_model_are_refused(tiny: folo.Params, tmp_path: Path) -> None:
    state = begun(tiny)
    tiny_checkpoint(tmp_path, "llama")
    for params, name in (
        (folo.load(str(tmp_path), use_tqdm=False), "config.architecture"),
        (pytree.tree_map(torch.Tensor.half, tiny), "dtype"),
    ):
        with pytest.raises(folo.ParamsMismatchError, match=name):
            folo.rebind(state, params)
    batch = folo.schedule(state)
    assert batch is not None
    folo.step(tiny, state, batch)


def test_a_state_is_stepped_with_its_own_weights_only(tiny: folo.Params, other: folo.Params) -> None:
    state = folo.rebind(begun(tiny), other)
    batch = folo.schedule(state)
    assert batch is not None
    with pytest.raises(folo.ParamsMismatchError, match="step it with those"):
        folo.step(tiny, state, batch)


@pytest.mark.parametrize(
    "limits",
    [
        {"max_num_seqs": 1},
        {"max_num_seqs": 2, "policy": "priority"},
        {"max_num_batched_tokens": 5},
        {"long_prefill_token_threshold": 3},
        {"max_model_len": 60},
    ],
)
def test_other_limits_change_no_result(tiny: folo.Params, limits: dict[str, Any]) -> None:
    state = begun(tiny)
    expected = folo.outputs(finish_all(tiny, state))
    changed = folo.reconfigure(
        state, folo.SchedulerConfig(**{"max_num_seqs": 4, "max_num_batched_tokens": 32, **limits})
    )
    folo.check(changed)
    numbers = folo.stats(changed)
    assert numbers.running <= changed.scheduler.max_num_seqs
    assert numbers.preemptions == max(0, len(state.running) - changed.scheduler.max_num_seqs)
    outputs = folo.outputs(finish_all(tiny, changed))
    assert {id: o.outputs for id, o in outputs.items()} == {id: o.outputs for id, o in expected.items()}


def test_another_policy_orders_who_is_there_already(tiny: folo.Params) -> None:
    state = begun(tiny, steps=0)
    assert [s.id for s in state.waiting] == ["0", "1", "2", "3"]
    scheduler = replace(state.scheduler, policy="priority")
    assert [s.id for s in folo.reconfigure(state, scheduler).waiting] == ["3", "2", "1", "0"]


def test_a_shorter_limit_ends_sequences_there(tiny: folo.Params) -> None:
    state = folo.reconfigure(
        begun(tiny), folo.SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=32, max_model_len=40)
    )
    outputs = folo.outputs(finish_all(tiny, state))
    assert [len(o.outputs[0].token_ids) for o in outputs.values()] == [12, 12, 12, 7]


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"max_model_len": 36}, r"max_model_len=36 .*'3'.*finish it first"),
        ({"max_model_len": 400}, "max_model_len=400 exceeds"),
        ({"max_num_batched_tokens": 4096}, r"max_num_batched_tokens=4096 .*reserve_blocks"),
        ({"max_num_seqs": 200}, r"max_num_seqs=200 .*reserve_blocks"),
    ],
)
def test_limits_that_cannot_be_kept_are_refused(
    tiny: folo.Params, limits: dict[str, Any], message: str
) -> None:
    state = begun(tiny)
    scheduler = folo.SchedulerConfig(**{"max_num_seqs": 4, "max_num_batched_tokens": 32, **limits})
    with pytest.raises(folo.ConfigError, match=message):
        folo.reconfigure(state, scheduler)
    folo.check(state)


def test_a_reserve_leaves_room_for_larger_limits(tiny: folo.Params) -> None:
    cache = folo.CacheConfig(block_size=8, num_blocks=40, reserve_blocks=600)
    state = folo.init(tiny, cache, folo.SchedulerConfig(max_num_seqs=1, max_num_batched_tokens=8))
    for n in range(6):
        state = folo.submit(state, folo.Request(prompt(30, n), sampling(n), str(n)))
    state = folo.reconfigure(state, folo.SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=4096))
    batch = folo.schedule(state)
    assert batch is not None
    assert batch.num_tokens == 180
    folo.check(finish_all(tiny, state))


SCORED = {"max_tokens": 3, "prompt_logprobs": 0, "logprobs": 3}


def scored(params: folo.Params, ids: list[int]) -> list[float]:
    """The log-probabilities of the tokens from the second on, as these weights score them in a prompt."""
    asked = folo.SamplingParams(max_tokens=1, prompt_logprobs=0)
    state = folo.submit(folo.init(params, folo.CacheConfig(num_blocks=40)), folo.Request(ids, asked, "a"))
    table = folo.outputs(finish_all(params, state))["a"].prompt_logprobs
    assert table is not None
    return [next(iter(entry.values())).logprob for entry in table if entry is not None]


def shown(output: folo.RequestOutput) -> list[float]:
    """The log-probabilities of an output's prompt, from the second token on, and of its own tokens."""
    assert output.prompt_logprobs is not None
    assert output.outputs[0].logprobs is not None
    tokens = [*output.prompt_token_ids[1:], *output.outputs[0].token_ids]
    tables = [entry for entry in output.prompt_logprobs if entry is not None] + output.outputs[0].logprobs
    return [table[token].logprob for token, table in zip(tokens, tables, strict=True)]


@pytest.mark.parametrize("running", [True, False])
def test_what_becomes_a_prompt_after_rebind_is_scored_by_the_new_weights(
    tiny: folo.Params, other: folo.Params, running: bool
) -> None:
    request = folo.Request(prompt(9), sampling(1, **SCORED), "a")
    state = folo.submit(folo.init(tiny, folo.CacheConfig(num_blocks=40)), request)
    if running:  # two of its three tokens are there
        for _ in range(2):
            batch = folo.schedule(state)
            assert batch is not None
            state, _ = folo.step(tiny, state, batch)
    else:
        state = finish_all(tiny, state)
    sampled = folo.outputs(state)["a"]
    state = folo.rebind(state, other)
    assert shown(folo.outputs(state)["a"]) == shown(sampled), "what was sampled keeps its logprobs"
    forked = folo.outputs(finish_all(other, folo.fork(state, "a", ["b"], keep=9)))["b"]
    extended = folo.outputs(finish_all(other, folo.extend(state, "a", [7, 8])))["a"]
    for output in (forked, extended):
        ids = [*output.prompt_token_ids, *output.outputs[0].token_ids]
        assert shown(output) == scored(other, ids)


def test_a_token_forced_after_rebind_is_scored_by_the_new_weights(
    tiny: folo.Params, other: folo.Params
) -> None:
    request = folo.Request(prompt(9), sampling(1, max_tokens=5, logprobs=3), "a")
    old = finish_all(tiny, folo.submit(folo.init(tiny, folo.CacheConfig(num_blocks=40)), request))
    table = folo.outputs(old)["a"].outputs[0].logprobs
    assert table is not None
    likely, rare = list(table[2])[1], next(id for id in range(300) if id not in table[2])
    state = folo.fork(folo.rebind(old, other), "a", ["b", "c"], keep=11, append=[[likely], [rare]])
    for id, output in folo.outputs(finish_all(other, state)).items():
        if id == "a":
            continue
        ids, tables = output.outputs[0].token_ids, output.outputs[0].logprobs
        assert tables is not None
        expected = scored(other, [*output.prompt_token_ids, *ids])[-len(ids) :]
        got = [table[token].logprob for token, table in zip(ids, tables, strict=True)]
        assert got[2:] == expected[2:]
        assert got[:2] != expected[:2], "sampled before: by the old weights"
