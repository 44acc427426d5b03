"""The beam search of the examples: transformers' hypotheses, from shared blocks."""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import random_model
from engine import prompt
from prompts import TEXTS
from test_default_model import transformers_model

import folo

Hypotheses = list[tuple[float, list[int]]]


def chat(question: str) -> str:
    return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def beam_search() -> Callable[..., Hypotheses]:
    path = Path(__file__).parent.parent / "examples" / "beam_search.py"
    spec = importlib.util.spec_from_file_location("beam_search", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.beam_search


@pytest.fixture(scope="module")
def exact() -> folo.Params:
    return folo.load(dtype="float32", use_tqdm=False)


@pytest.fixture(scope="module")
def their_model(exact: folo.Params) -> Any:
    return transformers_model(exact, torch.float32)


def theirs(
    model: Any,
    prompt_ids: list[int],
    num_beams: int,
    max_tokens: int,
    eos: Sequence[int] | None,
    length_penalty: float = 1.0,
) -> tuple[Hypotheses, int]:
    """All hypotheses of transformers' beam search, without the padding, and the number of its steps."""
    ids = torch.tensor([prompt_ids])
    with torch.inference_mode():
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_tokens,
            do_sample=False,
            num_beams=num_beams,
            num_return_sequences=num_beams,
            length_penalty=length_penalty,
            early_stopping=False,
            eos_token_id=None if eos is None else list(eos),
            pad_token_id=0,
            return_dict_in_generate=True,
            output_scores=True,
        )
    lengths = (output.beam_indices >= 0).sum(dim=1).tolist()  # -1 behind the end
    new = output.sequences[:, len(prompt_ids) :].tolist()
    scores = output.sequences_scores.tolist()
    rows = zip(scores, new, lengths, strict=True)
    return [(score, row[:length]) for score, row, length in rows], len(output.scores)


def assert_same(ours: Hypotheses, theirs: Hypotheses, what: object) -> None:
    assert [ids for _, ids in ours] == [ids for _, ids in theirs], what
    expected = pytest.approx([score for score, _ in theirs], rel=1e-4, abs=1e-4)
    assert [score for score, _ in ours] == expected, what


@pytest.mark.parametrize(
    ("text", "num_beams", "ends"),
    [
        (TEXTS[3], 2, False),
        (TEXTS[9], 4, False),
        (chat("What is the capital of France?"), 2, True),
        (chat("What is 2+2?"), 4, True),
    ],
)
def test_hypotheses_of_the_default_model_are_those_of_transformers(
    exact: folo.Params,
    their_model: Any,
    beam_search: Callable[..., Hypotheses],
    text: str,
    num_beams: int,
    ends: bool,
) -> None:
    prompt_ids = folo.load_tokenizer()(text)["input_ids"]
    eos = exact.config.eos_token_ids
    ours = beam_search(exact, prompt_ids, num_beams, 16)
    expected, _ = theirs(their_model, prompt_ids, num_beams, 16, eos)
    assert_same(ours, expected, text)
    assert any(ids[-1] in eos for _, ids in ours) == ends, "as the case was chosen for"


def observe(monkeypatch: pytest.MonkeyPatch) -> list[tuple[folo.Batch, folo.EngineState]]:
    """From now on, every batch that is stepped and the state after it."""
    observed, step = [], folo.step

    def observing(params: folo.Params, state: folo.EngineState, batch: folo.Batch) -> Any:
        state, tokens = step(params, state, batch)
        observed.append((batch, state))
        return state, tokens

    monkeypatch.setattr(folo, "step", observing)
    return observed


def ending(params: folo.Params, *eos: int) -> folo.Params:
    return replace(params, config=replace(params.config, eos_token_ids=eos))


def test_hypotheses_that_end_are_those_of_transformers(
    tiny: folo.Params, beam_search: Callable[..., Hypotheses], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some tokens of the hypotheses that never end are declared to be ends: so some do, early and late."""
    rng, model, observed = random.Random(0), random_model("qwen3").eval(), observe(monkeypatch)
    early = late = 0
    for case in range(40):
        prompt_ids = prompt(rng.randint(1, 40), seed=case)
        num_beams, length_penalty = rng.choice([2, 3, 4, 6]), rng.choice([1.0, 1.0, 0.0, 2.0, 0.5, -1.0])
        endless, _ = theirs(model, prompt_ids, num_beams, 12, None, length_penalty)
        eos = rng.sample(sorted({token for _, ids in endless for token in ids}), rng.choice([1, 1, 2]))
        expected, num_steps = theirs(model, prompt_ids, num_beams, 12, eos, length_penalty)
        observed.clear()
        ours = beam_search(ending(tiny, *eos), prompt_ids, num_beams, 12, length_penalty)
        assert_same(ours, expected, case)
        assert len(observed) == num_steps, "it stops when no beam is expected to do better"
        early += sum(len(ids) < 12 for _, ids in ours)
        late += sum(len(ids) == 12 for _, ids in ours)
    assert early >= 20
    assert late >= 20


def test_beams_share_the_blocks_of_what_they_have_in_common(
    tiny: folo.Params, beam_search: Callable[..., Hypotheses], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every token is computed once, also where a beam could have ended, and tables part where tokens do."""
    prompt_ids = prompt(40)
    (_, best), *_ = beam_search(ending(tiny), prompt_ids, 4, 40)
    observed = observe(monkeypatch)
    ours = beam_search(ending(tiny, best[5]), prompt_ids, 4, 40)
    assert any(len(ids) < 40 for _, ids in ours)
    assert len(observed) > 20
    assert [batch.num_tokens for batch, _ in observed] == [40, *[4] * (len(observed) - 1)]
    saved = []
    for _, state in observed:
        folo.check(state)
        size = state.cache.block_size
        held = {
            (block.index, tuple(sequence.tokens[: min((number + 1) * size, sequence.num_computed)]))
            for sequence in state.running
            for number, block in enumerate(sequence.table.blocks)
        }
        assert len({index for index, _ in held}) == len({tokens for _, tokens in held}) == len(held)
        saved.append(sum(len(sequence.table.blocks) for sequence in state.running) - len(held))
    assert max(saved) > 6, "more than the two full blocks of the prompt, three times"
