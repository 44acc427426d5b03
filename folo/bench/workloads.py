"""What the benchmarks run: real prompts, requests of fixed lengths, and a model of next to nothing.

Everything follows from its arguments: the same call gives the same work.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from folo.model.config import DecoderConfig, RopeConfig
from folo.model.load import assemble
from folo.model.params import Layer, Linear, Params
from folo.ops.quantized import Grouped
from folo.request import Request
from folo.sampling import SamplingParams

_FIRST_ID = 3  # random token ids stay clear of the special ones

_STORY = (
    "The lighthouse keeper counted the ships that passed each evening and wrote their names in a ledger. "
    "On calm days he could read the painted letters with his glass; in fog he listened for the bells. "
)
_REPORT = (
    "Revenue in the third quarter rose by 4 % to 1.2 million, while costs fell slightly. The new site in "
    "Porto opened in August, two weeks ahead of plan, and now employs forty people. "
)
_CODE = """def merge(left, right):
    result = []
    while left and right:
        result.append(left.pop(0) if left[0] <= right[0] else right.pop(0))
    return result + left + right

"""

TEXTS = (
    "Once upon a time",
    "What is gravity?",
    "def fibonacci(n):\n    ",
    "The capital of France is Paris, and the capital of Germany is",
    "Q: What is 17 times 23?\nA: Let us work step by step.",
    "SELECT name, COUNT(*) FROM orders WHERE",
    "Translate to Spanish: Good morning, how are you?\nTranslation:",
    "Write a haiku about the sea in winter, then explain in one sentence what it means.",
    '{"user": {"id": 17, "tags": ["a", "b"], "email":',
    _STORY + "One night,",
    _STORY * 3 + "In the end,",
    f"Summarise in one sentence: {_REPORT}\nSummary:",
    f"{_REPORT * 3}\nThe three main points are:\n1.",
    _CODE + "# The same in C++, with iterators:\n",
    _CODE * 2 + "# A test for it:\n",
    _STORY * 2 + _REPORT * 2 + "In other news,",
)
"""Sixteen prompts: English and code, 4 to 170 tokens in SmolLM2's vocabulary."""


def encoded(tokenizer: Any, count: int, longest: int) -> list[list[int]]:
    """Token ids of the first `count` texts (over again if there are more), cut to `longest` each."""
    return [tokenizer(TEXTS[n % len(TEXTS)])["input_ids"][:longest] for n in range(count)]


def random_ids(length: int, vocab_size: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(_FIRST_ID, vocab_size), k=length)


def request(id: str, prompt: Sequence[int], num_output: int) -> Request:
    """Greedy, and of exactly `num_output` tokens, so that every arm of a comparison does the same work."""
    return Request(prompt, SamplingParams(temperature=0, max_tokens=num_output, ignore_eos=True), id)


def mixed(count: int, vocab_size: int, seed: int = 0) -> list[Request]:
    """Requests that share nothing: 16 to 512 tokens in, 16 to 256 out, uniformly."""
    lengths = random.Random(seed)
    pairs = [(lengths.randint(16, 512), lengths.randint(16, 256)) for _ in range(count)]
    return [
        request(str(n), random_ids(size, vocab_size, seed + n), num_output)
        for n, (size, num_output) in enumerate(pairs)
    ]


class Arrival(NamedTuple):
    """A request, and after how many steps it comes in."""

    step: int
    request: Request


def at_once(requests: Iterable[Request]) -> list[Arrival]:
    return [Arrival(0, request) for request in requests]


def pressure(count: int, longest: int, vocab_size: int, seed: int = 0) -> list[Arrival]:
    """Everything that keeps a scheduler busy, for a pool of about three sequences of `longest` tokens.

    In turn: two questions about one document (they share a prefix), a short chat turn, a long prompt.
    Three come in at once, one more every four steps.
    """
    chance = random.Random(seed)
    arrivals: list[Arrival] = []
    for n in range(count):
        document = random_ids(longest // 4, vocab_size, seed=n // 8)
        own = random_ids(longest, vocab_size, seed=1000 + seed + n)
        name, prompt = (
            ("question", document + own[: chance.randint(4, 16)]),
            ("question", document + own[: chance.randint(4, 16)]),
            ("chat", own[: chance.randint(8, 24)]),
            ("long", own[: longest // 2 + chance.randint(0, longest // 8)]),
        )[n % 4]
        num_output = chance.randint(longest // 8, longest // 3)
        arrivals.append(Arrival(4 * max(0, n - 2), request(f"{name} {n}", prompt, num_output)))
    return arrivals


def miniature(num_positions: int = 1024, vocab_size: int = 64) -> Params:
    """A decoder of one narrow layer, all zeros: for what does not depend on weights, such as accounting."""
    config = DecoderConfig(
        architecture="LlamaForCausalLM",
        vocab_size=vocab_size,
        hidden_size=2,
        intermediate_size=2,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=2,
        max_position_embeddings=num_positions,
        rms_norm_eps=1e-5,
        rope=RopeConfig(),
        qkv_bias=False,
        o_bias=False,
        mlp_bias=False,
        qk_norm=False,
        tie_word_embeddings=True,
        dtype=torch.float32,
    )
    norm, square = torch.zeros(2), Linear(torch.zeros(2, 2))
    layer = Layer(
        input_norm=norm,
        qkv=Linear(torch.zeros(6, 2)),
        q_norm=None,
        k_norm=None,
        out=square,
        post_norm=norm,
        gate_up=Linear(torch.zeros(4, 2)),
        down=square,
    )
    return Params(embed=torch.zeros(vocab_size, 2), layers=(layer,), norm=norm, lm_head=None, config=config)


QWEN3_600M = DecoderConfig(
    architecture="Qwen3ForCausalLM",
    vocab_size=151_936,
    hidden_size=1024,
    intermediate_size=3072,
    num_layers=28,
    num_heads=16,
    num_kv_heads=8,
    head_dim=128,
    max_position_embeddings=40_960,
    rms_norm_eps=1e-6,
    rope=RopeConfig(theta=1e6),
    qkv_bias=False,
    o_bias=False,
    mlp_bias=False,
    qk_norm=True,
    tie_word_embeddings=True,
    dtype=torch.bfloat16,
)


class _RandomWeights:
    """A checkpoint of normally distributed weights; with `bits`, random codes for the layers. Norms are 1."""

    def __init__(self, seed: int, device: torch.device, bits: int | None) -> None:
        self._numbers = torch.Generator(device).manual_seed(seed)
        self._bits = bits

    def read(self, name: str, out: Tensor) -> None:
        if out.ndim == 1:
            out.fill_(1)
        else:
            out.normal_(0, out.shape[1] ** -0.5, generator=self._numbers)

    def quantized(self, module: str, shape: tuple[int, ...]) -> Grouped | None:
        if self._bits is None or module == "lm_head":
            return None
        return random_grouped(shape[0], shape[1], self._bits, self._numbers)


def random_grouped(n: int, k: int, bits: int, numbers: torch.Generator) -> Grouped:
    """A weight `[N, K]` of random codes in groups of 128, as large as the normal ones of `random_model`."""
    device = numbers.device
    groups = torch.arange(k, device=device) // 128
    codes = torch.randint(2**bits, (n, k), generator=numbers, dtype=torch.uint8, device=device)
    size = 12**0.5 / 2**bits * k**-0.5
    scales = torch.full((-(-k // 128), n), size, dtype=torch.float16, device=device)
    zeros = torch.full(scales.shape, 2 ** (bits - 1), dtype=torch.uint8, device=device)
    return Grouped(codes, scales, zeros, groups, bits, 128)


def random_model(
    config: DecoderConfig, seed: int = 0, bits: int | None = None, device: torch.device | str = "cpu"
) -> Params:
    """A decoder of random weights, packed where the kernels have a layout; with `bits`, of quantised layers.

    For measuring what it costs: its outputs mean nothing.
    """
    device = torch.device(device)
    weights = _RandomWeights(seed, device, bits)
    return assemble(weights, config, device, pack=True, use_tqdm=False)
