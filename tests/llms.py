"""Short ways to make an LLM of a tiny checkpoint, and to look at what it generates."""

from __future__ import annotations

from typing import Any

from torch import Tensor

import folo
from folo import LLM, LLMEngine, SamplingParams
from folo.sampling import Context

MODEL_DEFAULTS = {"temperature": 0.5, "top_k": 7, "top_p": 0.9}


PROMPTS = ["the cat", "the other hat in the end", "x"]


SEEDED = SamplingParams(seed=5, max_tokens=20, ignore_eos=True)


def small_llm(checkpoint: str, **options: Any) -> LLM:
    return LLM(checkpoint, use_tqdm=False, **{"num_blocks": 64, **options})


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
