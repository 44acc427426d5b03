"""What folo takes for a request or a configuration, and what it refuses by an error that names the value."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from engine import finish_all, prompt

import folo


def test_numpys_numbers_are_taken_for_pythons(tiny: folo.Params, tmp_path: Path) -> None:
    def number(value: float) -> Any:
        return np.float32(value) if isinstance(value, float) else np.int64(value)

    cache = folo.CacheConfig(number(8), number(16), number(1.5))
    scheduler = folo.SchedulerConfig(max_num_seqs=number(4), policy="priority")
    state = folo.init(tiny, cache, scheduler, seed=number(7))
    request = folo.Request(np.array([3, 4]), id="a", priority=number(-1))  # pyright: ignore[reportArgumentType]
    folo.save(folo.submit(state, request), tmp_path / "state")
    restored = folo.restore(tiny, tmp_path / "state")
    assert (restored.cache, restored.scheduler, restored.seed) == (cache, scheduler, 7)
    assert restored.waiting[0].origin.request == request
    for value in (cache.block_size, cache.num_blocks, scheduler.max_num_seqs, request.priority, state.seed):
        assert type(value) is int
    assert type(cache.kv_cache_gib) is float


BAD_REQUESTS = [
    ([], {}, "prompt is empty"),
    ([3, 300], {}, r"token id 300 is outside the vocabulary, \[0, 300\)"),
    ([-1], {}, "token id -1 is outside"),
    ([3.5], {}, "must be ints"),
    ([3, True], {}, "must be ints, got True or False"),
    (torch.tensor([True, False]), {}, "must be ints, got True or False"),
    (torch.tensor([[3], [4]]), {}, "must be ints .*'list' object"),
    (b"abc", {}, "must be ints, got b'abc': encode text"),
    ([3] * 256, {}, "leaves no room for output under max_model_len=256"),
    ([3], {"stop": "x"}, "stop strings need a tokenizer"),
    ([3], {"logit_bias": {300: 1.0}}, "token id 300 is outside"),
    ([3], {"stop_token_ids": [999]}, "token id 999 is outside"),
    ([3], {"logprobs": 301}, "logprobs=301 exceeds the vocabulary of 300"),
    ([3], {"prompt_logprobs": 301}, "prompt_logprobs=301 exceeds the vocabulary of 300"),
    ([3], {"logit_bias": dict.fromkeys(range(300), -math.inf)}, "bans every token"),
]


@pytest.mark.parametrize(("ids", "sampling", "message"), BAD_REQUESTS)
def test_a_request_that_cannot_be_served_is_refused_at_submit(
    tiny: folo.Params, ids: Any, sampling: dict[str, Any], message: str
) -> None:
    state = folo.init(tiny)
    with pytest.raises(folo.RequestError, match=message):
        folo.submit(state, folo.Request(ids, folo.SamplingParams(**sampling), "a"))
    assert not folo.has_unfinished(state)


@pytest.mark.parametrize("id", ["", 5, None])
def test_an_id_that_is_empty_or_no_string_is_refused(id: Any) -> None:
    with pytest.raises(folo.RequestError, match="must be a non-empty string"):
        folo.Request([3], id=id)


def test_a_prompt_that_is_no_text_is_refused() -> None:
    with pytest.raises(folo.RequestError, match="'a': prompt b'abc' is not a string"):
        folo.Request([3], id="a", prompt=cast("Any", b"abc"))


def test_what_is_no_request_is_refused(tiny: folo.Params) -> None:
    with pytest.raises(folo.RequestError, match=r"submit takes a folo\.Request, got 'the cat'"):
        folo.submit(folo.init(tiny), cast("Any", "the cat"))


@pytest.mark.parametrize(
    "call",
    [
        lambda p, state: folo.schedule(state),
        lambda p, state: folo.has_unfinished(state),
        lambda p, state: folo.outputs(state),
        lambda p, state: folo.collect(state),
        lambda p, state: folo.stats(state),
        lambda p, state: folo.check(state),
        lambda p, state: folo.submit(state, folo.Request([3])),
        lambda p, state: folo.abort(state, "a"),
        lambda p, state: folo.finish(state, "a"),
        lambda p, state: folo.fork(state, "a", ["b"]),
        lambda p, state: folo.extend(state, "a", [3]),
        lambda p, state: folo.rebind(state, p),
        lambda p, state: folo.reconfigure(state, folo.SchedulerConfig()),
        lambda p, state: folo.save(state, "state.folo"),
    ],
)
def test_what_is_no_state_is_refused(tiny: folo.Params, call: Any) -> None:
    with pytest.raises(folo.ConfigError, match="state=None: expected an EngineState"):
        call(tiny, None)
    with pytest.raises(folo.ConfigError, match=r"state=\(EngineState\(.*\), {}\): .* return one in a tuple"):
        call(tiny, folo.collect(folo.init(tiny)))


@pytest.mark.parametrize("id", [["a"], {}, 5, ""])
def test_an_id_that_no_request_can_have_is_refused(engine: folo.LLMEngine, id: Any) -> None:
    state = folo.submit(engine.state, folo.Request([3], id="a"))
    calls: list[Callable[[], object]] = [
        lambda: folo.abort(state, id),
        lambda: folo.fork(state, id, ["b"]),
        lambda: folo.extend(state, id, [3]),
        lambda: engine.abort_request(id),
    ]
    for call in calls:
        with pytest.raises(folo.RequestError, match=f"request id {re.escape(repr(id))} must be a non-empty"):
            call()


def test_an_id_is_unique_until_it_is_collected(tiny: folo.Params) -> None:
    request = folo.Request(prompt(3), folo.SamplingParams(max_tokens=1), "a")
    state = folo.submit(folo.init(tiny), request)
    with pytest.raises(folo.RequestError, match="with this id is in the state already"):
        folo.submit(state, request)
    state = finish_all(tiny, state)
    with pytest.raises(folo.RequestError, match="with this id is in the state already"):
        folo.submit(state, request)
    state, _ = folo.collect(state)
    assert folo.has_unfinished(folo.submit(state, request))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: folo.CacheConfig(block_size=4), r"block_size=4: expected an int in \[8, 256\]"),
        (lambda p: folo.CacheConfig(num_blocks=0), "num_blocks=0"),
        (lambda p: folo.CacheConfig(kv_cache_gib=0), "kv_cache_gib=0"),
        (lambda p: folo.CacheConfig(kv_cache_gib=True), "kv_cache_gib=True"),
        (lambda p: folo.CacheConfig(gpu_memory_utilization=10**400), "gpu_memory_utilization=1000"),
        (lambda p: folo.CacheConfig(enable_prefix_caching=cast("Any", "no")), "enable_prefix_caching='no'"),
        (lambda p: folo.ModelConfig(deterministic=cast("Any", "no")), "deterministic='no'"),
        (lambda p: folo.ModelConfig(skip_tokenizer_init=cast("Any", 1)), "skip_tokenizer_init=1"),
        (lambda p: folo.reconfigure(folo.init(p), cast("Any", None)), "scheduler=None"),
        (lambda p: folo.LLM(engine_config=cast("Any", "x")), "engine_config='x'"),
        (lambda p: folo.quant.sequences(folo.load_tokenizer(), "text", 0), "length=0"),
        (lambda p: folo.CacheConfig(kv_cache_gib=math.inf), "kv_cache_gib=inf"),
        (lambda p: folo.CacheConfig(kv_cache_gib=cast("Any", "4")), "kv_cache_gib='4'"),
        (lambda p: folo.init(p, seed=-1), "seed=-1"),
        (lambda p: folo.init(p, seed=True), "seed=True"),
        (lambda p: folo.init(p, cast("Any", "tokenizer")), "cache='tokenizer': expected a CacheConfig"),
        (lambda p: folo.init(p, None, cast("Any", 5)), "scheduler=5: expected a SchedulerConfig"),
        (lambda p: folo.CacheConfig(gpu_memory_utilization=1.5), "gpu_memory_utilization=1.5"),
        (lambda p: folo.CacheConfig(reserve_blocks=-1), "reserve_blocks=-1"),
        (lambda p: folo.SchedulerConfig(max_num_seqs=0), "max_num_seqs=0"),
        (lambda p: folo.SchedulerConfig(max_num_batched_tokens=True), "max_num_batched_tokens=True"),
        (lambda p: folo.SchedulerConfig(max_model_len=1), "max_model_len=1"),
        (
            lambda p: folo.SchedulerConfig(policy=cast("Any", "lifo")),
            'policy=\'lifo\': expected "fcfs" or "priority"',
        ),
        (lambda p: folo.ModelConfig(seed=-1), "seed=-1"),
        (lambda p: folo.EngineConfig(cache=cast("Any", None)), "cache=None: expected a CacheConfig"),
        (lambda p: folo.init(p, folo.CacheConfig(kv_cache_gib=1e-5)), "are kept for steps in flight"),
        (lambda p: folo.init(cast("Any", None)), "params=None: expected what folo.load returns"),
        (lambda p: folo.rebind(folo.init(p), cast("Any", "model")), "params='model': expected"),
        (lambda p: folo.restore(cast("Any", "model"), "state.folo"), "params='model': expected"),
        (
            lambda p: folo.restore(p, "state.folo", transforms=cast("Any", [])),
            r"transforms=\[\]: expected a dict",
        ),
        (lambda p: folo.init(p, folo.CacheConfig(num_blocks=10**11)), "no memory for a KV heap of 10000000"),
        (lambda p: folo.init(p, folo.CacheConfig(num_blocks=10**30)), "no memory for a KV heap of 10000000"),
        (lambda p: folo.init(p, folo.CacheConfig(kv_cache_gib=1e308)), "no memory .*kv_cache_gib"),
        (
            lambda p: folo.init(p, folo.CacheConfig(num_blocks=8), folo.SchedulerConfig(max_num_seqs=10**12)),
            "no memory .* 2000000000128 of them are for steps in flight .*lower .*max_num_seqs",
        ),
        (
            lambda p: folo.init(p, scheduler=folo.SchedulerConfig(max_model_len=257)),
            "max_model_len=257 exceeds the model's 256 positions",
        ),
        (
            lambda p: folo.init(p, folo.CacheConfig(num_blocks=2), folo.SchedulerConfig(max_model_len=33)),
            "max_model_len=33 exceeds the 32 tokens that num_blocks=2 of 16 hold",
        ),
    ],
)
def test_a_configuration_out_of_range_is_refused(tiny: folo.Params, make: Any, message: str) -> None:
    with pytest.raises(folo.ConfigError, match=message):
        make(tiny)
