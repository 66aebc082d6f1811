"""Is a difference between two runs more than noise, does it matter, and is it for the better?

Noise, the first of these that both sides allow:

- two or more seeds in common: Student's t interval of the paired differences leaves out 0;
- a 95 % interval on each side (Wilson for counts, bootstrap over documents, t over seeds): the
  interval of the difference leaves out 0, by the square-and-add rule (Newcombe 1998, method 10, for
  shares; Zou and Donner 2008 for others). It takes the sides as independent: runs on the same
  documents differ by less than it allows for;
- percentiles of repeated timings: 80 % of one side lie beyond 80 % of the other;
- no spread on one side: a time or rate cannot be judged; anything else is compared as it is.

A difference also has to exceed a practical threshold, relative to the first run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

from ham.compare.cells import Pair, variant_of
from ham.report.aggregate import Cell, difference, summarise
from ham.report.metrics import better_direction
from ham.report.statistics import Estimate, mean

Verdict = Literal["same", "small", "noise", "unjudged", "better", "worse", "changed"]
COUNTED: tuple[Verdict, ...] = ("worse", "changed", "better")
PERCENTILES = "p20_p80"

TIMED_ENDS = ("_ms", "_seconds", "_per_second", "_per_s")


class Noise(NamedTuple):
    """How noise was judged: whether the difference is beyond it (None: unknown), and by what."""

    beyond: bool | None
    rule: str
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Difference:
    """One key that both runs have a value for.

    Attributes:
        pair: The rows.
        one, other: Both sides over their seeds.
        relative: Change in units of the first side's size; infinite where that is 0.
        notes: What else differs between the rows: provider, routed share, failed seeds.
    """

    pair: Pair
    one: Cell
    other: Cell
    change: float
    relative: float
    noise: Noise
    verdict: Verdict
    notes: tuple[str, ...] = ()


def judge(pair: Pair, threshold: float) -> Difference | None:
    """Compare both sides of a key; None where one has no value.

    Args:
        pair: Its rows.
        threshold: Relative change that matters.
    """
    one, other = summarise(pair.one), summarise(pair.other)
    if one.value is None or other.value is None:
        return None
    shared = difference(other, one)
    paired = shared.estimate if shared.estimate is not None and shared.estimate.n > 1 else None
    change = other.value - one.value if paired is None else paired.value
    seeds = [seed for seed, _ in shared.by_seed] if paired is not None else None
    base = abs(mean([value for seed, value in one.by_seed if seeds is None or seed in seeds]))
    relative = change / base if base else math.copysign(math.inf, change) if change else 0.0
    noise = paired_noise(paired) if paired is not None else unpaired_noise(one, other)
    verdict = _verdict(pair.key.metric, change, relative, noise, threshold)
    return Difference(pair, one, other, change, relative, noise, verdict, _notes(pair, threshold))


def paired_noise(estimate: Estimate) -> Noise:
    """By the t interval of paired differences."""
    beyond = estimate.low > 0 or estimate.high < 0
    return Noise(beyond, f"paired t, {estimate.n} seeds", estimate.low, estimate.high)


def unpaired_noise(one: Cell, other: Cell) -> Noise:
    """By the intervals that the sides have of their own."""
    left, right = one.estimate, other.estimate
    if left.low is None or right.low is None:
        return Noise(None, "no spread")
    if PERCENTILES in (left.interval, right.interval):
        return Noise(right.low > left.high or right.high < left.low, "20th to 80th percentiles")
    low, high = independent_difference(left, right)
    names = dict.fromkeys((left.interval, right.interval))
    return Noise(low > 0 or high < 0, " and ".join(names), low, high)


def independent_difference(one: Estimate, other: Estimate) -> tuple[float, float]:
    """Interval of `other - one` from an interval of each, by the square-and-add rule.

    Newcombe (1998), Statistics in Medicine 17, 873-890, method 10; Zou and Donner (2008),
    Statistics in Medicine 27, 1693-1702. Both intervals must have the same coverage, which then is
    that of the result; both are taken as independent.
    """
    change = other.value - one.value
    low = change - math.hypot(other.value - other.low, one.high - one.value)
    high = change + math.hypot(other.high - other.value, one.value - one.low)
    return low, high


def _verdict(
    metric: str, change: float, relative: float, noise: Noise, threshold: float
) -> Verdict:
    if change == 0:
        return "same"
    if abs(relative) <= threshold:
        return "small"
    if noise.beyond is False:
        return "noise"
    if noise.beyond is None and metric.endswith(TIMED_ENDS):
        return "unjudged"
    direction = better_direction(metric)
    if direction is None:
        return "changed"
    return "better" if (change > 0) == (direction == "higher") else "worse"


def _notes(pair: Pair, threshold: float) -> tuple[str, ...]:
    notes = []
    variants = [sorted({variant_of(row) for row in rows}) for rows in (pair.one, pair.other)]
    if variants[0] != variants[1]:
        words = ["; ".join(" ".join(variant) for variant in side) for side in variants]
        notes.append(f"{words[0]} → {words[1]}")
    shares = [[row.kv_fraction for row in rows] for rows in (pair.one, pair.other)]
    if all(share is not None for side in shares for share in side):
        means = [sum(side) / len(side) for side in shares]
        if abs(means[1] - means[0]) > threshold * abs(means[0]):
            notes.append(f"KV fraction {means[0]:.3g} → {means[1]:.3g}")
    seeds = [sorted(str(row.seed) for row in rows) for rows in (pair.one, pair.other)]
    if seeds[0] != seeds[1]:
        notes.append(f"seeds {' '.join(seeds[0])} → {' '.join(seeds[1])}")
    for name, rows in (("A", pair.one), ("B", pair.other)):
        failed = sum(row.error is not None for row in rows)
        if failed:
            notes.append(f"{failed} of {len(rows)} seeds failed in {name}")
    return tuple(notes)
