"""Temperature, min-p, top-k and top-p: which tokens are kept, by the definition and by a full sort."""

import math
from collections.abc import Callable

import pytest
import torch
from logits import generator, random_logits, warp_of
from torch import Tensor

from folo.ops import draw, sampler, warp
from folo.ops.sampler import NO_TOKEN

pytestmark = pytest.mark.usefixtures("each_instruction_set")


INF = math.inf


def bits(x: Tensor) -> Tensor:
    return x.view(torch.int32)


def warp_in_python(row: list[float], min_p: float, top_k: int, top_p: float) -> set[int]:
    """The ids that are kept, by the definition, in float64."""
    order = sorted(range(len(row)), key=lambda i: (-row[i], i))
    weight = [math.exp(value - max(row)) for value in row]
    order = [i for i in order if weight[i] >= min_p]
    if 0 < top_k < len(order):
        order = [i for i in order if row[i] >= row[order[top_k - 1]]]
    total, reached, kept = sum(weight[i] for i in order), 0.0, set()
    for i in order:
        kept.add(i)
        reached += weight[i]
        if top_p < 1 and reached >= top_p * total:
            break
    return kept


@pytest.mark.parametrize("seed", range(40))
def test_warp_keeps_what_the_definition_keeps(seed: int) -> None:
    """Small integers as logits: many ties, and no cumulative weight within rounding of a boundary."""
    row = torch.randint(-4, 5, (23,), generator=generator(seed)).float()
    min_p, top_k, top_p = [(0.1, 4, 0.83), (0.0, 7, 0.61), (0.013, 0, 0.47), (0.0, 0, 0.93)][seed % 4]
    kept = warp_in_python(row.tolist(), min_p, top_k, top_p)
    got = warp_of(row[None], 1.0, min_p, top_k, top_p)[0]
    assert set(torch.isfinite(got).nonzero().flatten().tolist()) == kept
    assert torch.equal(got[sorted(kept)], row[sorted(kept)])


SHAPES: dict[str, Callable[[Tensor], Tensor]] = {
    "flat": lambda x: x,
    "steep": lambda x: 12 * x,
    "peaked": lambda x: torch.where(x > 2.5, 6 * x, x),
    "tied": lambda x: (4 * x).round() / 4,
    "level": torch.zeros_like,
    "mostly banned": lambda x: torch.where(x > 1.5, 2 * x, -INF),
    "two parts": lambda x: torch.where(torch.arange(x.shape[1]) < x.shape[1] // 9, 8 * x, x - 30),
    "all banned": lambda x: torch.full_like(x, -INF),
}


@pytest.mark.parametrize("vocabulary", [1, 255, 5000, 49152, 151936])
@pytest.mark.parametrize("shape", SHAPES)
def test_warp_keeps_what_a_full_sort_keeps(
    shape: str, vocabulary: int, threads: Callable[[int], None]
) -> None:
    """Whether few tokens suffice to tell or all of them are looked at."""
    filters = [
        *[(0.0, k, p) for k in (1, 2, 50, 1000) for p in (1.0, 0.7)],
        *[(0.0, 0, p) for p in (1e-30, 0.3, 0.9, 0.999)],
        *[(min_p, k, p) for min_p in (0.02, 1.0) for k, p in ((0, 1.0), (0, 0.9), (3, 1.0), (50, 0.9))],
    ]
    min_p, top_k, top_p = (torch.tensor(column) for column in zip(*filters, strict=True))
    rows = len(filters)
    logits = SHAPES[shape](torch.randn(1, vocabulary, generator=generator(vocabulary))).repeat(rows, 1)
    temperature = torch.tensor([1.0, 0.7, 0.0, 1.9])[torch.arange(rows) % 4]
    expected = sampler.warp(logits, temperature, min_p, top_k, top_p)
    for count in (1, 2):
        threads(count)
        assert torch.equal(bits(warp(logits, temperature, min_p, top_k, top_p)), bits(expected))


def test_ties_beyond_the_bound_of_what_is_listed_are_kept() -> None:
    """The 50th of 100,000 tokens is one of 3, of 300 and of 30,000 equal ones that lie anywhere."""
    for ties in (3, 300, 30_000):
        row = torch.randn(100_000, generator=generator(ties)).clamp(max=4.0)
        order = torch.randperm(100_000, generator=generator(1))
        row[order[:49]], row[order[49 : 49 + ties]] = 9.0, 5.0
        kept = torch.isfinite(warp_of(row[None], 1.0, top_k=50))[0]
        assert torch.equal(kept, row >= 5.0)


def test_top_k_keeps_ties_and_top_p_breaks_them_by_id() -> None:
    row = torch.tensor([[1.0, 2.0, 1.0, 1.0]])
    assert warp_of(row, top_k=2).tolist() == row.tolist()
    assert warp_of(row, top_k=1).tolist() == [[-INF, 2.0, -INF, -INF]]
    level = torch.zeros(1, 4)
    assert warp_of(level, top_p=0.5).tolist() == [[0.0, 0.0, -INF, -INF]]
    assert warp_of(level, top_p=0.51).tolist() == [[0.0, 0.0, 0.0, -INF]]
    for tiny in (1e-30, 1e-50):  # the second is 0 in float32
        assert warp_of(level, top_p=tiny).tolist() == [[0.0, -INF, -INF, -INF]]


def test_order_is_temperature_min_p_top_k_top_p() -> None:
    """Weights 8:4:2:1; each line would keep another set were the two transforms swapped."""
    row = torch.tensor([[3.0, 2.0, 1.0, 0.0]]) * math.log(2)

    def kept(*arguments: float, top_k: int = 0, top_p: float = 1.0) -> int:
        return int(torch.isfinite(warp_of(row, *arguments, top_k=top_k, top_p=top_p)).sum())

    assert kept(1.0, 0.3) == 2
    assert kept(2.0, 0.3) == 4  # temperature first: weights 1, .71, .5, .35
    assert kept(1.0, 0.3, top_p=0.6) == 1  # min-p first: 8 of 12 reach 0.6; of 15 they do not
    assert kept(1.0, 0.0, top_p=0.6) == 2
    assert kept(1.0, 0.0, top_k=2, top_p=0.6) == 1  # top-k first, likewise


def test_a_transform_that_is_off_leaves_the_bits_alone_whatever_its_neighbours_do() -> None:
    logits = random_logits(1000, rows=6)
    logits[1, 5] = -0.0
    logits[1, 6:8] = torch.tensor([-90.0, -3e38])  # of no weight, but not banned
    temperature = torch.tensor([0.7, 1.0, 0.0, 1.0, 2.0, 1.0])
    min_p = torch.tensor([0.1, 0.0, 0.0, 0.2, 0.0, 0.0])
    top_k = torch.tensor([3, 0, -1, 1, 0, 1000])
    top_p = torch.tensor([0.5, 1.0, 1.0, 0.9, 0.1, 1.0])
    got = warp(logits, temperature, min_p, top_k, top_p)
    for untouched in (1, 2, 5):
        assert torch.equal(bits(got[untouched]), bits(logits[untouched]))
    for changed in (0, 3, 4):
        assert not torch.equal(got[changed], logits[changed])


def test_without_truncation_the_sort_can_be_left_out() -> None:
    logits = random_logits(1000, rows=70)
    assert torch.equal(bits(warp_of(logits, 0.7, 0.05)), bits(warp_of(logits, 0.7, 0.05, truncate=False)))


@pytest.mark.parametrize("row", [[1.0, 0.0, math.nan], [math.nan, 1.0, math.nan], [0.0, INF, 1.0]])
@pytest.mark.parametrize(
    ("min_p", "top_k", "top_p"), [(0.0, 0, 1.0), (0.5, 0, 1.0), (0.0, 1, 0.5), (0.0, 2, 1.0)]
)
def test_warp_does_not_hide_a_broken_row(row: list[float], min_p: float, top_k: int, top_p: float) -> None:
    got = warp_of(torch.tensor([row]), 1.0, min_p, top_k, top_p)
    assert draw(got, torch.tensor([False]), torch.tensor([0.5])).item() == NO_TOKEN


@pytest.mark.parametrize("broken", [math.nan, INF])
@pytest.mark.parametrize("place", [0, 20_000, 49_999])
def test_warp_does_not_hide_one_broken_logit_of_many(broken: float, place: int) -> None:
    row = torch.randn(1, 50_000, generator=generator(9))
    row[0, place] = broken
    for min_p, top_k, top_p in [(0.5, 0, 1.0), (0.0, 50, 1.0), (0.0, 50, 0.5), (0.0, 0, 0.5)]:
        got = warp_of(row, 0.7, min_p, top_k, top_p)
        assert draw(got, torch.tensor([False]), torch.tensor([0.5])).item() == NO_TOKEN
