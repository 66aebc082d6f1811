"""Statistics of the report: point estimates that carry their interval, its name and n.

Every formula is written out here and tested against hand-worked numbers and against scipy. An
interval over seeds needs at least two seeds and an interval over documents at least eight
documents; below that there is no interval, and the report prints n instead of inventing one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

MIN_BOOTSTRAP_DOCUMENTS = 8


@dataclass(frozen=True)
class Estimate:
    """A number with its spread.

    Attributes:
        value: The point estimate.
        n: Independent observations behind it.
        low, high: Ends of the interval, or None where n is too small for one.
        interval: Name of the interval (`t95`, `wilson95`, `bootstrap95`, `p20_p80`) or None.
    """

    value: float
    n: int
    low: float | None = None
    high: float | None = None
    interval: str | None = None

    @property
    def half_width(self) -> float | None:
        """Half the length of the interval, or None without one."""
        if self.low is None or self.high is None:
            return None
        return (self.high - self.low) / 2


def mean(values: Sequence[float]) -> float:
    """The arithmetic mean.

    Raises:
        ValueError: If `values` is empty.
    """
    if not values:
        raise ValueError("the mean of no values does not exist")
    return math.fsum(values) / len(values)


def standard_deviation(values: Sequence[float]) -> float:
    """The sample standard deviation (n - 1 in the denominator).

    Raises:
        ValueError: If there are fewer than two values.
    """
    if len(values) < 2:
        raise ValueError(f"a standard deviation needs two values, received {len(values)}")
    centre = mean(values)
    return math.sqrt(math.fsum((value - centre) ** 2 for value in values) / (len(values) - 1))


def t_interval(values: Sequence[float], confidence: float = 0.95) -> Estimate:
    """Mean of independent runs with Student's t interval, mean ± t(n-1) s / sqrt(n).

    With one value there is no interval: `low`, `high` and `interval` are None.

    Raises:
        ValueError: If `values` is empty.
    """
    centre, n = mean(values), len(values)
    if n == 1:
        return Estimate(centre, 1)
    half = _t_quantile(n - 1, confidence) * standard_deviation(values) / math.sqrt(n)
    return Estimate(centre, n, centre - half, centre + half, f"t{_percent(confidence)}")


def paired_difference(
    values: Sequence[float], references: Sequence[float], confidence: float = 0.95
) -> Estimate:
    """Mean of `values[i] - references[i]` with the t interval of the differences.

    Pairs share what they have in common (the seed, hence data order), which the difference
    removes; an unpaired interval would be wider.

    Raises:
        ValueError: If the lengths differ or are zero.
    """
    if len(values) != len(references):
        raise ValueError(f"pairs need equal lengths, received {len(values)} and {len(references)}")
    differences = [value - reference for value, reference in zip(values, references, strict=True)]
    return t_interval(differences, confidence)


def wilson_interval(successes: float, n: int, confidence: float = 0.95) -> Estimate:
    """Wilson's score interval of a share of successes; never leaves 0..1 (Wilson, 1927).

    Raises:
        ValueError: If `n` is not positive or `successes` is outside 0..n.
    """
    if n <= 0 or not 0 <= successes <= n:
        raise ValueError(f"successes must be in 0..n with n > 0, received {successes} of {n}")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share = successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    low, high = max(0.0, centre - half), min(1.0, centre + half)
    return Estimate(share, n, low, high, f"wilson{_percent(confidence)}")


def bootstrap_interval(
    numerators: Sequence[float],
    denominators: Sequence[float] | None = None,
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Estimate:
    """Percentile bootstrap over documents of sum(numerators) / sum(denominators).

    For documents within a model, or for eight seeds and more. Fewer have `t_interval`: percentiles
    of three values cannot leave their range, which holds the mean of a symmetric distribution in
    1 - 2 / 2^3 = 75 % of all cases.

    Args:
        numerators: One number a document, e.g. its bits.
        denominators: One number a document, e.g. its bytes; ones when missing, which gives
            the mean.
        confidence: Coverage of the interval.
        resamples: Resampled sets of documents.
        seed: Seed of the resampling; the same seed gives the same interval.

    Raises:
        ValueError: With fewer than eight documents, where the percentiles mean little, or if
            the lengths differ.
    """
    top = np.asarray(numerators, dtype=np.float64)
    bottom = np.ones_like(top) if denominators is None else np.asarray(denominators, np.float64)
    if top.shape != bottom.shape or top.ndim != 1:
        raise ValueError(f"documents need equal lengths, received {top.shape} and {bottom.shape}")
    n = len(top)
    if n < MIN_BOOTSTRAP_DOCUMENTS:
        raise ValueError(
            f"a bootstrap over documents or seeds needs at least {MIN_BOOTSTRAP_DOCUMENTS}, "
            f"received {n}"
        )
    picks = np.random.default_rng(seed).integers(0, n, size=(resamples, n))
    ratios = top[picks].sum(axis=1) / bottom[picks].sum(axis=1)
    tail = (1 - confidence) / 2
    low, high = np.quantile(ratios, [tail, 1 - tail])
    return Estimate(
        float(top.sum() / bottom.sum()),
        n,
        float(low),
        float(high),
        f"bootstrap{_percent(confidence)}",
    )


def p20_p80(samples: Sequence[float]) -> Estimate:
    """The median of repeated timings with the 20th and 80th percentile (linear interpolation).

    Raises:
        ValueError: If `samples` is empty.
    """
    if not len(samples):
        raise ValueError("percentiles of no samples do not exist")
    low, middle, high = (float(q) for q in np.percentile(samples, [20, 50, 80]))
    return Estimate(middle, len(samples), low, high, "p20_p80")


def _t_quantile(degrees: int, confidence: float) -> float:
    # scipy.special alone loads in a tenth of the time of scipy.stats.
    from scipy.special import stdtrit

    return float(stdtrit(degrees, 0.5 + confidence / 2))


def _percent(confidence: float) -> str:
    return f"{confidence * 100:g}"
