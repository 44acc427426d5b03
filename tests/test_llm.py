"""The shell, LLM and LLMEngine, on a tiny random checkpoint."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import tiny_checkpoint
from gptq_files import gptq_checkpoint
from llms import MODEL_DEFAULTS, PROMPTS, SEEDED, Failing, ids_of, small_llm, text_of, used_blocks

import folo
from folo import LLM, CacheConfig, EngineConfig, LLMEngine, ModelConfig, RequestError, SamplingParams


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

    def test_goes_on_when_the_cache_is_full(self, checkpoint: str) -> None:
        """No call pins what the ones before it left in the prefix cache."""
        llm = small_llm(checkpoint, num_blocks=16, max_num_seqs=2, max_num_batched_tokens=64)
        for call in range(5):
            prompts = [[3 + (call * 4 + n + i) % 250 for i in range(100)] for n in range(4)]
            llm.generate(prompts, replace(SEEDED, max_tokens=4), use_tqdm=False)
        assert folo.stats(llm.state).blocks_cached > 8

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

    @pytest.mark.parametrize(
        "processor",
        [Failing(ZeroDivisionError()), lambda logits, _: logits - torch.inf],
        ids=["error", "no token"],
    )
    def test_leaves_every_block_free_though_its_traceback_is_kept(self, llm: LLM, processor: Any) -> None:
        """As a notebook keeps it, and whoever tries again while handling the error."""
        with pytest.raises((ZeroDivisionError, RequestError)) as caught:
            llm.generate("x", replace(SEEDED, logits_processors=[processor]), use_tqdm=False)
        heap = llm.state.heap
        assert heap.num_free == heap.num_blocks
        del caught


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

    def test_takes_a_template_where_the_model_has_none(self, llm: LLM) -> None:
        llm.tokenizer.chat_template = None
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
