"""Pairwise arrays: all pairs that may be, none that may not, the same ones each time, in few rows."""

from __future__ import annotations

from itertools import combinations, product
from math import prod
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from folo.bench.pairwise import pairwise

pytestmark = pytest.mark.no_cover

Factors = dict[str, list[int]]
Choice = tuple[str, int]
Excluded = list[tuple[Choice, Choice]]


@st.composite
def problems(draw: st.DrawFn) -> tuple[Factors, Excluded]:
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    factors = {f"factor {n}": list(range(size)) for n, size in enumerate(sizes)}
    choices = [(name, level) for name, levels in factors.items() for level in levels]
    pairs = [(a, b) for a, b in product(choices, repeat=2) if a[0] != b[0]]
    return factors, draw(st.lists(st.sampled_from(pairs), max_size=6)) if pairs else []


def pairs_of(row: dict[str, Any]) -> set[frozenset[tuple[str, Any]]]:
    return {frozenset(pair) for pair in combinations(row.items(), 2)}


def allowed(factors: Factors, excluded: Excluded) -> list[dict[str, int]]:
    """All rows without an excluded pair."""
    rows = [dict(zip(factors, levels, strict=True)) for levels in product(*factors.values())]
    banned = {frozenset(pair) for pair in excluded}
    return [row for row in rows if not pairs_of(row) & banned]


@given(problems())
def test_rows_hold_all_pairs_that_may_be_and_no_other(problem: tuple[Factors, Excluded]) -> None:
    factors, excluded = problem
    possible = allowed(factors, excluded)
    rows = pairwise(factors, excluded)
    assert all(row in possible for row in rows)
    covered = set().union(*map(pairs_of, rows))
    assert covered == set().union(*map(pairs_of, possible))
    choices = {choice for row in rows for choice in row.items()}
    assert choices == {choice for row in possible for choice in row.items()}


@given(problems())
def test_equal_arguments_give_equal_rows(problem: tuple[Factors, Excluded]) -> None:
    assert pairwise(*problem) == pairwise(*problem)


@given(problems())
def test_no_row_is_there_for_nothing(problem: tuple[Factors, Excluded]) -> None:
    seen: set[Any] = set()
    for row in pairwise(*problem):
        new = pairs_of(row) | {frozenset([choice]) for choice in row.items()}
        assert not new <= seen
        seen |= new


@pytest.mark.parametrize(
    ("sizes", "most"),
    [((4,), 4), ((3, 4), 12), ((2,) * 7, 8), ((3,) * 4, 13), ((4, 3, 4, 3, 2, 2, 3, 2), 19), ((4,) * 6, 28)],
)
def test_rows_are_few(sizes: tuple[int, ...], most: int) -> None:
    factors = {str(n): range(size) for n, size in enumerate(sizes)}
    least = prod(sorted(sizes)[-2:])
    assert least <= len(pairwise(factors)) <= most


def test_the_first_rows_cover_the_most() -> None:
    rows = pairwise({str(n): "abc" for n in range(5)})
    first = set().union(*map(pairs_of, rows[: len(rows) // 2]))
    assert len(first) > 0.6 * 9 * 10
