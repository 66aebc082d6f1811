"""From paired values to decisions: one-sided tests, Holm's correction, the n that would settle it.

A claim states the smallest effect of interest δ before the runs. Its interval decides: wholly
beyond δ, wholly short of it, or across it. With several tests in a family the intervals are widened
by Holm's step-down levels, so that the chance of any wrong decision stays below alpha.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ham.report.statistics import Estimate, mean, standard_deviation, t_interval

MIN_SEEDS = 3
"""Fewer seeds never decide anything."""
LARGEST_N = 10_000


@dataclass(frozen=True)
class Margins:
    """What one comparison found for each seed, as an effect that is good when it is large.

    Attributes:
        name: Which comparison.
        values: One effect a seed, in the claim's unit.
        bound: The effect that the claim asks for.
        supports, refutes: Whether it may support or refute the claim; false where the comparison
            favours that outcome.
    """

    name: str
    values: tuple[float, ...]
    bound: float
    supports: bool = True
    refutes: bool = True

    def interval(self, level: float) -> Estimate:
        """The two-sided t interval that misses with probability `level`."""
        return t_interval(self.values, 1 - level)


def one_sided_p(values: Sequence[float], bound: float) -> tuple[float, float]:
    """p-values of Student's t test of the mean against `bound`.

    Args:
        values: At least two independent values.
        bound: The mean under the null hypothesis.

    Returns:
        The p-value for "the mean is above `bound`" and for "the mean is below it". Equal values
        have no spread: then the p-values are 0 and 1, or both 1 at the bound itself.

    Raises:
        ValueError: With fewer than two values.
    """
    spread = standard_deviation(values)
    gap = mean(values) - bound
    if spread == 0:
        if gap == 0:
            return 1.0, 1.0
        return (0.0, 1.0) if gap > 0 else (1.0, 0.0)
    from scipy.special import stdtr

    t = gap * math.sqrt(len(values)) / spread
    return float(stdtr(len(values) - 1, -t)), float(stdtr(len(values) - 1, t))


def joint_p(margins: Sequence[Margins]) -> float:
    """The two-sided p-value of a claim that demands every margin beyond its bound.

    It is supported if every part is (intersection-union test: the largest p-value, Berger 1982) and
    refuted if any part is (Bonferroni over the parts). With one part this is the two-sided t test
    of the mean against the bound. An outcome that a part may not decide has a p-value of 1 there.
    """
    tested = [(part, *one_sided_p(part.values, part.bound)) for part in margins]
    supported = max(above if part.supports else 1.0 for part, above, _ in tested)
    refuted = len(tested) * min(below if part.refutes else 1.0 for part, _, below in tested)
    return min(1.0, 2 * min(supported, refuted))


def holm_adjusted(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p-values (Holm, 1979), in the order received."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def holm_levels(p_values: Sequence[float], alpha: float = 0.05) -> list[float]:
    """The level at which Holm's procedure looks at each test, in the order received.

    The k-th smallest p-value is compared with alpha / (m - k + 1). The first that is larger ends
    the procedure, and it and all later ones keep its level. So an interval that misses with this
    probability leaves the bound out exactly when Holm rejects; deciding the direction by its side
    keeps the error rate (Shaffer, 1980).
    """
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    levels = [alpha] * len(p_values)
    level = alpha
    stopped = False
    for rank, index in enumerate(order):
        if not stopped:
            level = alpha / (len(order) - rank)
            stopped = p_values[index] > level
        levels[index] = level
    return levels


def settling_n(values: Sequence[float], bound: float, level: float) -> int | None:
    """The smallest number of seeds whose t interval would leave `bound` out.

    Computed from the observed mean and standard deviation as if they stayed the same; more seeds
    may change both. None beyond `LARGEST_N` and where the mean lies on the bound.
    """
    if len(values) < 2:
        return None
    spread, gap = standard_deviation(values), abs(mean(values) - bound)
    if gap == 0:
        return None
    low, high = MIN_SEEDS, LARGEST_N
    if not _leaves_out(high, spread, gap, level):
        return None
    while low < high:
        middle = (low + high) // 2
        if _leaves_out(middle, spread, gap, level):
            high = middle
        else:
            low = middle + 1
    return low


def _leaves_out(n: int, spread: float, gap: float, level: float) -> bool:
    from scipy.special import stdtrit

    return float(stdtrit(n - 1, 1 - level / 2)) * spread / math.sqrt(n) < gap
