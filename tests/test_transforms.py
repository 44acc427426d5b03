"""Logits transforms: they equal their transformers counterparts, compose, and agree with the batched ops."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.generation import logits_process as hf

from folo import sampling
from folo.errors import RequestError
from folo.ops import sampler
from folo.sampling import Context, RowTransform, SamplingParams, chain, transforms_of

VOCABULARIES = [100, 1000, 49152]
INF = math.inf


def random_logits(vocabulary: int, rows: int = 8, seed: int = 0) -> Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * 3


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (sampling.temperature(0.7), hf.TemperatureLogitsWarper(0.7)),
        (sampling.temperature(3.1), hf.TemperatureLogitsWarper(3.1)),
        (sampling.top_k(1), hf.TopKLogitsWarper(1)),
        (sampling.top_k(50), hf.TopKLogitsWarper(50)),
        (sampling.min_p(0.03), hf.MinPLogitsWarper(0.03)),
        (sampling.min_p(0.5), hf.MinPLogitsWarper(0.5)),
    ],
    ids=["temperature-0.7", "temperature-3.1", "top_k-1", "top_k-50", "min_p-0.03", "min_p-0.5"],
)
def test_equals_transformers(ours: RowTransform, theirs: Callable[..., Any], vocabulary: int) -> None:
    logits = random_logits(vocabulary)
    expected = theirs(None, logits.clone())
    assert not torch.equal(expected, logits)
    assert torch.equal(torch.stack([ours(row) for row in logits]), expected)


def test_ties_with_the_last_of_top_k_are_kept_as_in_transformers() -> None:
    logits = random_logits(1000).round()
    assert torch.equal(sampling.top_k(5)(logits), hf.TopKLogitsWarper(5)(None, logits.clone()))  # type: ignore[arg-type]
    assert int(torch.isfinite(sampling.top_k(5)(logits)).sum(-1).amax()) > 5


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9, 0.99])
def test_top_p_equals_transformers_away_from_rounding(p: float, vocabulary: int) -> None:
    """Rows are left out in which float32 sums could tip the last token in or out."""
    logits = random_logits(vocabulary, rows=24, seed=int(p * 100)) * 2
    reached = torch.softmax(logits.double(), -1).sort(descending=True).values.cumsum(-1)
    clear = (reached - p).abs().amin(-1) > 1e-6
    assert int(clear.sum()) >= 12
    expected = hf.TopPLogitsWarper(p)(None, logits[clear])  # type: ignore[arg-type]
    assert bool(torch.isneginf(expected).any())
    assert torch.equal(sampling.top_p(p)(logits[clear]), expected)


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("penalty", [0.8, 1.3])
def test_repetition_penalty_equals_transformers(penalty: float, vocabulary: int) -> None:
    logits = random_logits(vocabulary, rows=1)
    ids = torch.randint(vocabulary, (40,), generator=torch.Generator().manual_seed(1))
    expected = hf.RepetitionPenaltyLogitsProcessor(penalty)(ids[None], logits.clone())  # type: ignore[arg-type]
    context = Context(prompt_ids=ids[:30].tolist(), output_ids=ids[30:].tolist())
    assert not torch.equal(expected, logits)
    assert torch.equal(sampling.repetition_penalty(penalty)(logits[0], context), expected[0])


def test_output_penalties_and_bias_by_hand() -> None:
    context = Context(prompt_ids=(0, 1), output_ids=(1, 2, 2))
    logits = torch.ones(4)
    assert sampling.presence_penalty(0.5)(logits, context).tolist() == [1.0, 0.5, 0.5, 1.0]
    assert sampling.frequency_penalty(0.5)(logits, context).tolist() == [1.0, 0.5, 0.0, 1.0]
    assert sampling.logit_bias({0: 2.0, 3: -INF})(logits).tolist() == [3.0, 1.0, 1.0, -INF]
    assert logits.tolist() == [1.0] * 4


def test_penalties_without_a_context_do_nothing() -> None:
    logits = random_logits(17)
    for transform in (
        sampling.repetition_penalty(2.0),
        sampling.presence_penalty(1.0),
        sampling.frequency_penalty(1.0),
    ):
        assert torch.equal(transform(logits), logits)


def test_rows_of_one_context_are_transformed_like_each_alone() -> None:
    logits = random_logits(1000)
    context = Context(prompt_ids=(1, 2, 3), output_ids=(3, 4))
    everything = transforms_of(ALL_ON)
    together = everything(logits.reshape(2, 4, 1000), context)
    assert torch.equal(together.reshape(8, 1000), torch.stack([everything(row, context) for row in logits]))


def test_a_chain_applies_from_left_to_right_and_is_a_transform() -> None:
    row = random_logits(1000)[0]
    context = Context(output_ids=(5,))
    parts = sampling.temperature(0.7), sampling.top_k(50), sampling.top_p(0.95)
    step = row
    for part in parts:
        step = part(step)
    assert torch.equal(chain(*parts)(row), step)
    assert torch.equal(chain(parts[0], chain(*parts[1:]))(row), step)
    assert torch.equal(chain()(row), row)
    assert torch.equal(chain(lambda logits, ctx: logits + ctx.output_ids[0])(row, context), row + 5)
    double, shift = (lambda logits, _: logits * 2), (lambda logits, _: logits + 1)
    assert chain(double, shift)(torch.zeros(1)).item() == 1
    assert chain(shift, double)(torch.zeros(1)).item() == 2


ALL_ON = SamplingParams(
    temperature=0.8,
    top_k=40,
    top_p=0.9,
    min_p=0.01,
    repetition_penalty=1.2,
    presence_penalty=0.3,
    frequency_penalty=-0.2,
    logit_bias={3: 1.5, 7: -INF},
)
PARAMS = [
    ALL_ON,
    SamplingParams(),
    SamplingParams(temperature=0),
    SamplingParams(temperature=0.6, top_p=0.95),
    SamplingParams(temperature=0, top_k=3, logit_bias={0: 4.0}),
    SamplingParams(frequency_penalty=1.1, min_p=0.1),
]


@pytest.mark.parametrize("vocabulary", [17, 1000, 50001])
def test_the_chain_of_each_row_is_what_the_batched_ops_compute(vocabulary: int) -> None:
    """The engine runs one batch of rows with different params; transforms_of is what each row must get."""
    logits = random_logits(vocabulary, rows=len(PARAMS))
    contexts = [
        Context(prompt_ids=[1, 2, 3 + r], output_ids=[5, r, 5, 16], position=7) for r in range(len(PARAMS))
    ]
    expected = [
        transforms_of(params)(row, context)
        for params, row, context in zip(PARAMS, logits, contexts, strict=True)
    ]

    def column(name: str) -> Tensor:
        values = [getattr(params, name) for params in PARAMS]
        return torch.tensor(values, dtype=torch.int64 if name == "top_k" else torch.float32)

    bias = [(r, *pair) for r, params in enumerate(PARAMS) for pair in dict(params.logit_bias or ()).items()]
    rows, ids, values = zip(*bias, strict=True)
    penalized = sampler.penalize(
        logits,
        torch.tensor([token for c in contexts for token in (*c.prompt_ids, *c.output_ids)]),
        torch.arange(len(PARAMS) + 1) * 7,
        torch.full((len(PARAMS),), 3),
        column("repetition_penalty"),
        column("presence_penalty"),
        column("frequency_penalty"),
        torch.tensor(rows),
        torch.tensor(ids),
        torch.tensor(values),
    )
    batched = sampler.warp(
        penalized, column("temperature"), column("min_p"), column("top_k"), column("top_p")
    )
    assert torch.equal(batched, torch.stack(expected))
    assert torch.equal(batched[1], logits[1])


def test_the_callers_transforms_come_last_and_see_the_context() -> None:
    seen: list[tuple[Tensor, Context]] = []

    def spy(logits: Tensor, context: Context) -> Tensor:
        seen.append((logits, context))
        return logits + 1

    row, context = random_logits(17)[0], Context((1,), (2,), position=1, sample_index=4)
    got = transforms_of(SamplingParams(top_k=3, logits_processors=[spy]))(row, context)
    assert torch.equal(seen[0][0], sampling.top_k(3)(row))
    assert seen[0][1] is context
    assert torch.equal(got, sampling.top_k(3)(row) + 1)


@pytest.mark.parametrize(
    ("make", "value"),
    [
        (sampling.temperature, 0),
        (sampling.temperature, -1.0),
        (sampling.top_p, 0.0),
        (sampling.top_p, 1.5),
        (sampling.top_k, -2),
        (sampling.top_k, 1.5),
        (sampling.min_p, -0.1),
        (sampling.repetition_penalty, 0.0),
        (sampling.presence_penalty, 3.0),
        (sampling.frequency_penalty, math.nan),
        (sampling.logit_bias, {0: INF}),
    ],
)
def test_each_transform_checks_its_argument(make: Callable[[Any], RowTransform], value: Any) -> None:
    with pytest.raises(RequestError, match=r"must be .*got"):
        make(value)
