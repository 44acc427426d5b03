"""Steps that are replayed from graphs and do not wait for their tokens: the same function, bit for bit.

CUDA graphs are played by `graphs.Recorded`, which replays on the CPU and spoils what it wrote before.
"""

from __future__ import annotations

import gc
import importlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engine import finish_all, prompt
from graphs import Recorded
from torch import Tensor

import folo
from folo.model.forward import layer_in_heap
from folo.padding import bucket, decode_sizes, padded, padded_rows, table_width
from folo.sampling import Context
from folo.state.flight import landed
from folo.step import prologue, replayed
from folo.transfer import Fixed

EIGHT = folo.CacheConfig(block_size=8, num_blocks=60, reserve_blocks=60)


def graphed() -> tuple[folo.Step, Recorded]:
    recorder = Recorded()
    return replayed(recorder, layer_in_heap), recorder


def started(
    params: folo.Params, count: int, seqs: int = 8, budget: int = 32, **values: Any
) -> folo.EngineState:
    """Requests of different lengths; those of odd numbers sample, and end at different times."""
    scheduler = folo.SchedulerConfig(max_num_seqs=seqs, max_num_batched_tokens=budget)
    state = folo.init(params, EIGHT, scheduler)
    for n in range(count):
        defaults: dict[str, Any] = {"temperature": n % 2, "seed": n, "max_tokens": 6 + 5 * (n % 4)}
        sampling = folo.SamplingParams(**(defaults | values), ignore_eos=True)
        state = folo.submit(state, folo.Request(prompt(3 + 5 * n, n), sampling, f"r{n}"))
    return state


def ended(
    params: folo.Params, state: folo.EngineState, step: folo.Step
) -> tuple[folo.EngineState, list[folo.Tokens], int]:
    """The last state, the tokens of all steps, and how many were planned behind a step in flight."""
    tokens, ahead = [], 0
    while (batch := folo.schedule(state)) is not None:
        ahead += batch.behind is not None
        state, new = step(params, state, batch)
        folo.check(state)
        tokens.append(new)
    return state, tokens, ahead


def shift(logits: Tensor, context: Context) -> Tensor:
    return logits.roll(context.position % 3)


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "greedy": {"temperature": 0.0},
    "warped": {"temperature": 0.7, "min_p": 0.05},
    "truncated": {"temperature": 0.9, "top_k": 12, "top_p": 0.8},
    "logprobs": {"logprobs": 2},
    "prompt logprobs": {"prompt_logprobs": 1, "logprobs": 0},
    "penalties": {"temperature": 0.8, "frequency_penalty": 0.6, "repetition_penalty": 1.3},
    "bias": {"logit_bias": {5: 4.0, 7: -2.0}, "min_tokens": 3},
    "stop ids": {"temperature": 1.0, "stop_token_ids": tuple(range(0, 300, 9)), "max_tokens": 40},
    "own transform": {"temperature": 1.0, "logits_processors": (shift,)},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_replayed_steps_give_the_outputs_of_eager_ones(tiny: folo.Params, variant: str) -> None:
    state = started(tiny, 7, **VARIANTS[variant])
    step, recorder = graphed()
    after, _, ahead = ended(tiny, state, step)
    assert folo.outputs(after) == folo.outputs(finish_all(tiny, state))
    assert recorder.replays > 5
    looks_back = variant in ("penalties", "own transform")
    assert (ahead == 0) == looks_back, "only what depends on the last token waits for it"


@pytest.mark.parametrize("seqs", [1, 2, 5, 16])
def test_padding_changes_no_bit(tiny: folo.Params, seqs: int) -> None:
    state = started(tiny, 7, seqs)
    assert folo.outputs(ended(tiny, state, graphed()[0])[0]) == folo.outputs(finish_all(tiny, state))


def test_padding_writes_to_no_block(tiny: folo.Params) -> None:
    state = started(tiny, 5, max_tokens=20)
    step, _ = graphed()
    for _ in range(8):
        batch = folo.schedule(state)
        assert batch is not None
        state, _ = step(tiny, state, batch)
    state = landed(state)
    assert len(state.running) == 5, "padded to 8"
    own = sorted(block.index for sequence in state.running for block in sequence.table.blocks)
    others = [n for n in range(state.heap.num_blocks) if n not in own]
    before = state.heap.k[:, others].clone(), state.heap.v[:, others].clone()
    batch = folo.schedule(state)
    assert batch is not None
    after, _ = step(tiny, state, batch)
    new = {b.index for s in landed(after).running for b in s.table.blocks} - set(own)
    same = [at for at, n in enumerate(others) if n not in new]
    for cache, old in zip((state.heap.k, state.heap.v), before, strict=True):
        assert torch.equal(cache[:, others][:, same], old[:, same])


def test_tokens_of_a_step_are_never_overwritten(tiny: folo.Params) -> None:
    state = started(tiny, 6, temperature=1.0, stop_token_ids=tuple(range(0, 300, 15)), logprobs=0)
    after, tokens, ahead = ended(tiny, state, graphed()[0])
    assert ahead
    found: dict[str, list[tuple[int, float]]] = {}
    for step in tokens:
        assert step.logprobs is not None or not len(step.ids)
        logprobs = [] if step.logprobs is None else step.logprobs.tolist()
        for id, token, logprob in zip(step.request_ids, step.ids.tolist(), logprobs, strict=True):
            found.setdefault(id, []).append((token, logprob))
    outputs = {id: output.outputs[0] for id, output in folo.outputs(after).items()}
    assert {id: [token for token, _ in pairs] for id, pairs in found.items()} == {
        id: output.token_ids for id, output in outputs.items()
    }
    for id, output in outputs.items():
        assert output.logprobs is not None
        scores = [
            table[token].logprob for table, token in zip(output.logprobs, output.token_ids, strict=True)
        ]
        assert scores == [logprob for _, logprob in found[id]]


def test_the_next_step_is_launched_before_the_last_one_is_waited_for(
    tiny: folo.Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []

    def download(tree: Any) -> Callable[[], Any]:
        number = sum(event.startswith("launched") for event in events)
        events.append(f"launched {number}")

        def wait() -> Any:
            events.append(f"waited {number}")
            return tree

        return wait

    monkeypatch.setattr(importlib.import_module("folo.step"), "download", download)
    step, _ = graphed()
    state = started(tiny, 1, max_tokens=5)
    while (batch := folo.schedule(state)) is not None:
        state, _ = step(tiny, state, batch)
    # The prefill's token is waited for: whoever plans after it has to know who runs. So is the last one.
    assert events == [
        *("launched 0", "waited 0", "launched 1", "launched 2", "waited 1"),
        *("launched 3", "waited 2", "launched 4", "waited 3", "waited 4"),
    ]


def test_a_state_in_flight_is_a_value_like_any_other(tiny: folo.Params, tmp_path: Path) -> None:
    """Stepped twice, by either kind of step, forked, extended, aborted, saved: as if it had waited."""
    step, _ = graphed()
    state = started(tiny, 4, max_tokens=20)
    expected = folo.outputs(finish_all(tiny, state))
    for _ in range(8):
        batch = folo.schedule(state)
        assert batch is not None
        state, _ = step(tiny, state, batch)
    assert state.flight is not None
    known = landed(state)
    assert folo.outputs(state) == folo.outputs(known)
    assert folo.stats(state) == folo.stats(known)
    for way in (step, folo.step, step):
        assert folo.outputs(ended(tiny, state, way)[0]) == expected
    folo.save(state, tmp_path / "state")
    assert folo.outputs(finish_all(tiny, folo.restore(tiny, tmp_path / "state"))) == expected
    for change in (
        lambda s: folo.fork(s, "r1", ["child"], append=[4, 5]),
        lambda s: folo.abort(s, "r2"),
        lambda s: folo.finish(s, "r2", "stop"),
        lambda s: folo.extend(s, "r0", [7, 8]),
        lambda s: folo.rebind(s, tiny),
        lambda s: folo.reconfigure(s, replace(s.scheduler, max_num_seqs=2)),
        lambda s: folo.submit(s, folo.Request(prompt(9), folo.SamplingParams(seed=1), "late")),
    ):
        one, other = change(state), change(known)
        assert folo.outputs(one) == folo.outputs(other)
        assert folo.outputs(ended(tiny, one, step)[0]) == folo.outputs(finish_all(tiny, other))


def nothing(logits: Tensor, context: Context) -> Tensor:
    """Allows no token from the sixth position on."""
    return logits if context.position < 8 else torch.full_like(logits, -torch.inf)


def test_a_request_without_a_token_is_told_of_later_and_can_be_aborted(tiny: folo.Params) -> None:
    step, _ = graphed()
    state = started(tiny, 2)
    good = folo.outputs(finish_all(tiny, state))
    bad = folo.SamplingParams(logits_processors=(nothing,), max_tokens=9)
    state = folo.submit(state, folo.Request(prompt(4), bad, "bad"))
    for _ in range(5):
        batch = folo.schedule(state)
        assert batch is not None
        state, _ = step(tiny, state, batch)
    for _ in range(2):
        with pytest.raises(folo.RequestError, match=r"'bad'.*no token can be sampled at position 8"):
            folo.schedule(state)
        assert len(folo.outputs(state)["bad"].outputs[0].token_ids) == 4
    state = folo.abort(state, "bad")
    folo.check(state)
    outputs = folo.outputs(ended(tiny, state, step)[0])
    assert outputs.pop("bad").outputs[0].finish_reason == "abort"
    assert outputs == good


def test_graphs_are_captured_once_and_die_with_their_heap(tiny: folo.Params) -> None:
    step, recorder = graphed()
    state = started(tiny, 4, seqs=8)
    ended(tiny, state, step)
    captures = recorder.captures
    assert captures == len(decode_sizes(8))
    ended(tiny, state, step)
    assert recorder.captures == captures
    other = folo.rebind(state, replace(tiny))
    ended(other.params, other, step)
    assert recorder.captures > captures, "graphs read the weights they were captured with"
    heap = weakref.ref(state.heap)
    del state, other
    gc.collect()
    assert heap() is None


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_compiler")
def test_what_is_not_replayed_is_compiled_without_a_break_and_never_again(tiny: folo.Params) -> None:
    layer = torch.compile(layer_in_heap, fullgraph=True, dynamic=True)
    step = replayed(Recorded(), layer)
    expected = folo.outputs(finish_all(tiny, started(tiny, 7)))
    assert folo.outputs(ended(tiny, started(tiny, 7), step)[0]) == expected
    with torch.compiler.set_stance("fail_on_recompile"):
        assert folo.outputs(ended(tiny, started(tiny, 7), step)[0]) == expected
        ended(tiny, started(tiny, 3, budget=19), step)


def test_shapes_are_few() -> None:
    assert [decode_sizes(n) for n in (1, 5, 16)] == [[1], [1, 2, 4, 8], [1, 2, 4, 8, 16]]
    assert decode_sizes(40) == [1, 2, 4, 8, 16, 32, 48]
    assert [bucket(n) for n in (1, 2, 3, 17, 64, 65, 300)] == [1, 2, 4, 32, 64, 128, 320]
    assert [table_width(n, 300) for n in (1, 64, 65, 257)] == [64, 64, 256, 300]
    assert table_width(3, 20) == 20


def test_a_batch_of_a_graphs_size_is_not_copied(tiny: folo.Params) -> None:
    batch = folo.schedule(started(tiny, 1))
    assert batch is not None
    _, inputs = prologue(batch)
    same = padded(inputs, inputs.token_ids.shape[0], 1, 64)
    (row,) = padded_rows(inputs.rows, 1, warped=True, truncated=True)
    assert same.block_tables.shape == (1, 64)
    assert same.token_ids is inputs.token_ids
    assert row.seed is inputs.rows[0].seed
    assert row.warped
    assert row.truncated


def test_fixed_tensors_keep_their_addresses() -> None:
    tree = {"a": torch.arange(5), "b": (torch.ones(2, 3, dtype=torch.int32), None), "c": torch.zeros(0)}
    fixed = Fixed(tree, torch.device("cpu"))
    addresses = [fixed.tree["a"].data_ptr(), fixed.tree["b"][0].data_ptr()]
    filled = fixed.fill(
        {"a": torch.arange(5) + 1, "b": (torch.ones(3, 2).int().t(), None), "c": torch.zeros(0)}
    )
    assert [filled["a"].data_ptr(), filled["b"][0].data_ptr()] == addresses
    assert all(address % 64 == addresses[0] % 64 for address in addresses)
    assert torch.equal(filled["a"], torch.arange(5) + 1)
    assert torch.equal(filled["b"][0], torch.ones(2, 3, dtype=torch.int32))


def test_cudagraph_is_refused_without_cuda(tiny: folo.Params) -> None:
    step = folo.compile(folo.step, mode="cudagraph")
    state = started(tiny, 1)
    batch = folo.schedule(state)
    assert batch is not None
    with pytest.raises(folo.ConfigError, match=r'mode="cudagraph" needs params on a CUDA device.*cpu'):
        step(tiny, state, batch)


def test_an_engine_hands_out_what_steps_in_flight_come_to(tiny_dir: Path) -> None:
    prompts = [prompt(3 + 4 * n, n) for n in range(6)]
    params = [folo.SamplingParams(temperature=1, seed=n, max_tokens=5 + 3 * n) for n in range(6)]

    def engine() -> folo.LLM:
        return folo.LLM(str(tiny_dir), num_blocks=60, reserve_blocks=60, max_num_seqs=4, use_tqdm=False)

    waiting, flying = engine(), engine()
    flying._step, recorder = graphed()
    expected: Any = waiting.generate(prompts, params, use_tqdm=False)
    outputs: Any = flying.generate(prompts, params, use_tqdm=False)
    assert [output.outputs for output in outputs] == [output.outputs for output in expected]
    assert recorder.replays
    for output in outputs:
        metrics, count = output.metrics, len(output.outputs[0].token_ids)
        seconds = metrics["ttft"] + metrics["tpot"] * (count - 1)
        assert metrics["throughput"] * seconds == pytest.approx(count), "every token was counted"
    for n, ids in enumerate(prompts):
        flying.add_request(f"x{n}", ids, params[n])
    text = "".join(flying.stream(prompts[1], replace(params[1], seed=9)))
    assert text == "".join(waiting.stream(prompts[1], replace(params[1], seed=9)))
    found, last = {}, {}
    while flying.has_unfinished_requests():
        for output in flying.step():
            last[output.request_id] = output
            if output.finished:
                found[output.request_id] = output.outputs
    assert found == {f"x{n}": output.outputs for n, output in enumerate(expected)}
    assert flying.state.flight is None
