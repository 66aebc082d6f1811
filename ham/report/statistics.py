"""Statistics of the report: point estimates that carry their interval, its name and n.

Every formula is written out here and tested against hand-worked numbers and against scipy. An
interval over seeds needs at least two seeds and an interval over documents at least eight
documents; below that there is no interval, and the report prints n instead of inventing one.

Answers to one sample depend on each other: a model that reads a text well finds most of its
needles. A share of answers therefore has Wilson's interval of an effective n, which the spread
between samples decides (`clustered_wilson_interval`); a share of samples has the plain one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Any

import numpy as np

MIN_BOOTSTRAP_DOCUMENTS = 8


@dataclass(frozen=True)
class Estimate:
    """A number with its spread.

    Attributes:
        value: The point estimate.
        n: Observations behind it.
        low, high: Ends of the interval, or None where n is too small for one.
        interval: Name of the interval (`t95`, `wilson95`, `bootstrap95`, `p20_p80`) or None.
        effective_n: How many independent observations the n are worth, for answers that share
            samples; None where the n are independent.
    """

    value: float
    n: int
    low: float | None = None
    high: float | None = None
    interval: str | None = None
    effective_n: float | None = None

    @property
    def half_width(self) -> float | None:
        """Half the length of the interval, or None without one."""
        if self.low is None or self.high is None:
            return None
        return (self.high - self.low) / 2

    def row_fields(self) -> dict[str, Any]:
        """The fields of a result row that say this, `effective_n` only where it is one."""
        fields = {
            "value": self.value,
            "n": self.n,
            "low": self.low,
            "high": self.high,
            "interval": self.interval,
        }
        if self.effective_n is not None:
            fields["effective_n"] = self.effective_n
        return fields


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


def wilson_interval(successes: float, n: float, confidence: float = 0.95) -> Estimate:
    """Wilson's score interval of a share of successes; never leaves 0..1 (Wilson, 1927).

    The n must be independent; `clustered_wilson_interval` is for answers that share samples.

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


def clustered_wilson_interval(
    successes: Sequence[float], sizes: Sequence[int], confidence: float = 0.95
) -> Estimate:
    """Wilson's interval of a share of answers, where the sample is what was drawn.

    The share p = sum y / M of sample sums y of m answers, M = sum m, is a ratio; its variance by
    linearisation over the k samples is v = k / (k - 1) * sum (y - p m)^2 / M^2. The design effect
    d = v / (p (1 - p) / M) gives the effective n M / d (Rao and Scott 1992, Biometrics 48,
    577-585), which takes the place of n in Wilson's formula (Franco, Little, Louis and Slud 2019,
    Journal of Survey Statistics and Methodology 7, 334-364). It is held between M^2 / sum m^2, the
    worth of answers that are all alike within a sample (k, if samples are equal), and M: a
    spread below that of independent answers is taken for chance. Where all answers are right or
    all wrong, or there is one sample, the spread says nothing and the smaller bound holds.

    Samples with one answer each give plain `wilson_interval`, without `effective_n`.

    Args:
        successes: Right answers of each sample.
        sizes: Answers of each sample, at least one.
        confidence: Coverage of the interval.

    Raises:
        ValueError: If there is no sample, the lengths differ, or a sample's successes are outside
            0..its size.
    """
    if len(successes) != len(sizes) or not sizes:
        raise ValueError(
            f"samples need sums and sizes, received {len(successes)} and {len(sizes)} of them"
        )
    pairs = list(zip(successes, sizes, strict=True))
    for right, size in pairs:
        if size < 1 or not 0 <= right <= size:
            raise ValueError(f"a sample has 0..size successes, received {right} of {size}")
    total = sum(sizes)
    if total == len(sizes):
        return wilson_interval(sum(successes), total, confidence)
    return _wilson_of_effective_n(sum(successes), total, _effective_n(pairs), confidence)


def pooled_share(shares: Sequence[Estimate], confidence: float = 0.95) -> Estimate:
    """One share of several that have no sample in common, with Wilson's interval.

    Answers of one design effect are worth N^2 / sum (n^2 / effective n) together: the variance of
    their mean weighted by n, with one p for all. N where every n is independent.

    Raises:
        ValueError: If there is no share.
    """
    total = sum(share.n for share in shares)
    successes = round(math.fsum(share.value * share.n for share in shares))
    if all(share.effective_n is None for share in shares):
        return wilson_interval(successes, total, confidence)
    worth = [share.n if share.effective_n is None else share.effective_n for share in shares]
    spread = math.fsum(share.n**2 / each for share, each in zip(shares, worth, strict=True))
    return _wilson_of_effective_n(successes, total, total**2 / spread, confidence)


def _effective_n(pairs: Sequence[tuple[float, int]]) -> float:
    """Independent answers that samples of (right, size) are worth."""
    samples, total = len(pairs), sum(size for _, size in pairs)
    least = total**2 / sum(size**2 for _, size in pairs)
    share = sum(right for right, _ in pairs) / total
    if samples == 1 or share in (0.0, 1.0):
        return least
    spread = math.fsum((right - share * size) ** 2 for right, size in pairs)
    variance = samples / (samples - 1) * spread / total**2
    # Samples with equal shares have no spread at all: worth M, not infinitely many.
    return min(max(share * (1 - share) / variance, least), total) if variance else total


def _wilson_of_effective_n(
    successes: float, n: int, effective_n: float, confidence: float
) -> Estimate:
    interval = wilson_interval(successes / n * effective_n, effective_n, confidence)
    return replace(interval, value=successes / n, n=n, effective_n=effective_n)


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
