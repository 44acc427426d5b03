"""SamplingParams: vLLM's names and defaults, values checked and kept immutable."""

import copy
import dataclasses
import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch

from folo.errors import RequestError
from folo.sampling import SamplingParams, temperature


def test_defaults_are_vllms() -> None:
    assert dataclasses.asdict(SamplingParams()) == {
        "n": 1,
        "best_of": None,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "logit_bias": (),
        "max_tokens": 16,
        "min_tokens": 0,
        "stop": (),
        "stop_token_ids": (),
        "include_stop_str_in_output": False,
        "ignore_eos": False,
        "seed": None,
        "logprobs": None,
        "prompt_logprobs": None,
        "logprobs_mode": "raw",
        "skip_special_tokens": True,
        "detokenize": True,
        "logits_processors": (),
    }


REFUSED: list[tuple[dict[str, Any], str]] = [
    *[({name: value}, f"{name} must be") for name in ("n", "best_of", "max_tokens") for value in (0, -1)],
    *[
        ({name: value}, f"{name} must be an integer.*got {value!r}")
        for name in (
            "n",
            "best_of",
            "top_k",
            "max_tokens",
            "min_tokens",
            "seed",
            "logprobs",
            "prompt_logprobs",
        )
        for value in (True, 1.5, "1", math.nan)
    ],
    *[
        ({name: value}, f"{name} must be .*got {value!r}")
        for name in (
            "temperature",
            "top_p",
            "min_p",
            "repetition_penalty",
            "presence_penalty",
            "frequency_penalty",
        )
        for value in (True, "1", None, math.nan, math.inf, -math.inf)
    ],
    *[
        ({name: 1}, f"{name} must be True or False, got 1")
        for name in ("include_stop_str_in_output", "ignore_eos", "skip_special_tokens", "detokenize")
    ],
    *[({"temperature": value}, "temperature must be 0") for value in (-0.1, 1e-6, 1e6)],
    *[({"top_k": value}, "top_k must be") for value in (-2, 2**31)],
    *[({"top_p": value}, "top_p must be in") for value in (0.0, -0.1, 1.01)],
    *[({"min_p": value}, "min_p must be in") for value in (-0.1, 1.01)],
    *[({"repetition_penalty": value}, "repetition_penalty must be in") for value in (0.0, -1.0)],
    *[({"presence_penalty": value}, "presence_penalty must be in") for value in (-2.1, 2.1)],
    *[({"frequency_penalty": value}, "frequency_penalty must be in") for value in (-2.1, 2.1)],
    *[({"seed": value}, "seed must be an integer, in .0, 2..64") for value in (-1, 2**64)],
    *[({name: -1}, f"{name} must be") for name in ("min_tokens", "logprobs", "prompt_logprobs")],
    ({"n": 3, "best_of": 2}, "best_of must be at least n"),
    ({"n": 2, "temperature": 0}, "n must be 1 when using greedy sampling"),
    ({"best_of": 2, "temperature": 0}, "best_of must be 1 or None when using greedy sampling"),
    ({"min_tokens": 17}, "min_tokens must be at most max_tokens=16, got 17"),
    ({"stop": ""}, "stop must hold strings that are not empty"),
    ({"stop": ["a", ""]}, "stop must hold strings that are not empty"),
    ({"stop": ["a", 1]}, "stop must hold strings.*got 1"),
    ({"stop": 1}, "stop must be a sequence"),
    ({"stop": {"a", "b"}}, "stop must be a sequence"),
    ({"stop": "a", "detokenize": False}, "needs detokenize=True"),
    ({"stop_token_ids": [-1]}, "stop_token_ids element must be"),
    ({"stop_token_ids": ["a"]}, "stop_token_ids element must be"),
    ({"stop_token_ids": 5}, "stop_token_ids must be a sequence"),
    ({"stop_token_ids": b"ab"}, "stop_token_ids must be a sequence"),
    ({"logit_bias": torch.zeros(5)}, "logit_bias must map"),
    ({"logit_bias": {-1: 0.0}}, "logit_bias token id must be"),
    ({"logit_bias": {"1": 0.0}}, "logit_bias token id must be"),
    ({"logit_bias": {1: math.inf}}, "logit_bias value must be"),
    ({"logit_bias": {1: math.nan}}, "logit_bias value must be"),
    ({"logit_bias": {1: 1e31}}, "logit_bias value must be"),
    ({"logit_bias": 3}, "logit_bias must map"),
    ({"logprobs_mode": "cooked"}, "logprobs_mode must be"),
    ({"logits_processors": [3]}, "logits_processors must hold functions"),
    ({"logits_processors": temperature(1.0)}, "logits_processors must be a sequence"),
]


@pytest.mark.parametrize(
    ("arguments", "message"), REFUSED, ids=[f"{n} {(*case[0],)}" for n, case in enumerate(REFUSED)]
)
def test_bad_values_are_refused_by_name(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        SamplingParams(**arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        {"temperature": 0, "n": 1, "best_of": 1},
        {"temperature": 1e-5},
        {"top_k": -1},
        {"top_p": 1e-9},
        {"min_p": 1},
        {"seed": 0},
        {"seed": 2**64 - 1},
        {"logprobs": 0, "prompt_logprobs": 0},
        {"max_tokens": None, "min_tokens": 100},
        {"min_tokens": 16},
        {"n": 2, "best_of": 4},
        {"logit_bias": {3: -math.inf}},
        {"presence_penalty": -2, "frequency_penalty": 2},
    ],
    ids=str,
)
def test_values_at_the_ends_of_their_ranges_are_kept(arguments: dict[str, Any]) -> None:
    params = SamplingParams(**arguments)
    for name in arguments.keys() - {"logit_bias"}:
        assert getattr(params, name) == arguments[name]


def test_collections_are_normalised() -> None:
    assert SamplingParams(stop="ab").stop == ("ab",)
    assert SamplingParams(stop=["b", "a"]).stop == ("b", "a")
    assert SamplingParams(stop_token_ids=[3, 1]).stop_token_ids == (3, 1)
    assert SamplingParams(stop_token_ids=None).stop_token_ids == ()
    assert SamplingParams(logit_bias={7: 1, 2: -math.inf}).logit_bias == ((2, -math.inf), (7, 1.0))


def test_equal_values_are_equal_params() -> None:
    """Whatever spelled them: a saved request must equal the one that was submitted."""
    numpys: dict[str, Any] = {"seed": np.int64(3), "top_p": np.float32(0.5)}
    spelled = SamplingParams(temperature=1, logit_bias={1: 2}, **numpys)
    plain = SamplingParams(temperature=1.0, seed=3, top_p=0.5, logit_bias={1: 2.0})
    assert spelled == plain
    assert hash(spelled) == hash(plain)
    assert (type(spelled.temperature), type(spelled.seed), type(spelled.top_p)) == (float, int, float)
    assert spelled != SamplingParams(temperature=0.9, seed=3, top_p=0.5, logit_bias={1: 2.0})


def test_params_do_not_change_with_what_they_were_made_of() -> None:
    stop, bias = ["a"], {1: 2.0}
    params = SamplingParams(stop=stop, logit_bias=bias)
    stop.append("b")
    bias[5] = 1.0
    assert params.stop == ("a",)
    assert params.logit_bias == ((1, 2.0),)
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.n = 2  # pyright: ignore[reportAttributeAccessIssue]


def test_params_can_be_copied_pickled_and_replaced() -> None:
    params = SamplingParams(stop="a", logit_bias={1: 2.0}, stop_token_ids=[4])
    assert pickle.loads(pickle.dumps(params)) == copy.deepcopy(params) == params
    assert dataclasses.replace(params, n=2) == SamplingParams(
        n=2, stop="a", logit_bias={1: 2.0}, stop_token_ids=[4]
    )
    with pytest.raises(RequestError, match="n must be"):
        dataclasses.replace(params, n=0)
