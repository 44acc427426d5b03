"""The same work done in two ways: without a feature, and as folo does it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from statistics import median

BASELINE, WITH = "baseline", "folo"  # the arms
HEADERS = ("feature", "measure", "baseline", "folo", "ratio", "target", "met")

Samples = dict[str, list[float]]  # by arm: what was measured, before any average
Average = Callable[[Iterable[float]], float]


@dataclass(frozen=True)
class Row:
    """One comparison. ratio: how many times better folo is. met: whether that reaches the target, if any."""

    feature: str
    measure: str
    unit: str
    baseline: float
    folo: float
    ratio: float
    target: str = "-"
    met: bool | None = None

    def cells(self) -> list[str]:
        """The row's cells, in the order of `HEADERS`."""
        met = {None: "-", True: "yes", False: "NO"}[self.met]
        values = [
            (f"{value:,.0f}" if value >= 100 else f"{value:.3g}") + f" {self.unit}".rstrip()
            for value in (self.baseline, self.folo)
        ]
        return [self.feature, self.measure, *values, f"{self.ratio:.2g}x", self.target, met]


def compare(
    feature: str,
    measure: str,
    unit: str,
    samples: Samples,
    average: Average = median,
    *,
    lower: bool = False,
    at_least: float | None = None,
) -> Row:
    """The row of one comparison. lower: less is better. at_least: the target for the ratio."""
    before, after = average(samples[BASELINE]), average(samples[WITH])
    ratio = before / after if lower else after / before
    row = Row(feature, measure, unit, before, after, ratio)
    return row if at_least is None else replace(row, target=f">= {at_least:g}x", met=ratio >= at_least)
