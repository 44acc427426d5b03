"""Covering arrays of strength two: few rows that together hold every allowed pair of levels.

Most faults that a combination of settings brings out need no more than two of them, and all pairs fit into
about as many rows as the two largest factors have combinations. Greedy, a row at a time, after AETG (Cohen,
Dalal, Fredman & Patton 1997, "The AETG system").
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import combinations_with_replacement
from typing import TypeVar

Level = TypeVar("Level")
Choice = tuple[int, int]  # a factor and one of its levels, by number
Pair = tuple[Choice, Choice]  # in order; a choice with itself stands for that choice alone

_CANDIDATES = 50  # rows tried for each one that is kept


def pairwise(
    factors: Mapping[str, Sequence[Level]],
    excluded: Iterable[tuple[tuple[str, Level], tuple[str, Level]]] = (),
) -> list[dict[str, Level]]:
    """Rows, with a level of every factor each, that cover all pairs of levels of different factors.

    excluded: pairs of (factor, level) that no row may hold; a pair that no row could hold without one of
    them is left out too. The same arguments give the same rows, of which the first cover the most.
    """
    names, groups = list(factors), [[(f, n) for n in range(len(v))] for f, v in enumerate(factors.values())]
    numbers = {name: f for f, name in enumerate(names)}
    banned = {
        _pair(*((numbers[name], list(factors[name]).index(level)) for name, level in pair))
        for pair in excluded
    }
    pairs = combinations_with_replacement([choice for group in groups for choice in group], 2)
    # A dict for a set: in order, so that nothing depends on hashes.
    wanted = dict.fromkeys(
        pair
        for pair in pairs
        if (pair[0] == pair[1] or pair[0][0] != pair[1][0]) and _row(pair, groups, banned)
    )
    chance, rows = random.Random(0), []
    while wanted:
        best: list[Choice] = []
        for _ in range(_CANDIDATES):
            around = chance.choice(list(wanted))
            shuffled = [chance.sample(group, len(group)) for group in chance.sample(groups, len(groups))]
            row = _row(around, shuffled, banned, wanted)
            best = max(best, row, key=lambda row: len(_pairs(row) & wanted.keys()))
        for pair in _pairs(best):
            wanted.pop(pair, None)
        rows.append({names[f]: factors[names[f]][n] for f, n in sorted(best)})
    return rows


def _pair(a: Choice, b: Choice) -> Pair:
    return (a, b) if a <= b else (b, a)


def _pairs(row: Iterable[Choice]) -> set[Pair]:
    return set(combinations_with_replacement(sorted(row), 2))


def _row(
    around: Pair,
    groups: Sequence[Sequence[Choice]],
    banned: Collection[Pair],
    wanted: Collection[Pair] = (),
) -> list[Choice]:
    """A row that holds this pair, completed group by group by what covers the most; [] if no row may."""
    start, taken = list(dict.fromkeys(around)), {factor for factor, _ in around}
    rest = [group for group in groups if group[0][0] not in taken]
    return [] if around in banned else _completed(start, rest, banned, wanted)


def _completed(
    row: list[Choice],
    rest: Sequence[Sequence[Choice]],
    banned: Collection[Pair],
    wanted: Collection[Pair],
) -> list[Choice]:
    if not rest:
        return row
    allowed = [c for c in rest[0] if not any(_pair(c, other) in banned for other in row)]
    for choice in sorted(allowed, key=lambda c: -sum(_pair(c, other) in wanted for other in row)):
        if found := _completed([*row, choice], rest[1:], banned, wanted):
            return found
    return []
