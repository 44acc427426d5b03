"""What a request asks for is what it gets: sampling parameters through the engine, stops, errors."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from engine import finish_all, prompt, run, stepped
from torch import Tensor
from torch.utils import _pytree as pytree

import folo
from folo import ops
from folo.sampling import Context, transforms_of


def one(params: folo.Params, ids: list[int], tokenizer: Any = None, **sampling: Any) -> folo.RequestOutput:
    request = folo.Request(ids, folo.SamplingParams(**sampling), "a")
    return run(params, [request], tokenizer=tokenizer)["a"]


def next_logits(params: folo.Params, ids: list[int]) -> Tensor:
    return folo.model.forward(params, torch.tensor(ids))[-1]


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_p": 0.01},
        {"temperature": 1.5, "top_p": 0.5},
        {"temperature": 1.0, "repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": -0.4},
        {"temperature": 0.0, "logit_bias": {5: 100.0, 6: -math.inf}, "top_k": 4},
    ],
)
def test_the_engine_samples_what_the_transforms_say(tiny: folo.Params, sampling: dict[str, Any]) -> None:
    """One token at a time, recomputed from the model's logits by the composed transforms: equal bits."""
    ids = prompt(9)
    asked = folo.SamplingParams(**sampling, seed=11, max_tokens=8, logprobs=2, logprobs_mode="processed")
    others = [
        folo.Request(prompt(7, n), folo.SamplingParams(top_p=0.8, max_tokens=9), str(n)) for n in range(3)
    ]
    output = run(tiny, [*others, folo.Request(ids, asked, "a")])["a"].outputs[0]
    assert output.logprobs is not None
    transform, tokens = transforms_of(asked), list(ids)
    for token, scores in zip(output.token_ids, output.logprobs, strict=True):
        context = Context(ids, tokens[len(ids) :], len(tokens), 0)
        processed = transform(next_logits(tiny, tokens), context)[None]
        at = torch.tensor([len(tokens)])
        u = ops.philox(torch.tensor([11]), at, torch.tensor([0]), 0)
        drawn = ops.draw(processed, torch.tensor([asked.temperature == 0]), u)
        assert drawn.item() == token
        expected = ops.log_softmax(processed)[0]
        assert scores[token].logprob == expected[token].item()
        assert all(score.logprob == expected[id].item() for id, score in scores.items())
        tokens.append(token)


def test_prompt_logprobs_are_those_of_the_whole_sequence_in_any_chunking(tiny: folo.Params) -> None:
    ids = prompt(50)
    logits = folo.model.forward(tiny, torch.tensor(ids))
    expected = ops.log_softmax(logits)
    for budget in (7, 64):
        request = folo.Request(ids, folo.SamplingParams(prompt_logprobs=2, max_tokens=1, n=2), "a")
        scheduler = folo.SchedulerConfig(max_num_batched_tokens=budget)
        state = finish_all(tiny, folo.submit(folo.init(tiny, scheduler=scheduler), request))
        # A second time, with every block cached: a request that scores its prompt takes no hits.
        state = finish_all(tiny, folo.submit(state, folo.Request(ids, request.sampling, "b")))
        for output in folo.outputs(state).values():
            scores = output.prompt_logprobs
            assert scores is not None
            assert len(scores) == 50
            assert scores[0] is None
            for position in range(1, 50):
                table = scores[position]
                assert table is not None
                assert table[ids[position]].logprob == expected[position - 1, ids[position]].item()
                top = expected[position - 1].topk(2).values.tolist()
                assert [s.logprob for s in sorted(table.values(), key=lambda s: s.rank)][:2] == top


def test_best_of_returns_the_likeliest_samples_first(tiny: folo.Params) -> None:
    everyone = one(tiny, prompt(8), n=6, seed=3, max_tokens=5, logprobs=0, ignore_eos=True).outputs
    best = one(tiny, prompt(8), n=2, best_of=6, seed=3, max_tokens=5, ignore_eos=True).outputs
    ranked = sorted(everyone, key=lambda o: -(o.cumulative_logprob or 0))
    assert [o.token_ids for o in best] == [o.token_ids for o in ranked[:2]]
    assert [o.index for o in best] == [0, 1]
    assert [o.sample_index for o in best] == [everyone.index(o) for o in ranked[:2]] != [0, 1]
    assert best[0].cumulative_logprob == ranked[0].cumulative_logprob
    assert best[0].logprobs is None


def test_best_of_cut_short_shows_the_sample_that_has_come_farthest(tiny: folo.Params) -> None:
    sampling = folo.SamplingParams(best_of=2, max_tokens=8, seed=1, ignore_eos=True)
    state = folo.init(tiny, folo.CacheConfig(num_blocks=16), folo.SchedulerConfig(max_num_seqs=1))
    state = stepped(tiny, folo.submit(state, folo.Request(prompt(3), sampling, "a")), 4)
    so_far = [output.token_ids for output in folo.outputs(state)["a"].outputs]
    assert list(map(len, so_far)) == [4, 0]
    (shown,) = folo.outputs(folo.abort(state, "a"))["a"].outputs
    assert shown.token_ids == so_far[0]


@pytest.mark.parametrize(
    "options",
    [
        {"logprobs": 2, "prompt_logprobs": 1},
        {"logprobs": 2, "logprobs_mode": "processed", "top_k": 5},
        {"best_of": 2},
        {"repetition_penalty": 1.2, "logit_bias": {5: 1.0}, "min_tokens": 2},
    ],
    ids=lambda options: next(iter(options)),
)
def test_params_of_float64_are_sampled_from_with_every_option(
    tiny: folo.Params, options: dict[str, Any]
) -> None:
    """Sampling is float32 arithmetic: tokens are those of the float64 logits, rounded."""
    wide: Any = pytree.tree_map(lambda leaf: leaf.double(), tiny)
    output = one(wide, prompt(8), seed=3, max_tokens=6, ignore_eos=True, **options).outputs[0]
    assert len(output.token_ids) == 6
    if output.logprobs is not None and "top_k" not in options:
        logits = folo.model.forward(wide, torch.tensor([*prompt(8), *output.token_ids[:-1]]))
        expected = logits.log_softmax(1)[7:].gather(1, torch.tensor(output.token_ids)[:, None])[:, 0]
        got = [table[token].logprob for token, table in zip(output.token_ids, output.logprobs, strict=True)]
        # Within float32's rounding of logits of about 10 and of a sum over 300 tokens.
        assert torch.allclose(torch.tensor(got, dtype=torch.float64), expected, atol=1e-5, rtol=0)


def test_best_of_prefers_a_finished_sample_to_one_that_was_cut_short(tiny: folo.Params) -> None:
    sampling = folo.SamplingParams(best_of=3, max_tokens=4, ignore_eos=True)
    state = folo.init(tiny, scheduler=folo.SchedulerConfig(max_num_seqs=1))
    state = folo.submit(state, folo.Request(prompt(8), sampling, "a"))
    while len(state.held("a").ended) < 1:
        batch = folo.schedule(state)
        assert batch is not None
        state, _ = folo.step(tiny, state, batch)
    (output,) = folo.outputs(folo.abort(state, "a"))["a"].outputs
    assert (len(output.token_ids), output.finish_reason) == (4, "length")


def test_sampled_ids_can_be_differentiated_through(tiny: folo.Params) -> None:
    """What `step` returns are ordinary tensors: the loss of an RL loop is taken at them."""
    state = folo.submit(folo.init(tiny), folo.Request(prompt(8), folo.SamplingParams(logprobs=0), "a"))
    batch = folo.schedule(state)
    assert batch is not None
    _, tokens = folo.step(tiny, state, batch)
    assert not tokens.ids.is_inference()
    embed = torch.ones(300, 8, requires_grad=True)
    embed[tokens.ids].sum().backward()
    assert embed.grad is not None
    assert embed.grad.sum() == 8


def test_cumulative_logprob_is_the_sum_of_the_tokens(tiny: folo.Params) -> None:
    output = one(tiny, prompt(8), seed=3, max_tokens=9, logprobs=0, ignore_eos=True).outputs[0]
    assert output.logprobs is not None
    assert output.cumulative_logprob == sum(next(iter(table.values())).logprob for table in output.logprobs)
    assert one(tiny, prompt(8), seed=3, max_tokens=9).outputs[0].cumulative_logprob is None


def test_seeds_are_derived_from_the_engine_seed_and_reported(tiny: folo.Params) -> None:
    request = folo.Request(prompt(8), folo.SamplingParams(max_tokens=12, ignore_eos=True), "a")
    first, again, other = (run(tiny, [request], seed=seed)["a"].outputs[0] for seed in (7, 7, 8))
    assert first == again
    assert first.token_ids != other.token_ids
    assert first.seed == folo.sampling.derive_seed(7, "a")
    explicit = one(tiny, prompt(8), seed=first.seed, max_tokens=12, ignore_eos=True).outputs[0]
    assert explicit.token_ids == first.token_ids
    assert one(tiny, prompt(8), seed=2**64 - 1, max_tokens=2).outputs[0].seed == 2**64 - 1


def forced(*ids: int) -> Callable[[Tensor, Context], Tensor]:
    """A logits processor that makes the n-th output token ids[n]."""

    def force(logits: Tensor, context: Context) -> Tensor:
        wanted = torch.full_like(logits, -math.inf)
        wanted[ids[len(context.output_ids)]] = 0.0
        return wanted

    return force


def test_a_logits_processor_sees_its_own_row_and_decides(tiny: folo.Params) -> None:
    seen: list[Context] = []

    def spy(logits: Tensor, context: Context) -> Tensor:
        assert logits.shape == (300,)
        seen.append(context)
        return forced(9, 8, 7)(logits, context)

    ids = prompt(5)
    output = one(tiny, ids, logits_processors=[spy], max_tokens=3, n=2, seed=1).outputs
    assert [o.token_ids for o in output] == [[9, 8, 7]] * 2
    assert {(c.position, c.sample_index, tuple(c.output_ids)) for c in seen} == {
        (5 + n, s, (9, 8, 7)[:n]) for n in range(3) for s in range(2)
    }
    assert all(tuple(c.prompt_ids) == tuple(ids) for c in seen)


def test_the_logits_that_a_logits_processor_is_given_are_its_to_keep(tiny: folo.Params) -> None:
    kept: list[tuple[Tensor, Tensor]] = []

    def recorder(logits: Tensor, context: Context) -> Tensor:
        kept.append((logits, logits.clone()))
        return forced(9, 8, 7)(logits, context)

    one(tiny, prompt(5), logits_processors=[recorder], max_tokens=3, n=2, seed=1)
    assert len(kept) == 6
    assert all(torch.equal(logits, given) for logits, given in kept)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda logits, context: logits[:5],
        lambda logits, context: None,
        lambda logits, context: logits.argsort(),
        lambda logits, context: logits > 0,
    ],
)
def test_a_logits_processor_that_returns_something_else_is_named(tiny: folo.Params, wrong: Any) -> None:
    with pytest.raises(folo.RequestError, match=r"'a': the logits processor .* of shape \(300,\)"):
        one(tiny, prompt(5), logits_processors=[wrong])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_logits_that_allow_no_token_are_an_error_that_names_the_request(
    tiny: folo.Params, value: float
) -> None:
    broken = folo.SamplingParams(logits_processors=[lambda logits, context: logits * 0 + value], max_tokens=4)
    state = folo.init(tiny)
    state = folo.submit(state, folo.Request(prompt(5), broken, "bad"))
    state = folo.submit(state, folo.Request(prompt(5), folo.SamplingParams(max_tokens=4, seed=0), "good"))
    batch = folo.schedule(state)
    assert batch is not None
    with pytest.raises(folo.RequestError, match=r"'bad': no token can be sampled at position 5.*abort it"):
        folo.step(tiny, state, batch)
    state = finish_all(tiny, folo.abort(state, "bad"))
    assert folo.outputs(state)["good"].outputs[0].finish_reason in ("length", "stop")
    assert folo.outputs(state)["bad"].outputs[0].finish_reason == "abort"


def test_end_of_sequence_stops_unless_it_is_ignored_or_too_early(tiny: folo.Params) -> None:
    eos = tiny.config.eos_token_ids[0]
    script = [forced(9, eos, 8, 7)]
    output = one(tiny, prompt(5), logits_processors=script, max_tokens=4).outputs[0]
    assert (output.token_ids, output.finish_reason, output.stop_reason) == ([9, eos], "stop", None)
    output = one(tiny, prompt(5), logits_processors=script, max_tokens=4, ignore_eos=True).outputs[0]
    assert (output.token_ids, output.finish_reason) == ([9, eos, 8, 7], "length")
    early = one(tiny, prompt(5), max_tokens=6, min_tokens=6, logit_bias={eos: 1e9}, stop_token_ids=[9])
    assert not {eos, 9} & set(early.outputs[0].token_ids[:5])
    late = one(tiny, prompt(5), max_tokens=6, min_tokens=3, logit_bias={eos: 1e9}).outputs[0]
    assert late.token_ids[3:] == [eos]


def test_an_end_of_sequence_may_be_token_0_and_is_none_beyond_the_vocabulary(tiny: folo.Params) -> None:
    params = replace(tiny, config=replace(tiny.config, eos_token_ids=(0, 300)))
    output = one(params, prompt(5), logits_processors=[forced(9, 0, 8)], max_tokens=3).outputs[0]
    assert (output.token_ids, output.finish_reason, output.stop_reason) == ([9, 0], "stop", None)
    state = folo.submit(folo.init(params), folo.Request(prompt(5)))
    assert state.waiting[0].origin.stop_ids == {0}


def test_stop_token_ids_stop_and_are_reported(tiny: folo.Params, tokenizer: Any) -> None:
    script = [forced(40, 41, 42)]
    for include, ids in ((False, [40]), (True, [40, 41])):
        output = one(
            tiny,
            prompt(5),
            tokenizer,
            logits_processors=script,
            stop_token_ids=[41],
            include_stop_str_in_output=include,
        ).outputs[0]
        assert (output.token_ids, output.finish_reason, output.stop_reason) == ([40, 41], "stop", 41)
        assert output.text == tokenizer.decode(ids)


def test_a_stop_string_that_straddles_tokens_cuts_the_text(tiny: folo.Params, tokenizer: Any) -> None:
    ids = tokenizer("abcdefgh xyz")["input_ids"]
    assert len(ids) > 6
    script, stop = [forced(*ids)], ["zzz", "efg", "de"]
    for include, text in ((False, "abc"), (True, "abcde")):
        output = one(
            tiny,
            prompt(5),
            tokenizer,
            logits_processors=script,
            stop=stop,
            max_tokens=len(ids),
            include_stop_str_in_output=include,
        ).outputs[0]
        assert (output.text, output.finish_reason, output.stop_reason) == (text, "stop", "de")
        assert tokenizer.decode(output.token_ids).startswith("abcde")
    late = one(
        tiny,
        prompt(5),
        tokenizer,
        logits_processors=script,
        stop=["de"],
        min_tokens=len(ids),
        max_tokens=len(ids),
    ).outputs[0]
    assert (late.text, late.finish_reason) == ("abcdefgh xyz", "length")


def test_multi_byte_text_is_right_at_every_step(tiny: folo.Params, tokenizer: Any) -> None:
    text = "héllo 世界 🎉!"
    ids = tokenizer(text)["input_ids"]
    script = folo.SamplingParams(logits_processors=[forced(*ids)], max_tokens=len(ids), stop=["never"])
    state = folo.submit(folo.init(tiny, tokenizer=tokenizer), folo.Request(prompt(5), script, "a"))
    settled: list[str] = []
    finish_all(tiny, state, lambda s: settled.extend(q.text.text for q in s.running if q.text is not None))
    assert all(text.startswith(shown) for shown in settled)
    assert "�" not in "".join(settled)
    assert folo.outputs(finish_all(tiny, state))["a"].outputs[0].text == text


def test_logprobs_hold_the_token_first_then_the_likeliest(tiny: folo.Params, tokenizer: Any) -> None:
    output = one(tiny, prompt(5), tokenizer, logprobs=3, seed=4, max_tokens=6, ignore_eos=True).outputs[0]
    assert output.logprobs is not None
    for token, table in zip(output.token_ids, output.logprobs, strict=True):
        assert next(iter(table)) == token
        ranks = [score.rank for score in table.values()]
        assert sorted(ranks)[:3] == [1, 2, 3]
        assert len(table) == (3 if table[token].rank <= 3 else 4)
        assert table[token].decoded_token == tokenizer.decode([token])


def test_the_context_ends_at_max_model_len(tiny: folo.Params) -> None:
    scheduler = folo.SchedulerConfig(max_model_len=12)
    request = folo.Request(prompt(9), folo.SamplingParams(max_tokens=None, ignore_eos=True), "a")
    output = run(tiny, [request], scheduler=scheduler)["a"].outputs[0]
    assert (len(output.token_ids), output.finish_reason) == (3, "length")


def test_finish_and_abort_end_a_request_where_it_stands(tiny: folo.Params) -> None:
    state = folo.init(tiny, folo.CacheConfig(num_blocks=16))
    for id in "abc":
        sampling = folo.SamplingParams(max_tokens=9, n=2, ignore_eos=True)
        state = folo.submit(state, folo.Request(prompt(9), sampling, id))
    batch = folo.schedule(state)
    assert batch is not None
    state, _ = folo.step(tiny, state, batch)
    state = folo.abort(state, "a")
    state = folo.finish(state, "b", "stop", "enough")
    folo.check(state)
    state, done = folo.collect(state)
    assert list(done) == ["a", "b"]
    assert {(o.finish_reason, o.stop_reason) for o in done["a"].outputs} == {("abort", None)}
    assert {(o.finish_reason, o.stop_reason) for o in done["b"].outputs} == {("stop", "enough")}
    assert all(len(o.token_ids) == 1 for o in done["b"].outputs)
    with pytest.raises(folo.RequestError, match="no request 'a' in this state"):
        folo.abort(state, "a")
    state = finish_all(tiny, state)
    assert list(folo.outputs(state)) == ["c"]
    assert not folo.has_unfinished(state)
    assert state.pool.used == 0


@pytest.mark.parametrize("reason", ["stop", "length", "abort"])
def test_a_request_is_finished_for_any_reason_that_an_output_may_have(tiny: folo.Params, reason: str) -> None:
    state = folo.submit(folo.init(tiny), folo.Request(prompt(8), folo.SamplingParams(), "a"))
    (output,) = folo.outputs(folo.finish(state, "a", reason))["a"].outputs
    assert output.finish_reason == reason


def test_an_unknown_finish_reason_is_refused(tiny: folo.Params) -> None:
    state = folo.submit(folo.init(tiny), folo.Request(prompt(8), folo.SamplingParams(), "a"))
    with pytest.raises(folo.RequestError, match="finish reason 'banana'"):
        folo.finish(state, "a", "banana")


@pytest.mark.parametrize("stop_reason", [object(), 1.5])
def test_a_stop_reason_that_cannot_be_saved_is_refused(tiny: folo.Params, stop_reason: Any) -> None:
    state = folo.submit(folo.init(tiny), folo.Request(prompt(8), folo.SamplingParams(), "a"))
    with pytest.raises(folo.RequestError, match=r"stop_reason .*expected a stop string, a token id or None"):
        folo.finish(state, "a", "stop", stop_reason)


def test_a_stop_reason_may_be_numpys_and_is_kept_as_an_int(tiny: folo.Params) -> None:
    state = folo.submit(folo.init(tiny), folo.Request(prompt(8), folo.SamplingParams(), "a"))
    (output,) = folo.outputs(folo.finish(state, "a", "stop", np.int64(7)))["a"].outputs  # pyright: ignore
    assert type(output.stop_reason) is int


def test_ids_and_salts_may_be_any_string(tiny: folo.Params) -> None:
    request = folo.Request(prompt(40), folo.SamplingParams(max_tokens=1), "\ud800", cache_salt="\udfff")
    assert run(tiny, [request])["\ud800"].finished


def test_as_many_logprobs_can_be_had_as_there_are_tokens(tiny: folo.Params) -> None:
    output = one(tiny, prompt(3), logprobs=300, prompt_logprobs=300, max_tokens=1)
    assert output.prompt_logprobs is not None
    assert output.outputs[0].logprobs is not None
    assert [len(table or ()) for table in output.prompt_logprobs] == [0, 300, 300]
    assert [len(table) for table in output.outputs[0].logprobs] == [300]
