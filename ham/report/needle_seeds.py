"""Needles by seed: a model has learned to look a needle up or it has not.

The mean of such seeds is a number that no seed has, so they are counted instead.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from ham.report.aggregate import Results

HALF = 0.5
FEW = 0.2
"""A seed that finds less than this finds next to none."""


@dataclass(frozen=True)
class Seeds:
    """Of how many seeds how many find more than half at the shortest length."""

    found: int
    whole: int

    @property
    def words(self) -> str:
        """`1 of 3`."""
        return f"{self.found} of {self.whole}"


def seeds_that_find(results: Results, model: str) -> Seeds:
    """Seeds that find more than half of the needles in the easiest task, at the shortest length."""
    best = best_by_seed(results, model)
    return Seeds(sum(value > HALF for value in best.values()), len(best))


def bimodal(results: Results) -> list[str]:
    """Models of which some seeds find more than half and others next to none."""
    found = []
    for model in results.reported_models:
        values = best_by_seed(results, model).values()
        if any(value > HALF for value in values) and any(value < FEW for value in values):
            found.append(model)
    return found


def best_by_seed(results: Results, model: str) -> dict[int | None, float]:
    """Share of needles that each seed finds at the shortest length, in its best task."""
    shortest = min(results.x_values("needle", "accuracy"), default=None)
    best: dict[int | None, float] = defaultdict(float)
    if shortest is None:
        return best
    for task in results.tasks("needle", "accuracy"):
        cell = results.pooled_cell("needle", "accuracy", model=model, task=task, x=shortest)
        for seed, value in cell.by_seed:
            best[seed] = max(best[seed], value)
    return best
