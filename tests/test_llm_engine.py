"""The engine that is stepped from outside, and whose state is put back."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from llms import PROMPTS, SEEDED, ids_of, small_llm, text_of, used_blocks

import folo
from folo import LLM, LLMEngine, RequestError, SamplingParams


class TestEngine:
    def test_can_be_pickled_between_two_steps(self, engine: LLMEngine) -> None:
        engine.add_request("a", "the cat", SEEDED)
        assert not engine.step()[0].finished
        ends = []
        for one in (pickle.loads(pickle.dumps(engine)), engine):
            outputs = []
            while one.has_unfinished_requests():
                outputs += one.step()
            ends.append((outputs[-1].outputs, outputs[-1].finished))
        assert ends[0] == ends[1]

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

    def test_samples_that_still_wait_are_shown_too(self, checkpoint: str) -> None:
        llm = small_llm(checkpoint, max_num_seqs=1)
        llm.add_request("a", "the cat", replace(SEEDED, n=2, max_tokens=5))
        (output,) = llm.step()
        assert [len(completion.token_ids) for completion in output.outputs] == [1, 0]

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

    def test_hands_out_what_finished_in_a_state_that_was_set(self, engine: LLMEngine) -> None:
        engine.add_request("a", "the cat", SEEDED)
        engine.step()
        engine.state = folo.finish(engine.state, "a", "stop", "mine")
        assert engine.has_unfinished_requests()
        (output,) = engine.step()
        assert output.outputs[0].stop_reason == "mine"
        assert not engine.has_unfinished_requests()

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


class TestClocks:
    """Requests that came with a state that was put in run from the first step that the engine knew them."""

    def test_of_forked_requests(self, engine: LLMEngine) -> None:
        engine.add_request("a", "the cat", replace(SEEDED, max_tokens=4))
        engine.step()
        engine.state = folo.fork(engine.state, "a", ["b", "c"], seeds=[3, 4])
        while engine.has_unfinished_requests():
            for output in engine.step():
                self.check(output.metrics)

    def test_of_a_request_with_one_token_left(self, engine: LLMEngine) -> None:
        engine.add_request("a", "the cat", replace(SEEDED, max_tokens=2))
        engine.step()
        before = engine.state
        engine.step()
        engine.state = before
        (output,) = engine.step()
        assert output.finished
        self.check(output.metrics)

    def test_of_requests_that_a_state_from_outside_does_not_hold_are_forgotten(
        self, engine: LLMEngine
    ) -> None:
        empty = engine.state
        for number in range(3):
            engine.add_request(str(number), "the cat", replace(SEEDED, detokenize=True))
            engine.step()
            engine.state = empty
        engine.step()
        assert not engine._clocks
        assert not engine._texts._known
        engine.add_request("kept", "the cat", SEEDED)
        engine.step()
        arrival = engine._clocks["kept"].arrival
        engine.add_request("gone", "the cat", SEEDED)
        engine.step()
        engine.state = folo.collect(folo.abort(engine.state, "gone"))[0]
        engine.step()
        assert {id: clock.arrival for id, clock in engine._clocks.items()} == {"kept": arrival}

    def check(self, metrics: Mapping[str, float]) -> None:
        assert metrics["throughput"] > 0
        assert all(value >= 0 for value in metrics.values())
