"""The shell, LLM and LLMEngine, on a tiny random checkpoint."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import tiny_checkpoint
from gptq_files import gptq_checkpoint
from torch import Tensor

import folo
from folo import LLM, CacheConfig, EngineConfig, LLMEngine, ModelConfig, RequestError, SamplingParams
from folo.sampling import Context

MODEL_DEFAULTS = {"temperature": 0.5, "top_k": 7, "top_p": 0.9}
PROMPTS = ["the cat", "the other hat in the end", "x"]
SEEDED = SamplingParams(seed=5, max_tokens=20, ignore_eos=True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("tiny")
    tiny_checkpoint(path, tokenizer=True, generation=MODEL_DEFAULTS)
    return str(path)


def small_llm(checkpoint: str, **options: Any) -> LLM:
    return LLM(checkpoint, use_tqdm=False, **{"num_blocks": 64, **options})


@pytest.fixture
def llm(checkpoint: str) -> LLM:
    return small_llm(checkpoint)


@pytest.fixture
def engine(checkpoint: str) -> LLMEngine:
    return LLMEngine(EngineConfig(ModelConfig(checkpoint), CacheConfig(num_blocks=64)), use_tqdm=False)


def text_of(output: folo.RequestOutput) -> str:
    return output.outputs[0].text


def ids_of(output: folo.RequestOutput) -> list[int]:
    return output.outputs[0].token_ids


def used_blocks(llm: LLMEngine) -> int:
    return llm.state.pool.used


class Failing:
    """A logits processor that raises at its `at`-th call."""

    def __init__(self, error: BaseException, at: int = 3) -> None:
        self.error, self.calls_left = error, at

    def __call__(self, logits: Tensor, context: Context) -> Tensor:
        self.calls_left -= 1
        if not self.calls_left:
            raise self.error
        return logits


class TestGenerate:
    def test_takes_text_and_token_ids_alone_and_in_lists(self, llm: LLM) -> None:
        ids = list(llm.encode(PROMPTS[0]))
        forms: list[Any] = [PROMPTS[0], ids, tuple(ids), [PROMPTS[0]], [ids], [torch.tensor(ids).numpy()]]
        results = [llm.generate(form, SEEDED, use_tqdm=False) for form in forms]
        assert all(len(result) == 1 for result in results)
        assert {tuple(ids_of(result[0])) for result in results} == {tuple(ids_of(results[0][0]))}
        assert [result[0].prompt for result in results] == [PROMPTS[0], None, None, PROMPTS[0], None, None]
        assert all(result[0].prompt_token_ids == ids for result in results)

    def test_keeps_the_order_of_prompts_whoever_ends_first(self, llm: LLM) -> None:
        params = [replace(SEEDED, max_tokens=count) for count in (9, 1, 4)]
        outputs = llm.generate(PROMPTS, params, use_tqdm=False)
        assert [output.prompt for output in outputs] == PROMPTS
        assert [len(ids_of(output)) for output in outputs] == [9, 1, 4]

    def test_of_no_prompts_is_no_outputs(self, llm: LLM) -> None:
        assert llm.generate([], use_tqdm=False) == []
        assert llm.chat([], use_tqdm=False) == []

    def test_fills_in_every_field(self, llm: LLM) -> None:
        params = SamplingParams(temperature=0, max_tokens=3, logprobs=2, prompt_logprobs=1, ignore_eos=True)
        (output,) = llm.generate("the cat", params, use_tqdm=False)
        (completion,) = output.outputs
        assert output.finished
        assert completion.finished
        assert (completion.finish_reason, completion.stop_reason) == ("length", None)
        assert completion.text == llm.tokenizer.decode(completion.token_ids)
        assert output.lineage == ()
        assert completion.logprobs is not None
        assert completion.cumulative_logprob == pytest.approx(
            sum(row[token].logprob for row, token in zip(completion.logprobs, ids_of(output), strict=True))
        )
        assert output.prompt_logprobs is not None
        assert len(output.prompt_logprobs) == len(output.prompt_token_ids)

    def test_without_parameters_uses_those_of_generation_config(self, llm: LLM) -> None:
        assert llm.get_default_sampling_params() == SamplingParams(**MODEL_DEFAULTS)
        (default,) = llm.generate("the cat", use_tqdm=False)
        params = SamplingParams(**MODEL_DEFAULTS, seed=default.outputs[0].seed)
        assert ids_of(llm.generate("the cat", params, use_tqdm=False)[0]) == ids_of(default)

    def test_defaults_of_the_model_that_make_no_sense_name_their_file(self, tmp_path: Path) -> None:
        tiny_checkpoint(tmp_path, tokenizer=True, generation={"top_k": 50.0})
        with pytest.raises(RequestError, match=r"generation_config\.json of the model: top_k .*got 50\.0"):
            small_llm(str(tmp_path)).generate("the cat", use_tqdm=False)

    def test_counts_parameters_and_prompts(self, llm: LLM) -> None:
        with pytest.raises(RequestError, match="2 sampling_params for 3 prompts"):
            llm.generate(PROMPTS, [SEEDED] * 2, use_tqdm=False)

    def test_shows_progress_that_ends_at_100_percent(
        self, llm: LLM, capsys: pytest.CaptureFixture[str]
    ) -> None:
        llm.generate(PROMPTS, replace(SEEDED, max_tokens=50, stop=["e"]))
        last = capsys.readouterr().err.rstrip().split("\r")[-1]
        assert "Generating: 100%" in last
        assert "3/3 prompts" in last

    def test_without_a_tokenizer_takes_ids_and_gives_ids(self, llm: LLM, checkpoint: str) -> None:
        bare = small_llm(checkpoint, skip_tokenizer_init=True)
        (output,) = bare.generate([5, 6, 7], SEEDED, use_tqdm=False)
        assert ids_of(output) == ids_of(llm.generate([5, 6, 7], SEEDED, use_tqdm=False)[0])
        assert text_of(output) == ""
        for call in (bare.generate, bare.stream):
            with pytest.raises(RequestError, match="needs a tokenizer"):
                call("text")
        with pytest.raises(RequestError, match="needs a tokenizer"):
            bare.stream([5, 6, 7])
        with pytest.raises(RequestError, match="needs a tokenizer"):
            bare.chat([{"role": "user", "content": "hi"}])

    def test_refuses_a_prompt_that_is_too_long_without_a_warning(
        self, llm: LLM, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
    ) -> None:
        llm.tokenizer.model_max_length = 256
        with pytest.raises(RequestError, match="leaves no room for output under max_model_len=256"):
            llm.generate("the " * 400, use_tqdm=False)
        assert not caplog.records
        assert capsys.readouterr().err == ""


class TestMetrics:
    def test_are_seconds_that_fit_together(self, llm: LLM) -> None:
        before, begun = time.time(), time.perf_counter()
        outputs = llm.generate(PROMPTS, SEEDED, use_tqdm=False)
        elapsed = time.perf_counter() - begun
        for output in outputs:
            m = output.metrics
            assert set(m) == {"arrival", "queue_time", "ttft", "tpot", "throughput"}
            assert before <= m["arrival"] <= time.time()
            assert 0 <= m["queue_time"] < m["ttft"] < elapsed
            whole = m["ttft"] + 19 * m["tpot"]
            assert m["ttft"] < whole <= elapsed
            assert m["throughput"] == pytest.approx(20 / whole)

    def test_of_one_token_have_no_pace(self, llm: LLM) -> None:
        (output,) = llm.generate("x", replace(SEEDED, max_tokens=1), use_tqdm=False)
        assert output.metrics["tpot"] == 0

    def test_queue_time_is_that_before_admission(self, checkpoint: str) -> None:
        llm = small_llm(checkpoint, max_num_seqs=1)
        first, second = llm.generate(PROMPTS[:2], SEEDED, use_tqdm=False)
        assert second.metrics["queue_time"] > first.metrics["queue_time"] + 19 * first.metrics["tpot"]

    def test_are_partial_while_a_request_waits(self, engine: LLMEngine) -> None:
        engine.add_request("a", "the cat", SEEDED)
        engine.abort_request("a")
        (output,) = engine.step()
        assert set(output.metrics) == {"arrival"}


class TestStream:
    @pytest.mark.parametrize(
        "params",
        [
            SEEDED,
            SamplingParams(temperature=0, max_tokens=40),
            replace(SEEDED, max_tokens=60, seed=1, stop=["e", "th"]),
            replace(SEEDED, max_tokens=60, seed=2, stop="a", include_stop_str_in_output=True),
            replace(SEEDED, max_tokens=30, seed=3, stop="e", min_tokens=25),
        ],
        ids=["seeded", "greedy", "stop", "stop-included", "min-tokens"],
    )
    def test_concatenates_to_the_text_of_generate(self, llm: LLM, params: SamplingParams) -> None:
        pieces = list(llm.stream("the cat", params))
        assert all(pieces)
        assert "".join(pieces) == text_of(llm.generate("the cat", params, use_tqdm=False)[0])

    def test_returns_the_output(self, llm: LLM) -> None:
        def relay() -> Iterator[str]:
            returned.append((yield from llm.stream("the cat", SEEDED)))

        returned: list[folo.RequestOutput] = []
        text = "".join(relay())
        assert text_of(returned[0]) == text
        assert returned[0].metrics["ttft"] > 0

    def test_never_shows_a_part_of_a_stop_string(self, llm: LLM) -> None:
        letters = {llm.tokenizer.convert_tokens_to_ids(letter): 1000.0 for letter in "abcd"}
        params = replace(SEEDED, logit_bias=letters, max_tokens=200)
        whole = text_of(llm.generate("the cat", params, use_tqdm=False)[0])
        assert len(whole) == 200  # a letter a token: most stop strings come in parts
        for at in range(8, 20):
            stop = whole[at : at + 4]
            expected, shown = whole[: whole.index(stop)], ""
            for piece in llm.stream("the cat", replace(params, stop=[stop])):
                shown += piece
                assert expected.startswith(shown)
            assert shown == expected

    def test_closed_aborts_its_request_and_frees_its_blocks(self, llm: LLM) -> None:
        stream = llm.stream("the cat", SEEDED)
        next(stream)
        assert used_blocks(llm) > 0
        stream.close()
        assert used_blocks(llm) == 0
        assert not llm.has_unfinished_requests()
        assert not llm.state.requests

    def test_that_raises_takes_its_request_with_it(self, llm: LLM) -> None:
        with pytest.raises(ZeroDivisionError):
            list(llm.stream("x", replace(SEEDED, logits_processors=[Failing(ZeroDivisionError())])))
        assert used_blocks(llm) == 0
        assert not llm.has_unfinished_requests()

    def test_never_begun_leaves_no_trace(self, llm: LLM) -> None:
        llm.stream("the cat", SEEDED).close()
        assert not llm.has_unfinished_requests()

    def test_survives_an_interleaved_generate(self, llm: LLM) -> None:
        long = replace(SEEDED, max_tokens=60)
        expected = ["".join(llm.stream(prompt, long)) for prompt in PROMPTS[:2]]
        streams = [llm.stream(prompt, long) for prompt in PROMPTS[:2]]
        texts = [next(stream) for stream in streams]
        for count in (3, 80):  # the second call outlives the streams' requests
            outputs = llm.generate(PROMPTS, replace(SEEDED, max_tokens=count), use_tqdm=False)
            assert [len(ids_of(output)) for output in outputs] == [count] * 3
            texts = [text + next(stream, "") for text, stream in zip(texts, streams, strict=True)]
        texts = [text + "".join(stream) for text, stream in zip(texts, streams, strict=True)]
        assert texts == expected
        assert not llm.has_unfinished_requests()

    def test_keeps_its_output_from_step(self, llm: LLM) -> None:
        expected = "".join(llm.stream("the cat", SEEDED))
        stream = llm.stream("the cat", SEEDED)
        text = next(stream)
        llm.add_request("mine", "x", replace(SEEDED, max_tokens=30))
        handed_out = set[str]()
        while llm.has_unfinished_requests():
            handed_out |= {output.request_id for output in llm.step()}
        assert handed_out == {"mine"}
        assert text + "".join(stream) == expected

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"n": 2}, "needs n=1"),
            ({"best_of": 2}, "best_of=None"),
            ({"detokenize": False}, "detokenize=True"),
            ({"stop_token_ids": [999]}, "outside the vocabulary"),
        ],
    )
    def test_refuses_when_called_not_when_read(self, llm: LLM, change: dict[str, Any], message: str) -> None:
        with pytest.raises(RequestError, match=message):
            llm.stream("the cat", replace(SEEDED, **change))


class TestGenerateThatRaises:
    """It puts the engine back as it was, with what is open in it."""

    failures = pytest.mark.parametrize(
        "failure",
        [
            (RequestError, ["fine", ""], SEEDED),
            (RequestError, ["fine", "the " * 400], SEEDED),
            (ZeroDivisionError, "x", replace(SEEDED, logits_processors=[Failing(ZeroDivisionError())])),
            (KeyboardInterrupt, "x", replace(SEEDED, logits_processors=[Failing(KeyboardInterrupt())])),
            (RequestError, "x", replace(SEEDED, logits_processors=[lambda logits, context: logits[1:]])),
        ],
        ids=["empty", "long", "error", "interrupt", "shape"],
    )

    @failures
    def test_with_nothing_open(self, llm: LLM, failure: tuple[type[BaseException], Any, Any]) -> None:
        kind, prompts, params = failure
        before = llm.state
        fresh = replace(SEEDED, seed=None)
        with pytest.raises(kind):
            llm.generate(prompts, self.renewed(params), use_tqdm=False)
        assert not llm.has_unfinished_requests()
        assert used_blocks(llm) == 0
        assert llm.state.arrivals == before.arrivals
        # Seeds that are derived from request ids do not move either.
        (output,) = llm.generate("the cat", fresh, use_tqdm=False)
        assert output.request_id == "0"

    @failures
    def test_with_open_streams_and_requests(
        self, llm: LLM, failure: tuple[type[BaseException], Any, Any]
    ) -> None:
        kind, prompts, params = failure
        expected = [text_of(output) for output in llm.generate(PROMPTS, SEEDED, use_tqdm=False)]
        llm.add_request("mine", PROMPTS[2], SEEDED)
        streams = [llm.stream(prompt, SEEDED) for prompt in PROMPTS[:2]]
        texts = [next(stream) for stream in streams]
        ids = set(dict(llm.state.requests.items()))
        with pytest.raises(kind):
            llm.generate(prompts, self.renewed(params), use_tqdm=False)
        assert set(dict(llm.state.requests.items())) == ids
        texts = [text + "".join(stream) for text, stream in zip(texts, streams, strict=True)]
        assert texts == expected[:2]
        while llm.has_unfinished_requests():
            for output in llm.step():
                if output.finished:
                    assert text_of(output) == expected[2]
                    assert output.metrics["ttft"] > 0
        assert used_blocks(llm) == 0

    @staticmethod
    def renewed(params: SamplingParams) -> SamplingParams:
        """With processors that have not counted any calls yet."""
        return replace(
            params,
            logits_processors=[
                Failing(p.error) if isinstance(p, Failing) else p for p in params.logits_processors
            ],
        )

    def test_keeps_outputs_that_were_not_handed_out(self, engine: LLMEngine) -> None:
        engine.add_request("done", "x", replace(SEEDED, max_tokens=1))
        engine.generate("the cat", SEEDED)
        with pytest.raises(ZeroDivisionError):
            engine.generate("x", replace(SEEDED, logits_processors=[Failing(ZeroDivisionError())]))
        (output,) = engine.step()
        assert (output.request_id, output.finished) == ("done", True)


class TestChat:
    def test_goes_through_the_template_of_the_model(self, llm: LLM) -> None:
        messages = [{"role": "user", "content": "the cat"}]
        (output,) = llm.chat(messages, SEEDED, use_tqdm=False)
        text = llm.tokenizer.decode(output.prompt_token_ids)
        assert text == "<|im_start|>user\nthe cat<|im_end|>\n<|im_start|>assistant\n"
        assert ids_of(output) == ids_of(llm.generate(output.prompt_token_ids, SEEDED, use_tqdm=False)[0])

    def test_answers_a_list_of_conversations(self, llm: LLM) -> None:
        conversations = [[{"role": "user", "content": text}] for text in PROMPTS]
        together = llm.chat(conversations, SEEDED, use_tqdm=False)
        alone = [llm.chat(conversation, SEEDED, use_tqdm=False)[0] for conversation in conversations]
        assert [ids_of(output) for output in together] == [ids_of(output) for output in alone]

    def test_takes_a_template_of_the_callers(self, llm: LLM) -> None:
        messages = [{"role": "user", "content": "the cat"}]
        template = "{{ messages[0]['content'] }}!"
        (output,) = llm.chat(messages, SEEDED, use_tqdm=False, chat_template=template)
        assert llm.tokenizer.decode(output.prompt_token_ids) == "the cat!"

    def test_without_a_template_says_so(self, llm: LLM) -> None:
        llm.tokenizer.chat_template = None
        with pytest.raises(RequestError, match="no chat template"):
            llm.chat([{"role": "user", "content": "hi"}], use_tqdm=False)

    @pytest.mark.parametrize("messages", ["hi", {"role": "user", "content": "hi"}, None])
    def test_takes_a_list_of_messages(self, llm: LLM, messages: Any) -> None:
        with pytest.raises(RequestError, match="messages must be "):
            llm.chat(messages, use_tqdm=False)

    def test_reports_what_the_template_objects_to(self, llm: LLM) -> None:
        template = "{{ raise_exception('only users may speak') }}"
        with pytest.raises(RequestError, match="only users may speak"):
            llm.chat([{"role": "dog", "content": "wuff"}], use_tqdm=False, chat_template=template)


class TestEngine:
    def test_one_prompt_in_one_output_out(self, engine: LLMEngine) -> None:
        one, many = engine.generate("the cat", SEEDED), engine.generate(["the cat", [5, 6]], SEEDED)
        assert isinstance(one, folo.RequestOutput)
        assert isinstance(many, list)
        assert ids_of(many[0]) == ids_of(one)
        assert len(many) == 2

    def test_steps_hand_out_growing_outputs_and_each_end_once(self, engine: LLMEngine) -> None:
        expected = engine.generate(PROMPTS[:2], [SEEDED, replace(SEEDED, max_tokens=4)])
        assert isinstance(expected, list)
        engine.add_request("a", PROMPTS[0], SEEDED)
        seen: dict[str, list[folo.RequestOutput]] = {"a": [], "b": []}
        for number in range(100):
            if number == 2:
                engine.add_request("b", PROMPTS[1], replace(SEEDED, max_tokens=4))
            if not engine.has_unfinished_requests():
                break
            for output in engine.step():
                seen[output.request_id].append(output)
        for outputs, whole in zip(seen.values(), expected, strict=True):
            assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
            assert [len(ids_of(output)) for output in outputs] == list(range(1, len(outputs) + 1))
            assert all(output.metrics["ttft"] > 0 for output in outputs)
            assert replace(outputs[-1].outputs[0], index=0) == whole.outputs[0]
        assert engine.step() == []

    def test_samples_of_one_request_come_together(self, engine: LLMEngine) -> None:
        engine.add_request("a", "the cat", replace(SEEDED, n=3, max_tokens=5))
        ended = list[folo.RequestOutput]()
        while engine.has_unfinished_requests():
            (output,) = engine.step()
            assert [completion.index for completion in output.outputs] == [0, 1, 2]
            ended += [output] * output.finished
        assert len(ended) == 1
        assert len({tuple(completion.token_ids) for completion in ended[0].outputs}) == 3

    def test_abort_ends_a_request_with_what_it_has(self, engine: LLMEngine) -> None:
        engine.add_request("a", "the cat", SEEDED)
        (partial,) = engine.step()
        engine.abort_request("a")
        assert used_blocks(engine) == 0
        (output,) = engine.step()
        assert output.finished
        assert output.outputs[0].finish_reason == "abort"
        assert ids_of(output) == ids_of(partial)
        with pytest.raises(RequestError, match="no request 'a'"):
            engine.abort_request("a")

    def test_refuses_an_id_twice(self, engine: LLMEngine) -> None:
        engine.add_request("a", "the cat", replace(SEEDED, max_tokens=1))
        with pytest.raises(RequestError, match=r"'a'.*already"):
            engine.add_request("a", "x")
        engine.generate("x", SEEDED)
        with pytest.raises(RequestError, match="'a' has ended"):
            engine.add_request("a", "x")
        (output,) = engine.step()
        assert output.prompt == "the cat"
        engine.add_request("a", "x")

    def test_generate_stays_clear_of_ids_in_use(self, engine: LLMEngine) -> None:
        engine.add_request("0", "the cat", replace(SEEDED, max_tokens=1))
        engine.add_request("1", "the cat", replace(SEEDED, max_tokens=30))
        engine.step()
        engine.generate("x", replace(SEEDED, max_tokens=3))
        engine.add_request("3", "the cat", replace(SEEDED, max_tokens=1))
        outputs = engine.generate(["x", "x"], replace(SEEDED, max_tokens=3))
        assert isinstance(outputs, list)
        assert not {output.request_id for output in outputs} & {"0", "1", "3"}

    def test_generates_beside_requests_that_have_ended_unseen(self, engine: LLMEngine) -> None:
        engine.add_request("0", "the cat", replace(SEEDED, max_tokens=1))
        engine.add_request("1", "the cat", replace(SEEDED, max_tokens=2))
        engine.abort_request("0")
        engine.abort_request("1")
        output = engine.generate("x", SEEDED)
        assert isinstance(output, folo.RequestOutput)
        assert {output.request_id for output in engine.step()} == {"0", "1"}

    def test_generate_stays_clear_of_the_ids_of_a_restored_state(
        self, engine: LLMEngine, tmp_path: Path
    ) -> None:
        engine.add_request("0", "the cat", replace(SEEDED, max_tokens=1))
        engine.add_request("1", "the cat", SEEDED)
        folo.save(engine.state, tmp_path / "state")
        other = LLMEngine(engine.config, use_tqdm=False)
        other.state = folo.restore(other.params, tmp_path / "state", tokenizer=other.tokenizer)
        output = other.generate("x", SEEDED)
        assert isinstance(output, folo.RequestOutput)
        assert output.request_id == "2"
        assert "".join(other.stream("x", SEEDED)) == text_of(output)

    def test_generate_does_not_wait_for_requests_that_someone_took_away(
        self, llm: LLM, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before = llm.state  # another thread, say, puts back what it took before this one came
        monkeypatch.setattr(llm, "_collect", lambda: setattr(llm, "state", before))
        with pytest.raises(RequestError, match=r"'0' is no longer in the engine's state.*an LLM for each"):
            llm.generate("x", SEEDED, use_tqdm=False)


class TestConfiguration:
    def test_options_reach_their_configs(self, checkpoint: str) -> None:
        llm = small_llm(checkpoint, dtype="bfloat16", seed=3, block_size=32, num_blocks=9, max_num_seqs=2)
        assert llm.params.dtype == torch.bfloat16
        assert (llm.state.seed, llm.state.scheduler.max_num_seqs) == (3, 2)
        assert (llm.state.cache.block_size, llm.state.cache.num_blocks) == (32, 9)

    def test_takes_a_whole_engine_config(self, checkpoint: str) -> None:
        config = EngineConfig(ModelConfig(checkpoint), CacheConfig(num_blocks=8))
        llm = LLM(engine_config=config, use_tqdm=False)
        assert llm.config is config
        assert llm.state.cache.num_blocks == 8

    def test_takes_no_options_beside_an_engine_config(self, checkpoint: str) -> None:
        config = EngineConfig(ModelConfig(checkpoint))
        with pytest.raises(folo.ConfigError, match="drop model, seed"):
            LLM(checkpoint, engine_config=config, seed=1)
        with pytest.raises(folo.ConfigError, match="drop seed"):
            LLM(engine_config=config, seed=1)

    def test_names_an_unknown_option_and_those_there_are(self, checkpoint: str) -> None:
        with pytest.raises(folo.ConfigError, match=r"unknown option max_seqs.*max_num_seqs"):
            LLM(checkpoint, max_seqs=1)

    def test_a_format_that_is_asked_for_has_to_be_there(self, checkpoint: str, tmp_path: Path) -> None:
        gptq_checkpoint(tmp_path)
        llm = small_llm(str(tmp_path), tokenizer=checkpoint, quantization="gptq")
        assert llm.params.quantized
        assert small_llm(str(tmp_path), tokenizer=checkpoint).params.quantized
        with pytest.raises(folo.ConfigError, match=r"quantization='gptq', but .* is not in that format"):
            small_llm(checkpoint, quantization="gptq")
        with pytest.raises(folo.ConfigError, match="quantization='awq': expected None or 'gptq'"):
            small_llm(checkpoint, quantization="awq")

    def test_takes_a_model_config_and_a_device(self, checkpoint: str) -> None:
        engine = LLMEngine(ModelConfig(checkpoint), device="cpu", use_tqdm=False)
        assert engine.params.device.type == "cpu"

    def test_never_runs_remote_code_and_says_so(self, checkpoint: str) -> None:
        with pytest.warns(UserWarning, match="never runs remote code"):
            llm = small_llm(checkpoint, trust_remote_code=True)
        assert len(llm.generate("x", SEEDED, use_tqdm=False)) == 1

    def test_tokenizer_may_lie_elsewhere(self, checkpoint: str, tmp_path: Path) -> None:
        tiny_checkpoint(tmp_path)
        llm = small_llm(str(tmp_path), tokenizer=checkpoint)
        assert llm.generate("the cat", SEEDED, use_tqdm=False)[0].prompt == "the cat"


class TestRewinding:
    """The engine is `state`: setting it to an older value is going back."""

    def test_the_engine_goes_on_from_an_older_state(self, llm: LLM) -> None:
        params = SamplingParams(seed=3, max_tokens=12, ignore_eos=True, detokenize=True)
        llm.add_request("back", "the cat sat", params)
        for _ in range(4):
            llm.step()
        older = llm.state
        texts = []
        for _ in range(2):
            llm.state = older
            pieces = []
            while llm.has_unfinished_requests():
                (output,) = llm.step()
                pieces.append(output.outputs[0].text)
            texts.append(pieces)
        assert texts[0] == texts[1]
        assert len(texts[0]) == 8

    def test_logprobs_of_running_requests_show_their_tokens(self, llm: LLM) -> None:
        llm.add_request(
            "scored", "the cat", SamplingParams(seed=1, max_tokens=4, logprobs=2, ignore_eos=True)
        )
        shown = [llm.step()[0].outputs[0] for _ in range(4)]
        final = shown[-1].logprobs
        assert final is not None
        for count, output in enumerate(shown, 1):
            assert output.logprobs == final[:count]
            for table in final[:count]:
                assert all(s.decoded_token == llm.tokenizer.decode([t]) for t, s in table.items())

    def test_an_output_is_not_lost_when_a_step_is_interrupted(
        self, llm: LLM, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        llm.add_request("short", "the cat", SamplingParams(seed=1, max_tokens=1, ignore_eos=True))
        llm.add_request("long", "the dog", SamplingParams(seed=1, max_tokens=3, ignore_eos=True))

        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(llm, "_output", interrupt)
            with pytest.raises(KeyboardInterrupt):
                llm.step()
        seen = set()
        while llm.has_unfinished_requests():
            seen |= {output.request_id for output in llm.step() if output.finished}
        assert seen == {"short", "long"}

    def test_a_stream_whose_id_was_taken_leaves_the_other_request_alone(self, llm: LLM) -> None:
        params = SamplingParams(seed=1, max_tokens=3, ignore_eos=True)
        stream = llm.stream("the cat", params)
        llm.add_request(str(llm._next_id - 1), "the dog", params)
        with pytest.raises(RequestError, match="with this id is in the state already"):
            next(stream)
        outputs = []
        while llm.has_unfinished_requests():
            outputs += [output for output in llm.step() if output.finished]
        assert [output.outputs[0].finish_reason for output in outputs] == ["length"]

    def test_aborting_what_has_just_ended_is_fine(self, llm: LLM) -> None:
        llm.add_request("over", [5, 6], SamplingParams(seed=1, max_tokens=1, ignore_eos=True))
        llm._advance()
        llm.abort_request("over")
        (output,) = llm.step()
        assert output.outputs[0].finish_reason == "length"


class TestPromptForms:
    def test_mappings_and_tensors_are_prompts(self, llm: LLM) -> None:
        params = SamplingParams(seed=1, max_tokens=3, ignore_eos=True)
        ids = list(llm.encode("the cat"))
        forms: list[Any] = [{"prompt": "the cat"}, {"prompt_token_ids": ids}, torch.tensor(ids), "the cat"]
        outputs = [llm.generate(form, params, use_tqdm=False)[0] for form in forms]
        outputs += llm.generate(forms, params, use_tqdm=False)
        assert {tuple(output.outputs[0].token_ids) for output in outputs} == {
            tuple(outputs[0].outputs[0].token_ids)
        }
        assert [output.prompt for output in outputs[:4]] == ["the cat", None, None, "the cat"]

    @pytest.mark.parametrize(
        "prompts", [None, 5, iter(["the cat"]), {"the cat"}, torch.tensor(5), np.array(5), b"the cat"]
    )
    def test_what_is_no_prompt_and_no_list_is_refused(self, llm: LLM, prompts: Any) -> None:
        with pytest.raises(RequestError, match="prompts must be text, token ids, or a list"):
            llm.generate(prompts, use_tqdm=False)

    @pytest.mark.parametrize("params", [5, "x", {"temperature": 0, "n": 1}, ["x"]])
    def test_what_are_no_parameters_is_refused(self, llm: LLM, params: Any) -> None:
        with pytest.raises(RequestError, match="must be SamplingParams"):
            llm.generate("the cat", params, use_tqdm=False)

    def test_a_string_that_is_no_text_is_refused(self, llm: LLM) -> None:
        with pytest.raises(RequestError, match=r"'the \\udc80' holds a lone surrogate"):
            llm.generate("the \udc80", use_tqdm=False)

    def test_other_keys_are_refused(self, llm: LLM) -> None:
        with pytest.raises(RequestError, match="got the keys 'text'"):
            llm.generate({"text": "x"}, use_tqdm=False)
