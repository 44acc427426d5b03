"""The default model against transformers, and the first promise on it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import state_dict
from engine import run
from prompts import token_ids
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.initialization import no_init_weights

import folo


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return folo.load_tokenizer()


@pytest.fixture(scope="module")
def prompts(tokenizer: Any) -> list[list[int]]:
    return token_ids(tokenizer)


@pytest.fixture(scope="module")
def exact() -> folo.Params:
    return folo.load(dtype="float32", use_tqdm=False)


def transformers_model(params: folo.Params, dtype: torch.dtype) -> Any:
    """transformers' own modules around the same weights (their loading is compared in test_load_gguf)."""
    config = params.config
    settings = LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        max_position_embeddings=config.max_position_embeddings,
        rms_norm_eps=config.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope.theta},
        tie_word_embeddings=True,
    )
    with no_init_weights():  # random numbers for 135 million weights take longer than these
        model: Any = LlamaForCausalLM(settings)
    missing, unexpected = model.load_state_dict(state_dict(params), strict=False)
    assert (missing, unexpected) in (([], []), (["lm_head.weight"], []))
    model.tie_weights()
    return model.to(dtype).eval()


def test_greedy_float32_equals_transformers_token_for_token(
    exact: folo.Params, prompts: list[list[int]]
) -> None:
    model = transformers_model(exact, torch.float32)
    greedy = folo.SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
    requests = [folo.Request(ids, greedy, str(n)) for n, ids in enumerate(prompts)]
    outputs = run(exact, requests, folo.CacheConfig(num_blocks=400))
    requests.sort(key=lambda request: len(request.prompt_token_ids))
    for some in (requests[:12], requests[12:15], requests[15:]):  # of like lengths
        longest = len(some[-1].prompt_token_ids)
        ids, mask = torch.zeros(2, len(some), longest, dtype=torch.long)
        for row, request in enumerate(some):
            ids[row, longest - len(request.prompt_token_ids) :] = torch.tensor(request.prompt_token_ids)
            mask[row, longest - len(request.prompt_token_ids) :] = 1
        with torch.inference_mode():
            expected = model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=64,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        for request, row in zip(some, expected[:, longest:].tolist(), strict=True):
            assert outputs[request.id].outputs[0].token_ids == row, request.id


def test_bfloat16_is_as_close_to_float32_as_transformers_is(
    exact: folo.Params, prompts: list[list[int]]
) -> None:
    """The bound is 1.02: the same rounding of weights and activations, plus noise of the last bit."""
    half = folo.load(dtype="bfloat16", use_tqdm=False)
    models = [transformers_model(exact, dtype) for dtype in (torch.float32, torch.bfloat16)]
    ours = theirs = 0.0
    with torch.inference_mode():
        for ids in prompts:
            truth, rounded = (model(torch.tensor([ids])).logits[0].float() for model in models)
            ours += (folo.model.forward(half, torch.tensor(ids)) - truth).abs().mean().item()
            theirs += (rounded - truth).abs().mean().item()
    print(f"mean |logit error| in bfloat16: folo {ours / 16:.4f}, transformers {theirs / 16:.4f}")
    assert ours <= 1.02 * theirs


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_alone_and_together_are_bit_identical(prompts: list[list[int]], temperature: float) -> None:
    params = folo.load(use_tqdm=False)
    assert params.dtype == torch.bfloat16
    requests = []
    for n, ids in enumerate(prompts):
        sampling = folo.SamplingParams(
            temperature=temperature, max_tokens=12, seed=n, logprobs=1, ignore_eos=True
        )
        requests.append(folo.Request(ids, sampling, str(n)))
    together = run(params, requests, folo.CacheConfig(num_blocks=400))
    for request in requests:
        alone = run(params, [request], folo.CacheConfig(num_blocks=400))[request.id]
        assert alone.outputs == together[request.id].outputs, "tokens and logprobs, compared as floats"


_MEMORY = """
import torch
import folo


def anonymous():
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


torch.compile(lambda x: x + 1)(torch.ones(3))
before = anonymous()
params = folo.load(use_tqdm=False)
print((anonymous() - before) / params.num_bytes)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_memory_after_loading_is_the_weights_and_little_more() -> None:
    """Packed weights replace the plain ones, and loading leaves no holes: at most 1.15 times the weights."""
    done = subprocess.run([sys.executable, "-c", _MEMORY], capture_output=True, text=True, check=True)
    assert 1 <= float(done.stdout) <= 1.15


def test_a_stop_string_before_an_unfinished_character_is_found_at_once(
    exact: folo.Params, tokenizer: Any
) -> None:
    torn = tokenizer.convert_tokens_to_ids("ĠâĢ")  # a space, and two of three bytes
    assert tokenizer.decode([torn]) == " \ufffd"
    for stop, most, text in ((" ", 5, ""), ("\ufffd", 1, " ")):
        sampling = folo.SamplingParams(temperature=0, max_tokens=most, stop=[stop], logit_bias={torn: 1e4})
        request = folo.Request([5], sampling, "a")
        output = run(exact, [request], folo.CacheConfig(num_blocks=8), tokenizer=tokenizer)["a"].outputs[0]
        assert (output.text, output.stop_reason, output.token_ids) == (text, stop, [torn])
