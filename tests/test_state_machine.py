"""Random programs over states: whatever is done between steps, each request's output is its own.

After every transition `folo.check` recounts the state, and every output is compared with what the
same request gives alone, in a fresh state with other block size and budget.
"""

from __future__ import annotations

import itertools
import os
from typing import Any

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import folo

# Few distinct tokens and lengths around the block sizes make shared prefixes and full blocks common.
MAX_MODEL_LEN = 64
PROMPTS = st.builds(
    lambda stem, tail: (list(range(3, 40)) * 2)[:stem] + tail,
    st.sampled_from([0, 7, 8, 16, 16, 32, 33, 40]),
    st.sampled_from([[3], [4], [5, 6], [3] * 8]),
)
SAMPLING = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 1.0]),
        "max_tokens": st.sampled_from([1, 3, 12, 24, 24]),
        "seed": st.integers(0, 3),
        "logprobs": st.sampled_from([None, 0, 2]),
        "prompt_logprobs": st.sampled_from([None, None, None, 1]),
        "top_k": st.sampled_from([0, 5]),
        "repetition_penalty": st.sampled_from([1.0, 1.3]),
        "n": st.sampled_from([1, 1, 1, 3]),
    }
)


def sampling_params(values: dict[str, Any]) -> folo.SamplingParams:
    greedy = values["temperature"] == 0
    return folo.SamplingParams(**{**values, "n": 1 if greedy else values["n"]}, ignore_eos=True)


_alone: dict[Any, folo.RequestOutput] = {}


def alone(params: folo.Params, request: folo.Request) -> folo.RequestOutput:
    """What the request gives in a state of its own: the oracle, recomputed from scratch."""
    key = (request.prompt_token_ids, request.sampling)
    if key not in _alone:
        cache = folo.CacheConfig(block_size=32, num_blocks=64, enable_prefix_caching=False)
        state = folo.init(params, cache, folo.SchedulerConfig(max_model_len=MAX_MODEL_LEN))
        state = folo.submit(state, request)
        while (batch := folo.schedule(state)) is not None:
            state, _ = folo.step(params, state, batch)
        _alone[key] = folo.outputs(state)[request.id]
    return _alone[key]


class Program(RuleBasedStateMachine):
    """Holds several states at once, and acts on any of them."""

    params: folo.Params

    @initialize(
        block_size=st.sampled_from([8, 16]),
        num_blocks=st.sampled_from([8, 10, 14, 40]),
        budget=st.sampled_from([5, 16, 64]),
        seqs=st.sampled_from([2, 4, 8]),
        caching=st.sampled_from([True, True, False]),
        policy=st.sampled_from(["fcfs", "priority"]),
        threshold=st.sampled_from([0, 6]),
    )
    def start(
        self,
        block_size: int,
        num_blocks: int,
        budget: int,
        seqs: int,
        caching: bool,
        policy: Any,
        threshold: int,
    ) -> None:
        state = folo.init(
            self.params,
            folo.CacheConfig(
                block_size=block_size,
                num_blocks=num_blocks,
                reserve_blocks=4 * num_blocks,
                enable_prefix_caching=caching,
            ),
            folo.SchedulerConfig(
                max_num_seqs=seqs,
                max_num_batched_tokens=budget,
                max_model_len=MAX_MODEL_LEN,
                long_prefill_token_threshold=threshold,
                policy=policy,
            ),
        )
        self.held = [state]
        self.sampling: dict[str, folo.SamplingParams] = {}
        self.names = (f"r{n}" for n in itertools.count())

    @property
    def state(self) -> folo.EngineState:
        return self.held[-1]

    @state.setter
    def state(self, state: folo.EngineState) -> None:
        self.held[-1] = state

    @rule(
        prompts=st.lists(PROMPTS, min_size=1, max_size=6),
        values=SAMPLING,
        priority=st.integers(0, 2),
        salt=st.sampled_from(["", "", "s"]),
    )
    def submit(self, prompts: list[list[int]], values: dict[str, Any], priority: int, salt: str) -> None:
        for prompt in prompts:
            request = folo.Request(prompt, sampling_params(values), next(self.names), priority, salt)
            self.sampling[request.id] = request.sampling
            self.state = folo.submit(self.state, request)

    @rule(steps=st.integers(1, 8))
    def step(self, steps: int) -> None:
        for _ in range(steps):
            batch = folo.schedule(self.state)
            if batch is None:
                break
            self.state, _ = folo.step(self.params, self.state, batch)
            folo.check(self.state)

    @rule()
    def step_twice(self) -> None:
        batch = folo.schedule(self.state)
        if batch is not None:
            first, tokens = folo.step(self.params, self.state, batch)
            second, again = folo.step(self.params, self.state, batch)
            assert torch.equal(tokens.ids, again.ids)
            assert tokens.request_ids == again.request_ids
            assert folo.outputs(first) == folo.outputs(second)
            assert (first.pool.used, len(first.pool.idle)) == (second.pool.used, len(second.pool.idle))
            folo.check(first)
            self.state = second

    @rule()
    def drop_a_batch(self) -> None:
        before = folo.outputs(self.state)
        folo.schedule(self.state)
        assert folo.outputs(self.state) == before

    @rule(pick=st.integers(0, 99), how=st.sampled_from(["abort", "finish"]))
    def end(self, pick: int, how: str) -> None:
        ids = list(folo.outputs(self.state))
        if ids:
            id = ids[pick % len(ids)]
            self.state = folo.abort(self.state, id) if how == "abort" else folo.finish(self.state, id, "stop")

    @precondition(lambda self: len(self.held) < 4)
    @rule()
    def hold(self) -> None:
        self.held.append(self.state)

    @rule(pick=st.integers(0, 99))
    def rewind(self, pick: int) -> None:
        self.held.append(self.held.pop(pick % len(self.held)))

    @precondition(lambda self: len(self.held) > 1)
    @rule(pick=st.integers(0, 99))
    def drop(self, pick: int) -> None:
        self.held.pop(pick % len(self.held))

    @rule()
    def collect(self) -> None:
        self.state, done = folo.collect(self.state)
        self.compare(done)

    @invariant()
    def sound(self) -> None:
        if hasattr(self, "held"):
            folo.check(self.state)

    def compare(self, outputs: dict[str, folo.RequestOutput]) -> None:
        for output in outputs.values():
            request = folo.Request(output.prompt_token_ids, self.sampling[output.request_id], "alone")
            expected = alone(self.params, request)
            for mine, full in zip(output.outputs, expected.outputs, strict=True):
                count = len(mine.token_ids)
                assert mine.token_ids == full.token_ids[:count]
                if full.logprobs is not None:
                    assert mine.logprobs == full.logprobs[:count]
                if mine.finish_reason == "length":
                    assert mine == full
            if all(o.finish_reason == "length" for o in output.outputs):
                assert output.prompt_logprobs == expected.prompt_logprobs

    def teardown(self) -> None:
        if not hasattr(self, "held"):
            return
        heap = self.held[0].heap
        while self.held:
            self.run_out(self.held.pop())
        assert heap.num_free == heap.num_blocks

    def run_out(self, state: folo.EngineState) -> None:
        steps = 0
        while (batch := folo.schedule(state)) is not None:
            state, _ = folo.step(self.params, state, batch)
            folo.check(state)
            assert (steps := steps + 1) < 5000, "it ends much earlier, unless something starves"
        assert not folo.has_unfinished(state)
        state, done = folo.collect(state)
        self.compare(done)
        assert state.pool.used == 0


def test_random_programs_leave_every_state_valid_and_every_output_its_own(tiny: folo.Params) -> None:
    Program.params = tiny
    programs = int(os.environ.get("FOLO_PROGRAMS", "100"))
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large]
    run_state_machine_as_test(
        Program,
        settings=settings(
            max_examples=programs, stateful_step_count=30, deadline=None, suppress_health_check=checks
        ),
    )
