"""The sampler's kernels, interpreted: equal to the reference, and a row of them depends on that row alone."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensors import random, same_bits
from torch import Tensor

from folo.ops import sampler as reference
from folo.ops.cuda import sampler, warp

pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero) encountered")

INF = math.inf
LAST_U = 1 - 2.0**-24
VOCABULARIES = (17, 1000, 4096, 9000)
"""Of one block and of three; rows that begin at a multiple of 16 and that do not."""


@pytest.fixture(params=[(4096, 1024), (300, 100), (4, 3)], ids=["listed", "some listed", "few listed"])
def room(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """How many of the likeliest tokens are listed: most searches end in the list, or have to walk the row."""
    monkeypatch.setattr(warp, "_LISTED", request.param[0])
    monkeypatch.setattr(warp, "_LANES", request.param[1])


def random_logits(vocabulary: int, rows: int = 12) -> Tensor:
    """Rounded to 1/4 in every third row, so that there are ties, and with some tokens banned."""
    logits = random(rows, vocabulary, seed=vocabulary) * 4
    logits[::3] = (logits[::3] * 4).round() / 4
    logits[random(rows, vocabulary, seed=1) > 2] = -INF
    logits[:, 3] = 1.0
    logits[:, 5] = -0.0
    return logits


def columns(rows: int, vocabulary: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Temperature, min-p, top-k and top-p that differ by row, some of them off."""
    index = torch.arange(rows)
    return (
        torch.tensor([0.0, 0.7, 1.0, 1.3])[index % 4],
        torch.tensor([0.0, 0.0, 0.05])[index % 3],
        torch.tensor([0, 5, -1, 40, vocabulary + 1])[index % 5],
        torch.tensor([1.0, 0.9, 0.5, 0.999, 1e-6])[index % 5 - index % 2],
    )


def warp_of(row: list[float], min_p: float = 0.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    ones = torch.ones(1)
    return warp.warp(torch.tensor([row]), ones, ones * min_p, torch.tensor([top_k]), ones * top_p)[0]


def drawn(row: list[float], *u: float, greedy: bool = False) -> list[int]:
    logits = torch.tensor([row] * len(u))
    return sampler.draw(logits, torch.full((len(u),), greedy), torch.tensor(u)).tolist()


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_warp_keeps_what_the_reference_keeps(vocabulary: int, room: None) -> None:
    logits, (temperature, min_p, top_k, top_p) = random_logits(vocabulary), columns(12, vocabulary)
    got = warp.warp(logits, temperature, min_p, top_k, top_p)
    assert same_bits(got, reference.warp(logits, temperature, min_p, top_k, top_p))


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_warp_without_truncation_is_the_references(vocabulary: int) -> None:
    logits, (temperature, min_p, top_k, top_p) = random_logits(vocabulary), columns(12, vocabulary)
    got = warp.warp(logits, temperature, min_p, top_k, top_p, False)
    assert same_bits(got, reference.warp(logits, temperature, min_p, top_k, top_p, False))


@pytest.mark.parametrize("vocabulary", [17, 9000])
def test_rows_depend_on_themselves_alone(vocabulary: int, room: None) -> None:
    logits, (temperature, min_p, top_k, top_p) = random_logits(vocabulary), columns(12, vocabulary)
    u, greedy = torch.rand(12, generator=torch.Generator().manual_seed(2)), torch.arange(12) % 4 == 0
    warped = warp.warp(logits, temperature, min_p, top_k, top_p)
    ids, logprobs = sampler.draw(logits, greedy, u), sampler.log_softmax(logits)
    for rows in ([0], [11], [4, 4, 7], [11, 2, 0, 5, 8]):
        got = warp.warp(logits[rows], temperature[rows], min_p[rows], top_k[rows], top_p[rows])
        assert same_bits(got, warped[rows])
        assert torch.equal(sampler.draw(logits[rows], greedy[rows], u[rows]), ids[rows])
        assert same_bits(sampler.log_softmax(logits[rows]), logprobs[rows])


LOGITS = st.one_of(st.integers(-8, 8).map(lambda n: n / 2), st.sampled_from([-INF, -0.0, 1e-40, -90.0, 3e38]))


@settings(deadline=None, max_examples=60)
@given(
    row=st.lists(LOGITS, min_size=1, max_size=40),
    temperature=st.sampled_from([0.0, 0.5, 1.0, 2.5]),
    min_p=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    top_k=st.integers(-1, 41),
    top_p=st.sampled_from([1e-6, 0.1, 0.5, 0.9, 1.0]),
    lanes=st.sampled_from([1, 3, 1024]),
)
def test_warp_of_any_row_is_the_references(
    row: list[float], temperature: float, min_p: float, top_k: int, top_p: float, lanes: int
) -> None:
    logits, one = torch.tensor([row]), torch.ones(1)
    parameters = one * temperature, one * min_p, torch.tensor([top_k]), one * top_p
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(warp, "_LANES", lanes)
        got, expected = warp.warp(logits, *parameters, True), reference.warp(logits, *parameters, True)
    usable = bool(torch.isfinite(expected.amax()))
    assert usable == bool(torch.isfinite(got.amax()))
    assert not usable or same_bits(got, expected)


@pytest.mark.parametrize(("top_k", "kept"), [(1, [1, 3]), (2, [1, 3]), (3, [1, 2, 3, 4]), (6, None)])
def test_top_k_keeps_ties(top_k: int, kept: list[int] | None, room: None) -> None:
    row = [0.0, 3.0, 1.0, 3.0, 1.0, -INF]
    got = warp_of(row, top_k=top_k)
    expected = row if kept is None else [x if n in kept else -INF for n, x in enumerate(row)]
    assert got.tolist() == expected


@pytest.mark.parametrize(("top_p", "kept"), [(0.1, 1), (0.25, 1), (0.26, 2), (0.5, 2), (0.75, 3), (0.8, 4)])
def test_top_p_takes_ties_in_the_order_of_their_ids(top_p: float, kept: int, room: None) -> None:
    """Four tokens of probability 1/4; the banned one between them has none."""
    row = [0.0, -INF, 0.0, 0.0, 0.0]
    order = [0, 2, 3, 4][:kept]
    assert warp_of(row, top_p=top_p).tolist() == [x if n in order else -INF for n, x in enumerate(row)]


def test_top_p_in_a_row_of_ties_longer_than_the_list(room: None) -> None:
    got = warp_of([2.5] * 9000, top_p=0.5)
    assert torch.equal(got > -INF, torch.arange(9000) < 4500)


def test_top_p_counts_what_top_k_and_min_p_left(room: None) -> None:
    row = [math.log(8), math.log(4), math.log(2), 0.0, 0.0]
    assert (warp_of(row, top_k=2, top_p=0.7) > -INF).tolist() == [True, True, False, False, False]
    assert (warp_of(row, top_k=2, top_p=0.66) > -INF).tolist() == [True, False, False, False, False]
    assert (warp_of(row, min_p=0.2, top_p=0.9) > -INF).tolist() == [True, True, True, False, False]


@pytest.mark.parametrize("row", [[1.0, 0.0, math.nan], [math.nan] * 3, [0.0, INF, 1.0], [-INF] * 3])
@pytest.mark.parametrize("greedy", [True, False])
def test_a_row_that_cannot_be_drawn_from_says_so(row: list[float], greedy: bool) -> None:
    assert drawn(row, 0.5, greedy=greedy) == [reference.NO_TOKEN]
    for min_p, top_k, top_p in ((0.0, 0, 1.0), (0.5, 0, 1.0), (0.0, 1, 0.5), (0.0, 2, 1.0)):
        assert drawn(warp_of(row, min_p, top_k, top_p).tolist(), 0.5) == [reference.NO_TOKEN]


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_draws_are_the_references(vocabulary: int) -> None:
    """Logits are 0 or banned, whose weights every exp gives exactly."""
    logits = random_logits(vocabulary)
    logits = torch.where(logits > 0, 0.0, -INF)
    for u in (0.0, 0.3, 0.5, LAST_U):
        for greedy in (False, True):
            arguments = logits, torch.full((12,), greedy), torch.full((12,), u)
            assert torch.equal(sampler.draw(*arguments), reference.draw(*arguments)), u


def test_draw_inverts_the_cumulative_distribution() -> None:
    """Probabilities 1/4, 1/4, 1/2: an id's interval is closed below and open above."""
    row = [0.0, 0.0, math.log(2)]
    u = 0.0, 0.25 - 2**-24, 0.25, 0.5 - 2**-24, 0.5, LAST_U
    assert drawn(row, *u) == [0, 0, 1, 1, 2, 2]


def test_greedy_takes_the_smallest_id_of_the_largest_logit() -> None:
    assert drawn([0.0, 2.0, 2.0, -INF], 0.0, 0.99, greedy=True) == [1, 1]
    assert drawn([-1.0, -0.0, 0.0], 0.0, greedy=True) == [1]


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_logprobs_and_ranks(vocabulary: int) -> None:
    logits, ids = random_logits(vocabulary), torch.arange(12)
    logprobs = sampler.log_softmax(logits)
    torch.testing.assert_close(logprobs, torch.log_softmax(logits.double(), -1).float(), rtol=1e-6, atol=2e-6)
    logprob, rank, top_ids, top_logprobs = sampler.pick_logprobs(logits, ids, 7)
    _, expected_rank, expected_ids, _ = reference.pick_logprobs(logits, ids, 7)
    assert torch.equal(rank, expected_rank)
    assert torch.equal(top_ids, expected_ids)
    assert same_bits(logprob, logprobs[torch.arange(12), ids])
    assert same_bits(top_logprobs, logprobs.gather(-1, top_ids))


def test_philox_is_the_references() -> None:
    generator = torch.Generator().manual_seed(0)
    seed, position, sample_index = torch.randint(-(2**63), 2**63 - 1, (3, 300), generator=generator)
    position[:5] = torch.arange(5)
    for purpose in (0, 7):
        got = sampler.philox(seed, position, sample_index, purpose)
        assert same_bits(got, reference.philox(seed, position, sample_index, purpose))


def test_no_rows_give_no_rows() -> None:
    logits, none = torch.zeros(0, 40), torch.zeros(0)
    assert warp.warp(logits, none, none, none.long(), none).shape == (0, 40)
    assert sampler.draw(logits, none.bool(), none).shape == (0,)
    assert sampler.log_softmax(logits).shape == (0, 40)
    assert sampler.philox(none.long(), none.long(), none.long(), 0).shape == (0,)
