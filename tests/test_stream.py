"""Text, piece by piece: what a stream shows, and what is left of it when it is closed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from llms import PROMPTS, SEEDED, Failing, ids_of, small_llm, text_of, used_blocks

import folo
from folo import LLM, RequestError, SamplingParams


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

    def test_closed_aborts_its_request_in_a_restored_state_too(self, llm: LLM, tmp_path: Path) -> None:
        stream = llm.stream("the cat", SEEDED)
        next(stream)
        folo.save(llm.state, tmp_path / "state")
        llm.state = folo.restore(llm.params, tmp_path / "state", tokenizer=llm.tokenizer)
        next(stream)
        stream.close()
        assert not llm.has_unfinished_requests()
        assert not llm.state.requests

    def test_that_raises_takes_its_request_with_it(self, llm: LLM) -> None:
        with pytest.raises(ZeroDivisionError):
            list(llm.stream("x", replace(SEEDED, logits_processors=[Failing(ZeroDivisionError())])))
        assert used_blocks(llm) == 0
        assert not llm.has_unfinished_requests()

    def test_interrupted_as_its_request_ends_leaves_nothing_of_it(
        self, llm: LLM, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(llm, "_note", interrupt)
            with pytest.raises(KeyboardInterrupt):
                list(llm.stream("the cat", replace(SEEDED, max_tokens=1)))
        assert not llm.has_unfinished_requests()
        assert llm.step() == []

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

    def test_that_nobody_reads_pins_no_blocks(self, checkpoint: str) -> None:
        llm = small_llm(checkpoint, num_blocks=32, max_num_seqs=2, max_num_batched_tokens=32)
        prompts = [[3 + (n * 7 + i * i) % 250 for i in range(100)] for n in range(18)]
        streams = [llm.stream(prompt, replace(SEEDED, max_tokens=3)) for prompt in prompts[:8]]
        for stream in streams:
            next(stream)
        for _ in range(5):
            llm.generate(prompts[8:], replace(SEEDED, max_tokens=8), use_tqdm=False)
        texts = [text_of(output) for output in llm.generate(prompts[:8], replace(SEEDED, max_tokens=3))]
        assert all(text.endswith("".join(stream)) for text, stream in zip(texts, streams, strict=True))

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

    def test_that_is_refused_leaves_later_requests_their_seeds(self, checkpoint: str) -> None:
        unseeded = SamplingParams(max_tokens=6, ignore_eos=True)
        expected = ids_of(small_llm(checkpoint).generate("the cat", unseeded, use_tqdm=False)[0])
        llm = small_llm(checkpoint)
        for prompt, params in (("x", SamplingParams(n=2)), ([], unseeded), ([10**6], unseeded), (None, None)):
            with pytest.raises(folo.FoloError):
                llm.stream(prompt, params)  # pyright: ignore[reportArgumentType]
        assert ids_of(llm.generate("the cat", unseeded, use_tqdm=False)[0]) == expected
