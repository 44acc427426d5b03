"""Who runs when: budgets, order, preemption, sharing."""

from __future__ import annotations

import pytest
from engine import finish_all, ids_of, prompt, run

import folo
from folo.state.heap import Block

LONG = folo.SamplingParams(temperature=1.0, max_tokens=20, ignore_eos=True)


def state_of(
    params: folo.Params, cache: folo.CacheConfig | None = None, **scheduler: int | str | None
) -> folo.EngineState:
    cache = folo.CacheConfig(num_blocks=64) if cache is None else cache
    return folo.init(params, cache, folo.SchedulerConfig(**scheduler))  # pyright: ignore[reportArgumentType]


def submit_all(state: folo.EngineState, lengths: list[int]) -> folo.EngineState:
    for n, length in enumerate(lengths):
        state = folo.submit(state, folo.Request(prompt(length, n), LONG, str(n)))
    return state


def plan(state: folo.EngineState) -> list[tuple[str, int, int]]:
    batch = folo.schedule(state)
    assert batch is not None
    return [(s.sequence.id, s.start, s.num_tokens) for s in batch.scheduled]


def step(params: folo.Params, state: folo.EngineState) -> folo.EngineState:
    batch = folo.schedule(state)
    assert batch is not None
    state, _ = folo.step(params, state, batch)
    folo.check(state)
    return state


def test_an_empty_state_has_no_batch(tiny: folo.Params) -> None:
    assert folo.schedule(state_of(tiny)) is None


def test_decodes_go_first_and_prefill_chunks_fill_the_budget(tiny: folo.Params) -> None:
    state = submit_all(state_of(tiny, max_num_batched_tokens=10), [4, 3, 50])
    assert plan(state) == [("0", 0, 4), ("1", 0, 3), ("2", 0, 3)]
    state = step(tiny, state)
    assert plan(state) == [("0", 4, 1), ("1", 3, 1), ("2", 3, 8)]
    state = step(tiny, state)
    assert plan(state) == [("0", 5, 1), ("1", 4, 1), ("2", 11, 8)]


def test_long_prefills_are_cut_at_the_threshold(tiny: folo.Params) -> None:
    state = submit_all(state_of(tiny, long_prefill_token_threshold=6), [50, 50])
    assert plan(state) == [("0", 0, 6), ("1", 0, 6)]


def test_no_more_than_max_num_seqs_run(tiny: folo.Params) -> None:
    state = submit_all(state_of(tiny, max_num_seqs=2), [4] * 5)
    seen: list[int] = []
    finish_all(tiny, state, lambda s: seen.append(len(s.running)))
    assert max(seen) == 2


@pytest.mark.parametrize(("policy", "order"), [("fcfs", "0123"), ("priority", "3210")])
def test_the_policy_orders_admission(tiny: folo.Params, policy: str, order: str) -> None:
    state = state_of(tiny, max_num_seqs=1, policy=policy)
    for n in range(4):
        one = folo.SamplingParams(temperature=0, max_tokens=1)
        state = folo.submit(state, folo.Request(prompt(4), one, str(n), priority=-n))
    admitted = ""
    while (batch := folo.schedule(state)) is not None:
        admitted += "".join(s.sequence.id for s in batch.scheduled)
        state, _ = folo.step(tiny, state, batch)
    assert admitted == order


def test_the_latest_is_preempted_and_gives_the_same_tokens(tiny: folo.Params) -> None:
    cache = folo.CacheConfig(block_size=8, num_blocks=8, enable_prefix_caching=False)
    state = submit_all(state_of(tiny, cache), [9, 9, 9, 9])
    preempted: list[str] = []
    while (batch := folo.schedule(state)) is not None:
        preempted += [s.id for s in batch.preempted]
        assert all(s.sequence not in batch.preempted for s in batch.scheduled)
        state, _ = folo.step(tiny, state, batch)
        folo.check(state)
    assert preempted[0] == "3"
    assert "0" not in preempted
    assert state.counters.preemptions == len(preempted)
    ample = folo.outputs(finish_all(tiny, submit_all(state_of(tiny), [9, 9, 9, 9])))
    assert [o.outputs for o in folo.outputs(state).values()] == [o.outputs for o in ample.values()]


def test_nobody_overtakes_a_request_that_does_not_fit_yet(tiny: folo.Params) -> None:
    state = submit_all(state_of(tiny, folo.CacheConfig(block_size=8, num_blocks=8)), [30, 50, 4])
    assert plan(state) == [("0", 0, 30)]


def test_what_a_preemption_frees_is_not_given_to_who_waits(tiny: folo.Params) -> None:
    cache = folo.CacheConfig(block_size=8, num_blocks=8, enable_prefix_caching=False)
    state = step(tiny, step(tiny, submit_all(state_of(tiny, cache), [15, 41])))  # all 8 blocks, and full
    batch = folo.schedule(folo.submit(state, folo.Request(prompt(4), LONG, "2")))
    assert batch is not None
    assert [s.id for s in batch.preempted] == ["1"]
    assert [s.sequence.id for s in batch.scheduled] == ["0"]


def test_who_is_in_the_batch_already_is_not_preempted(tiny: folo.Params) -> None:
    cache = folo.CacheConfig(block_size=8, num_blocks=8, enable_prefix_caching=False)
    state = step(tiny, step(tiny, submit_all(state_of(tiny, cache), [15, 41])))  # all 8 blocks, and full
    batch = folo.schedule(folo.extend(state, "0", [7] * 9))
    assert batch is not None
    assert [s.sequence.id for s in batch.scheduled] == ["1"], "decodes go first"
    assert not batch.preempted


def test_a_decode_without_a_block_gives_way_to_who_came_before(tiny: folo.Params) -> None:
    cache = folo.CacheConfig(block_size=8, num_blocks=8, enable_prefix_caching=False)
    state = step(tiny, step(tiny, submit_all(state_of(tiny, cache), [15, 47])))  # both need a block more
    state = folo.extend(state, "0", [7] * 9)
    batch = folo.schedule(state)
    assert batch is not None
    assert plan(state) == [("0", 16, 10)]
    assert [s.id for s in batch.preempted] == ["1"]


def test_blocks_for_the_rest_of_a_prompt_are_not_given_to_who_waits(tiny: folo.Params) -> None:
    cache = folo.CacheConfig(block_size=8, num_blocks=8)
    state = submit_all(state_of(tiny, cache, long_prefill_token_threshold=16), [50, 9])
    assert plan(state) == [("0", 0, 16)]


def test_decodes_keep_to_the_budget(tiny: folo.Params) -> None:
    state = step(tiny, submit_all(state_of(tiny), [4] * 5))
    state = folo.reconfigure(state, folo.SchedulerConfig(max_num_batched_tokens=3))
    assert plan(state) == [("0", 4, 1), ("1", 4, 1), ("2", 4, 1)]


def test_branches_that_decode_keep_to_the_budget(tiny: folo.Params) -> None:
    state = step(tiny, submit_all(state_of(tiny, max_num_batched_tokens=3), [3]))
    state = folo.fork(state, "0", ["a", "b", "c", "d"])
    while (batch := folo.schedule(state)) is not None:
        assert batch.num_tokens <= 3
        assert all(item.num_tokens for item in batch.scheduled)
        state, _ = folo.step(tiny, state, batch)


def test_what_the_cache_has_of_a_preempted_request_is_not_what_it_found_at_first(tiny: folo.Params) -> None:
    state = step(tiny, submit_all(state_of(tiny), [9, 17]))
    fewer = folo.reconfigure(state, folo.SchedulerConfig(max_num_seqs=1))
    again = step(tiny, folo.reconfigure(fewer, state.scheduler))
    assert again.counters.prefix_hits == 16
    assert [output.num_cached_tokens for output in folo.outputs(again).values()] == [0, 0]


def test_nobody_starves_under_fcfs(tiny: folo.Params) -> None:
    """Requests keep coming, the pool is too small for them: the first ones still finish first."""
    cache = folo.CacheConfig(block_size=8, num_blocks=8)
    state = submit_all(state_of(tiny, cache, max_num_batched_tokens=16), [20, 20, 20])
    finished: list[str] = []
    for n in range(3, 60):
        state = folo.submit(state, folo.Request(prompt(12, n), LONG, str(n)))
        for _ in range(8):
            state = step(tiny, state)
            state, done = folo.collect(state)
            finished += done
    assert finished[:3] == ["0", "1", "2"]
    assert finished == sorted(finished, key=int)


def test_equal_prefixes_are_computed_once_even_within_one_step(tiny: folo.Params) -> None:
    shared = prompt(48)
    one = folo.SamplingParams(temperature=0, max_tokens=2)
    state = state_of(tiny)
    for n in range(3):
        state = folo.submit(state, folo.Request([*shared, 7 + n], one, str(n)))
    assert plan(state) == [("0", 0, 49), ("1", 48, 1), ("2", 48, 1)]
    state = step(tiny, state)
    tables = [s.table.blocks for s in state.running]
    assert len({b.index for b in tables[0][:3] + tables[1][:3] + tables[2][:3]}) == 3
    state = finish_all(tiny, state)
    state = folo.submit(state, folo.Request([*shared, 11], one, "later"))
    state = finish_all(tiny, state)
    assert folo.outputs(state)["later"].num_cached_tokens == 48
    assert folo.outputs(state)["0"].num_cached_tokens == 0
    alone = run(tiny, [folo.Request([*shared, 11], one, "later")])["later"]
    assert folo.outputs(state)["later"].outputs == alone.outputs


def test_a_hit_leaves_the_last_token_to_compute(tiny: folo.Params) -> None:
    one = folo.SamplingParams(temperature=0, max_tokens=1)
    state = finish_all(tiny, folo.submit(state_of(tiny), folo.Request(prompt(32), one, "a")))
    assert plan(folo.submit(state, folo.Request(prompt(32), one, "b"))) == [("b", 16, 16)]


def test_a_hit_is_no_block_to_be_taken_and_none_that_is_free(tiny: folo.Params) -> None:
    one = folo.SamplingParams(temperature=0, max_tokens=1)
    state = state_of(tiny, folo.CacheConfig(block_size=8, num_blocks=4))
    state = finish_all(tiny, folo.submit(state, folo.Request(prompt(17), one, "a")))
    state = folo.submit(state, folo.Request([*prompt(17), *prompt(8)], one, "b"))  # 2 of the 4 are cached
    state = folo.submit(state, folo.Request(prompt(9, 1), one, "c"))
    assert plan(state) == [("b", 16, 9)]
    folo.check(finish_all(tiny, state))


def test_another_salt_shares_nothing(tiny: folo.Params) -> None:
    one = folo.SamplingParams(temperature=0, max_tokens=1)
    state = finish_all(tiny, folo.submit(state_of(tiny), folo.Request(prompt(32), one, "a")))
    assert plan(folo.submit(state, folo.Request(prompt(32), one, "b", cache_salt="s"))) == [("b", 0, 32)]


def test_samples_share_the_blocks_of_the_prompt(tiny: folo.Params) -> None:
    for caching in (True, False):
        cache = folo.CacheConfig(num_blocks=64, enable_prefix_caching=caching)
        many = folo.SamplingParams(temperature=1.0, n=4, max_tokens=6, ignore_eos=True)
        state = folo.submit(state_of(tiny, cache, max_num_seqs=2), folo.Request(prompt(40), many, "a"))
        assert plan(state) == [("a", 0, 40), ("a", 32, 8)]
        batch = folo.schedule(state)
        assert batch is not None
        assert all(not isinstance(block, Block) for block in batch.scheduled[1].reused)
        state = step(tiny, state)
        first, second = (s.table.blocks for s in state.running)
        assert first[:2] == second[:2]
        assert first[2] is not second[2]
        outputs = folo.outputs(finish_all(tiny, state))["a"].outputs
        assert [o.index for o in outputs] == [0, 1, 2, 3]
        assert len({tuple(o.token_ids) for o in outputs}) == 4


def test_a_late_sample_copies_the_tail_of_the_prompt(tiny: folo.Params) -> None:
    cache = folo.CacheConfig(num_blocks=64, enable_prefix_caching=False)
    two = folo.SamplingParams(temperature=1.0, n=2, max_tokens=6, ignore_eos=True)
    state = folo.submit(state_of(tiny, cache, max_num_batched_tokens=40), folo.Request(prompt(40), two, "a"))
    state = step(tiny, state)
    assert plan(state) == [("a", 40, 1), ("a", 39, 1)]
    state = step(tiny, state)
    first, second = (s.table.blocks for s in state.running)
    assert first[:2] == second[:2]
    assert first[2] is not second[2]


def test_a_late_sample_waits_for_a_block_to_copy_to(tiny: folo.Params) -> None:
    cache = folo.CacheConfig(block_size=8, num_blocks=2, enable_prefix_caching=False)
    two = folo.SamplingParams(n=2, max_tokens=3, ignore_eos=True)
    state = step(tiny, folo.submit(state_of(tiny, cache), folo.Request(prompt(12), two, "a")))
    assert plan(state) == [("a", 12, 1)]
    outputs = folo.outputs(finish_all(tiny, state))["a"].outputs
    assert [len(output.token_ids) for output in outputs] == [3, 3]


def test_blocks_are_taken_when_written(tiny: folo.Params) -> None:
    state = submit_all(state_of(tiny, folo.CacheConfig(block_size=8, num_blocks=64)), [9, 30, 17])
    state = step(tiny, state)
    while state.running:
        for sequence in state.running:
            assert len(sequence.table.blocks) == -(-sequence.num_computed // 8)
        batch = folo.schedule(state)
        assert batch is not None
        state, _ = folo.step(tiny, state, batch)
    assert state.pool.used == 0


def test_the_oldest_leaf_is_evicted_first(tiny: folo.Params) -> None:
    one = folo.SamplingParams(temperature=0, max_tokens=1)
    cache = folo.CacheConfig(block_size=8, num_blocks=8)
    state = state_of(tiny, cache)
    for n in range(3):  # each leaves 2 full blocks idle
        state = finish_all(tiny, folo.submit(state, folo.Request(prompt(17, n), one, str(n))))
    assert len(state.pool.idle) == 6
    state = finish_all(tiny, folo.submit(state, folo.Request(prompt(17, 0), one, "again")))
    state = finish_all(tiny, folo.submit(state, folo.Request(prompt(33, 9), one, "large")))  # takes 5
    hits = {}
    for n in range(3):
        batch = folo.schedule(folo.submit(state, folo.Request(prompt(17, n), one, f"probe {n}")))
        assert batch is not None
        hits[n] = batch.scheduled[0].start
    assert hits == {0: 16, 1: 0, 2: 8}


def test_later_requests_do_not_take_the_blocks_that_an_admitted_prompt_still_needs(tiny: folo.Params) -> None:
    cache = folo.CacheConfig(block_size=8, num_blocks=30)

    def steps_to_the_first_token(lengths: list[int]) -> int:
        state = state_of(tiny, cache, max_num_batched_tokens=64, long_prefill_token_threshold=16)
        state = submit_all(state, lengths)
        while not folo.outputs(state)["0"].outputs[0].token_ids:
            state = step(tiny, state)
        return state.counters.steps

    assert steps_to_the_first_token([200]) == 13
    assert steps_to_the_first_token([200, *[16] * 8]) == 13


def test_a_sample_that_waits_for_its_prompt_holds_up_nobody(tiny: folo.Params) -> None:
    two = folo.SamplingParams(temperature=1.0, n=2, max_tokens=6, ignore_eos=True)
    state = state_of(tiny, max_num_batched_tokens=64, long_prefill_token_threshold=16)
    state = folo.submit(state, folo.Request(prompt(100), two, "a"))
    state = folo.submit(state, folo.Request(prompt(5), LONG, "b"))
    assert plan(state) == [("a", 0, 16), ("b", 0, 5)]
    outputs = folo.outputs(finish_all(tiny, state))
    assert outputs["a"].outputs == run(tiny, [folo.Request(prompt(100), two, "a")])["a"].outputs


def test_only_lookups_in_the_cache_count_as_queries(tiny: folo.Params) -> None:
    two = folo.SamplingParams(temperature=1.0, n=2, max_tokens=2, ignore_eos=True)
    for caching, counted in ((False, (0, 0)), (True, (80, 32))):
        cache = folo.CacheConfig(num_blocks=64, enable_prefix_caching=caching)
        state = folo.submit(state_of(tiny, cache), folo.Request(prompt(40), two, "a"))
        state = finish_all(tiny, state)
        state = finish_all(tiny, folo.submit(state, folo.Request(prompt(40), two, "b")))
        assert (state.counters.prefix_queries, state.counters.prefix_hits) == counted


@pytest.mark.parametrize("computed", [23, 24])  # the third block is about to be full, or just is
def test_a_prompt_takes_cached_blocks_and_none_that_follows_others_of_their_content(
    tiny: folo.Params, computed: int
) -> None:
    """Others may be in use beside the cached ones: of a prompt that is scored, and so computed anew."""
    state, ids = state_of(tiny, folo.CacheConfig(block_size=8, num_blocks=64)), prompt(18)
    two = folo.SamplingParams(temperature=1.0, n=2, max_tokens=12, ignore_eos=True, prompt_logprobs=0)
    cached = folo.submit(state, folo.Request(ids, folo.SamplingParams(max_tokens=1), "cached"))
    state = folo.submit(finish_all(tiny, cached), folo.Request(ids, two, "scored"))
    while len(scored := [*ids, *ids_of(state, "scored")]) <= computed:
        state = step(tiny, state)
    later = folo.Request([*scored[:24], 7, 7, 7], LONG, "later")
    expected = run(tiny, [later])["later"].outputs
    state = finish_all(tiny, folo.submit(state, later))
    assert folo.outputs(state)["later"].num_cached_tokens == 16
    assert folo.outputs(state)["later"].outputs == expected


def test_contents_of_one_digest_are_kept_apart(tiny: folo.Params, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [folo.Request(prompt(length, n), LONG, str(n)) for n, length in enumerate((18, 20, 40))]
    requests += [folo.Request(requests[n].prompt_token_ids, LONG, f"{n} again") for n in (0, 2)]
    expected = {request.id: run(tiny, [request])[request.id].outputs for request in requests}
    for module in ("pool", "check"):  # the number of the block is all that it tells
        monkeypatch.setattr(f"folo.state.{module}.block_digest", lambda parent, ids, salt: parent + b".")
    state = state_of(tiny, folo.CacheConfig(block_size=8, num_blocks=64))
    for request in requests:
        state = step(tiny, folo.submit(state, request))
    outputs = folo.outputs(finish_all(tiny, state))
    assert {id: output.outputs for id, output in outputs.items()} == expected
    assert [output.num_cached_tokens for output in outputs.values()] == [0, 0, 0, 16, 0]


def test_looking_for_the_oldest_idle_block_does_not_walk_through_all_of_history(tiny: folo.Params) -> None:
    one = folo.SamplingParams(temperature=0, max_tokens=1)
    state = state_of(tiny)
    for n in range(20):
        state = finish_all(tiny, folo.submit(state, folo.Request(prompt(49), one, str(n))))
    assert state.pool.clock - state.pool.oldest <= 3
