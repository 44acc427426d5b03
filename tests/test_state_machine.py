"""Random programs over states: whatever is done between steps, each request's output is its own.

After every transition `folo.check` recounts the state, and every output is compared with what the
same request gives alone, recomputed token by token by no state at all (`engine.Oracle`).
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engine import Oracle, Recipe, finish_all, prompt, stepped
from graphs import Recorded
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
from torch import Tensor

import folo
from folo.model.forward import layer_in_heap
from folo.sampling import Context, Named
from folo.state.heap import KVHeap
from folo.step import replayed

# Few distinct tokens and lengths around the block sizes make shared prefixes and full blocks common.
MAX_MODEL_LEN = 64
PROMPTS = st.builds(
    lambda stem, tail: (list(range(3, 40)) * 2)[:stem] + tail,
    st.sampled_from([0, 7, 8, 16, 16, 32, 33, 40]),
    st.sampled_from([[3], [4], [5, 6], [3] * 8]),
)
FORCED = st.lists(st.integers(3, 299), max_size=9)
MANY = st.integers(0, 999)  # picks one of things of which there may be any number


def every_other(logits: Tensor, context: Context) -> Tensor:
    """Favours ids of the position's parity: a pure transform that depends on the position."""
    return logits - 3.0 * (torch.arange(len(logits)) % 2 != context.position % 2)


TRANSFORMS = {"every other": every_other}
SAMPLING = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 1.0, 1.0]),
        "max_tokens": st.sampled_from([1, 3, 12, 24, 24, None]),
        "min_tokens": st.sampled_from([0, 0, 1]),
        "seed": st.sampled_from([None, 0, 1, 2**64 - 1]),
        "logprobs": st.sampled_from([None, 0, 2]),
        "logprobs_mode": st.sampled_from(["raw", "raw", "processed"]),
        "prompt_logprobs": st.sampled_from([None, None, None, 1]),
        "top_k": st.sampled_from([0, 5]),
        "repetition_penalty": st.sampled_from([1.0, 1.3]),
        "frequency_penalty": st.sampled_from([0.0, 0.0, 0.5]),
        "logit_bias": st.sampled_from([None, None, {7: 3.0, 8: float("-inf")}]),
        "stop_token_ids": st.sampled_from([(), (), tuple(range(100, 130))]),
        "stop": st.sampled_from([None, None, ["e", "ab"], ["t", "\ufffd"]]),
        "logits_processors": st.sampled_from([(), (), (Named("every other", every_other),)]),
        "n": st.sampled_from([1, 1, 3]),
    }
)


@dataclass(frozen=True)
class Known:
    """What a request in one state has to give: a recipe for each sample.

    cut: somebody ended it.
    """

    recipes: tuple[Recipe, ...]
    lineage: tuple[tuple[str, int, int], ...] = ()
    cut: bool = False


@dataclass(frozen=True)
class World:
    """A state that is held, and what is known of its requests."""

    state: folo.EngineState
    known: Mapping[str, Known]

    def with_(self, state: folo.EngineState, known: Mapping[str, Known] | None = None) -> World:
        return World(state, self.known if known is None else {**self.known, **known})


def steps_in_flight() -> Iterator[folo.Step]:
    """Mostly steps that do not wait for their tokens, over graphs; now and then one that does."""
    replaying = replayed(Recorded(), layer_in_heap)
    return itertools.cycle([*[replaying] * 6, folo.step])


holds_a_request = precondition(lambda self: self.state.requests.length or self.state.finished.length)
can_step = precondition(lambda self: folo.has_unfinished(self.state))
# Without a reserve, the heap has room for one state and the step that is made from it.
can_hold = precondition(lambda self: self.state.cache.reserve_blocks and len(self.held) < 4)


class Program(RuleBasedStateMachine):
    """Holds several states at once, and acts on any of them."""

    params: folo.Params
    tokenizer: Any
    directory: Path

    @initialize(
        block_size=st.sampled_from([8, 16]),
        num_blocks=st.sampled_from([8, 10, 14, 40, 40]),
        budget=st.sampled_from([5, 16, 64]),
        seqs=st.sampled_from([2, 8, 16]),
        caching=st.sampled_from([True, True, False]),
        policy=st.sampled_from(["fcfs", "priority"]),
        threshold=st.sampled_from([0, 6]),
        text=st.sampled_from([True, False, False]),
        reserve=st.sampled_from([160, 160, 0]),
        graphs=st.booleans(),
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
        text: bool,
        reserve: int,
        graphs: bool,
    ) -> None:
        self.how = steps_in_flight() if graphs else itertools.repeat(folo.step)
        reserve = 160 if graphs else reserve  # on a CPU no heap has room for a second step in flight
        scheduler = folo.SchedulerConfig(
            max_num_seqs=seqs,
            max_num_batched_tokens=budget,
            max_model_len=MAX_MODEL_LEN,
            long_prefill_token_threshold=threshold,
            policy=policy,
        )
        tokenizer = self.tokenizer if text else None
        config = cache(block_size, num_blocks, caching, reserve)
        state = folo.init(self.params, config, scheduler, tokenizer)
        self.oracle = Oracle(self.params, tokenizer)
        self.heaps: list[KVHeap] = [state.heap]
        self.held = [World(state, {})]
        self.names = (f"r{n}" for n in itertools.count())

    @property
    def world(self) -> World:
        return self.held[-1]

    @world.setter
    def world(self, world: World) -> None:
        self.held[-1] = world

    @property
    def state(self) -> folo.EngineState:
        return self.world.state

    @rule(
        prompts=st.lists(PROMPTS, min_size=1, max_size=3),
        values=SAMPLING,
        priority=st.integers(0, 2),
        salt=st.sampled_from(["", "", "s"]),
        steps=st.integers(0, 9),
    )
    def submit(
        self, prompts: list[list[int]], values: dict[str, Any], priority: int, salt: str, steps: int
    ) -> None:
        if values["temperature"] == 0:
            values |= {"n": 1}
        if self.state.tokenizer is None:
            values |= {"stop": None}
        sampling = folo.SamplingParams(**values, ignore_eos=True)
        for ids in prompts:
            request = folo.Request(ids, sampling, next(self.names), priority, salt)
            state = folo.submit(self.state, request)
            recipes = tuple(Recipe.of(state, request, n) for n in range(sampling.n))
            self.world = self.world.with_(state, {request.id: Known(recipes)})
        self.go_on(steps)

    @can_step
    @rule(steps=st.integers(1, 12))
    def go_on(self, steps: int) -> None:
        for _ in range(steps):
            batch = folo.schedule(self.state)
            if batch is None:
                break
            state, _ = next(self.how)(self.state.params, self.state, batch)
            folo.check(state)
            self.world = self.world.with_(state)

    @can_step
    @can_hold
    @rule()
    def step_twice(self) -> None:
        batch = folo.schedule(self.state)
        assert batch is not None
        first, tokens = next(self.how)(self.state.params, self.state, batch)
        second, again = next(self.how)(self.state.params, self.state, batch)
        assert torch.equal(tokens.ids, again.ids)
        assert tokens.request_ids == again.request_ids
        assert folo.outputs(first) == folo.outputs(second)
        assert folo.stats(first) == folo.stats(second)
        folo.check(first)
        self.world = self.world.with_(second)

    @can_step
    @rule()
    def drop_a_batch(self) -> None:
        before = folo.outputs(self.state)
        folo.schedule(self.state)
        assert folo.outputs(self.state) == before

    @holds_a_request
    @rule(pick=MANY, how=st.sampled_from(["abort", "finish"]))
    def end(self, pick: int, how: str) -> None:
        id = self.any(pick)
        state = folo.abort(self.state, id) if how == "abort" else folo.finish(self.state, id, "stop")
        self.world = self.world.with_(state, {id: replace(self.world.known[id], cut=True)})

    @holds_a_request
    @rule(
        pick=MANY,
        sample=MANY,
        keep=st.one_of(st.none(), MANY),
        forced=st.one_of(st.none(), FORCED, st.tuples(FORCED, FORCED, FORCED)),
        seeds=st.one_of(st.none(), st.tuples(*[st.sampled_from([None, 0, 5])] * 3)),
        count=st.integers(1, 3),
    )
    def fork(
        self,
        pick: int,
        sample: int,
        keep: int | None,
        forced: list[int] | tuple[list[int], ...] | None,
        seeds: tuple[int | None, ...] | None,
        count: int,
    ) -> None:
        id = self.any(pick)
        known = self.world.known[id]
        sample %= len(known.recipes)
        parent = self.verified(id, sample)
        num_prompt, length = len(parent.prompt), len(parent.prompt) + len(parent.given)
        kept = length if keep is None else num_prompt + keep % (length - num_prompt + 1)
        each = list(forced[:count]) if isinstance(forced, tuple) else [forced or []] * count
        chosen = [None] * count if seeds is None else list(seeds[:count])
        children: dict[str, Known] = {}
        for tokens, seed in zip(each, chosen, strict=True):
            recipe = parent.forked(kept, tokens, seed)
            recipe = replace(recipe, sampling=replace(recipe.sampling, n=1))
            lineage = (*known.lineage, (id, kept, recipe.seed))
            children[next(self.names)] = Known((recipe,), lineage)
        fits = all(kept + len(tokens) < parent.max_length for tokens in each)
        try:
            state = folo.fork(
                self.state,
                id,
                list(children),
                sample,
                None if keep is None else kept,
                each if isinstance(forced, tuple) else forced,
                None if seeds is None else chosen,
            )
        except folo.RequestError:
            assert not fits
        else:
            assert fits
            self.world = self.world.with_(state, children)

    @holds_a_request
    @rule(pick=MANY, new=FORCED)
    def extend(self, pick: int, new: list[int]) -> None:
        id = self.any(pick)
        known = self.world.known[id]
        before = self.verified(id, 0)
        prompt = (*before.prompt, *before.given, *new)
        fits = len(known.recipes) == 1 and bool(new) and len(prompt) < self.state.max_model_len
        try:
            state = folo.extend(self.state, id, new)
        except folo.RequestError:
            assert not fits
        else:
            assert fits
            recipe = replace(before, prompt=prompt, given=())
            self.world = self.world.with_(state, {id: Known((recipe,), known.lineage)})

    @holds_a_request
    @rule(num_blocks=st.sampled_from([None, 4, 8, 10, 40]), other_size=st.booleans(), caching=st.booleans())
    def save_and_restore(self, num_blocks: int | None, other_size: bool, caching: bool) -> None:
        state, path = self.state, self.directory / "state"
        folo.save(state, path)
        config = None
        if num_blocks is not None or other_size:
            size = 24 - state.cache.block_size if other_size else state.cache.block_size
            num_blocks = max(num_blocks or 8, -(-MAX_MODEL_LEN // size))
            config = cache(size, num_blocks, caching, state.cache.reserve_blocks)
        params, tokenizer = self.state.params, self.state.tokenizer
        restored = folo.restore(params, path, config, TRANSFORMS, recompute=other_size, tokenizer=tokenizer)
        mine, theirs = folo.outputs(restored), folo.outputs(state)
        if config is None:
            assert mine == theirs
            assert folo.stats(restored) == folo.stats(state)
            assert restored.scheduler == state.scheduler
        folo.check(restored)
        self.heaps.append(restored.heap)
        self.world = self.world.with_(restored)

    @holds_a_request
    @rule(
        seqs=st.sampled_from([1, 4, 8, 16]),
        budget=st.sampled_from([1, 5, 16, 64]),
        policy=st.sampled_from(["fcfs", "priority"]),
        threshold=st.sampled_from([0, 6]),
        limit=st.sampled_from([MAX_MODEL_LEN, MAX_MODEL_LEN, 56]),
    )
    def reconfigure(self, seqs: int, budget: int, policy: Any, threshold: int, limit: int) -> None:
        scheduler = folo.SchedulerConfig(
            max_num_seqs=seqs,
            max_num_batched_tokens=budget,
            max_model_len=limit,
            long_prefill_token_threshold=threshold,
            policy=policy,
        )
        outputs, known = folo.outputs(self.state), dict(self.world.known)
        fits = True
        for id, output in outputs.items():
            recipes = list(known[id].recipes)
            for completion in output.outputs:
                if completion.finish_reason is None:
                    recipe = replace(recipes[completion.index], limit=limit)
                    recipes[completion.index] = recipe
                    fits &= len(recipe.prompt) + len(completion.token_ids) < recipe.max_length
            known[id] = replace(known[id], recipes=tuple(recipes))
        try:
            state = folo.reconfigure(self.state, scheduler)
        except folo.ConfigError as error:
            too_small = "need a heap" in str(error)
            assert not fits or (too_small and not self.state.cache.reserve_blocks)
        else:
            assert fits
            self.world = World(state, known)

    @precondition(lambda self: self.state.running)
    @rule(copy=st.booleans())
    def rebind(self, copy: bool) -> None:
        params = replace(self.params) if copy else self.state.params
        state = folo.rebind(self.state, params)
        assert not state.running
        assert (state.pool.used, len(state.pool.index)) == (0, 0)
        self.world = self.world.with_(state)

    @can_hold
    @rule()
    def hold(self) -> None:
        self.held.append(self.world)

    @rule(pick=MANY)
    def rewind(self, pick: int) -> None:
        self.held.append(self.held.pop(pick % len(self.held)))

    @precondition(lambda self: len(self.held) > 1)
    @rule(pick=MANY)
    def drop(self, pick: int) -> None:
        self.held.pop(pick % len(self.held))

    @precondition(lambda self: self.state.finished.length)
    @rule()
    def collect(self) -> None:
        state, done = folo.collect(self.state)
        self.compare(self.world.known, done)
        self.world = self.world.with_(state)

    @invariant()
    def sound(self) -> None:
        if hasattr(self, "held"):
            for world in self.held:
                folo.check(world.state)

    def any(self, pick: int) -> str:
        """The id of some request that the state holds; more often of one that runs."""
        ids = [sequence.id for sequence in self.state.running] if pick % 3 else []
        ids = ids or [*self.state.requests, *self.state.finished]
        ids = sorted(set(ids), key=lambda id: int(id[1:]))
        return ids[pick % len(ids)]

    def verified(self, id: str, sample: int) -> Recipe:
        """The recipe of a sample, with its tokens so far, which are checked, as `given`."""
        recipe, output = self.world.known[id].recipes[sample], folo.outputs(self.state)[id]
        self.compare(self.world.known, {id: output})
        return replace(recipe, given=tuple(output.outputs[sample].token_ids), limit=self.state.max_model_len)

    def compare(self, known: Mapping[str, Known], outputs: dict[str, folo.RequestOutput]) -> None:
        for id, output in outputs.items():
            assert output.lineage == known[id].lineage
            self.oracle.verify(known[id].recipes, output, known[id].cut)

    def teardown(self) -> None:
        if not hasattr(self, "held"):
            return
        while self.held:
            self.run_out()
        for heap in self.heaps:
            assert heap.num_free == heap.num_blocks

    def run_out(self) -> None:
        world = self.held.pop()
        self.held = [other for other in self.held if other is not world]
        known, state, steps = world.known, world.state, 0
        del world  # it would pin the blocks that it has now
        while (batch := folo.schedule(state)) is not None:
            state, _ = next(self.how)(state.params, state, batch)
            folo.check(state)
            steps += 1
            assert steps < 5000, "it ends much earlier, unless something starves"
            if steps == 20 and state.cache.reserve_blocks:  # the rest may go faster
                wide = replace(state.scheduler, max_num_seqs=16, max_num_batched_tokens=64)
                state = folo.reconfigure(state, wide)
        assert not folo.has_unfinished(state)
        state, done = folo.collect(state)
        self.compare(known, done)
        assert state.pool.used == 0


def cache(block_size: int, num_blocks: int, caching: bool, reserve: int) -> folo.CacheConfig:
    return folo.CacheConfig(block_size, num_blocks, reserve_blocks=reserve, enable_prefix_caching=caching)


@pytest.mark.no_cover
def test_random_programs_leave_every_state_valid_and_every_output_its_own(
    tiny: folo.Params, tokenizer: Any, tmp_path: Path
) -> None:
    config = replace(tiny.config, num_layers=1)  # which halves the time of a step
    Program.params = replace(tiny, layers=tiny.layers[:1], config=config)
    Program.tokenizer, Program.directory = tokenizer, tmp_path
    programs = int(os.environ.get("FOLO_PROGRAMS", "200"))
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large]
    run_state_machine_as_test(
        Program,
        settings=settings(
            max_examples=programs, stateful_step_count=50, deadline=None, suppress_health_check=checks
        ),
    )


def test_a_block_to_come_is_shared_only_after_the_block_that_its_donor_has_before_it(
    tiny: folo.Params,
) -> None:
    """What random programs found: a hit in the cache, then a block that a twin of it goes before."""
    scheduler = folo.SchedulerConfig(max_num_batched_tokens=16, long_prefill_token_threshold=12)
    state = folo.init(tiny, cache(8, 64, True, 0), scheduler)
    ids = prompt(40)
    # "b" takes no hits, so it computes the first block of "a" once more, and then the second one.
    scored = folo.SamplingParams(max_tokens=9, prompt_logprobs=0)
    state = folo.submit(state, folo.Request(ids[:9], folo.SamplingParams(max_tokens=9), "a"))
    state = stepped(tiny, folo.submit(state, folo.Request(ids, scored, "b")))
    state = stepped(tiny, folo.submit(state, folo.Request(ids, folo.SamplingParams(max_tokens=9), "c")))
    first, second, third = (sequence.table.blocks for sequence in state.running)
    assert second[0] is third[0] is first[0]
    finish_all(tiny, state)
