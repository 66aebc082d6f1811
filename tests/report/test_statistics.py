"""Every formula against numbers worked by hand (in the comments) and against scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from ham.report import statistics


def test_mean_and_standard_deviation_by_hand():
    # 1 + 2 + 6 = 9, mean 3; squares 4 + 1 + 9 = 14, 14 / 2 = 7.
    assert statistics.mean([1.0, 2.0, 6.0]) == 3.0
    assert statistics.standard_deviation([1.0, 2.0, 6.0]) == pytest.approx(math.sqrt(7.0))


def test_t_interval_by_hand():
    # n = 3, mean 4, s = sqrt((4 + 0 + 4) / 2) = 2, t(2, 0.975) = 4.302653 (printed tables),
    # half = 4.302653 * 2 / sqrt(3) = 4.968276.
    estimate = statistics.t_interval([2.0, 4.0, 6.0])
    assert (estimate.value, estimate.n, estimate.interval) == (4.0, 3, "t95")
    assert estimate.low == pytest.approx(4.0 - 4.968276, abs=1e-5)
    assert estimate.high == pytest.approx(4.0 + 4.968276, abs=1e-5)
    assert estimate.half_width == pytest.approx(4.968276, abs=1e-5)


def test_t_interval_of_two_by_hand():
    # mean 1.5, s = sqrt(0.5), t(1, 0.975) = 12.706205, half = 12.706205 * 0.5 = 6.353102.
    assert statistics.t_interval([1.0, 2.0]).half_width == pytest.approx(6.353102, abs=1e-5)


def test_t_interval_of_one_value_has_no_interval():
    estimate = statistics.t_interval([3.5])
    assert estimate == statistics.Estimate(3.5, 1, None, None, None)
    assert estimate.half_width is None


def test_t_interval_agrees_with_scipy():
    values = [2.31, 2.29, 2.36, 2.30, 2.27]
    low, high = stats.t.interval(0.9, len(values) - 1, loc=np.mean(values), scale=stats.sem(values))
    estimate = statistics.t_interval(values, confidence=0.9)
    assert (estimate.low, estimate.high) == pytest.approx((low, high), rel=1e-9)
    assert estimate.interval == "t90"


def test_paired_difference_by_hand():
    # differences -1, -2, -3: mean -2, s = 1, half = 4.302653 / sqrt(3) = 2.484138.
    estimate = statistics.paired_difference([1.0, 2.0, 3.0], [2.0, 4.0, 6.0])
    assert estimate.value == -2.0
    assert estimate.low == pytest.approx(-4.484138, abs=1e-5)
    assert estimate.high == pytest.approx(0.484138, abs=1e-5)


def test_paired_difference_agrees_with_scipy():
    ours, reference = [2.31, 2.29, 2.36, 2.30], [2.35, 2.30, 2.41, 2.38]
    interval = stats.ttest_rel(ours, reference).confidence_interval(0.95)
    estimate = statistics.paired_difference(ours, reference)
    assert (estimate.low, estimate.high) == pytest.approx((interval.low, interval.high), rel=1e-9)


def test_paired_difference_of_one_pair_has_no_interval():
    assert statistics.paired_difference([2.0], [1.5]) == statistics.Estimate(0.5, 1)


def test_paired_difference_needs_pairs():
    with pytest.raises(ValueError, match="received 2 and 1"):
        statistics.paired_difference([1.0, 2.0], [1.0])


def test_wilson_by_hand():
    # 8 of 10, z = 1.959964, z² = 3.841459: centre (0.8 + 0.19207295) / 1.3841459 = 0.716740,
    # half 1.959964 / 1.3841459 * sqrt(0.016 + 0.0096036) = 0.226578; so 0.490162 and 0.943318.
    estimate = statistics.wilson_interval(8, 10)
    assert (estimate.value, estimate.n, estimate.interval) == (0.8, 10, "wilson95")
    assert estimate.low == pytest.approx(0.490162, abs=1e-5)
    assert estimate.high == pytest.approx(0.943318, abs=1e-5)


@pytest.mark.parametrize(("successes", "n"), [(0, 20), (20, 20), (7, 20), (1, 1)])
def test_wilson_agrees_with_scipy(successes: int, n: int):
    interval = stats.binomtest(successes, n).proportion_ci(0.95, method="wilson")
    estimate = statistics.wilson_interval(successes, n)
    assert (estimate.low, estimate.high) == pytest.approx((interval.low, interval.high), abs=1e-12)


@pytest.mark.parametrize(("successes", "n"), [(3, 2), (-1, 4), (0, 0)])
def test_wilson_refuses_impossible_counts(successes: int, n: int):
    with pytest.raises(ValueError, match="successes"):
        statistics.wilson_interval(successes, n)


def test_answers_that_share_samples_by_hand():
    # 2, 2, 1 and 0 of 2 answers: p = 5/8, residuals y - 2p = 0.75, 0.75, -0.25, -1.25, squares
    # together 2.75; v = 4/3 * 2.75 / 64 = 0.0572917; effective n = 0.234375 / v = 4.0909.
    # Wilson of p at that n: z²/n = 0.939023, centre (0.625 + 0.469512) / 1.939023 = 0.564466,
    # half 1.959964 / 1.939023 * sqrt(0.0572917 + 0.939023 / 16.363636) = 0.342297.
    estimate = statistics.clustered_wilson_interval([2, 2, 1, 0], [2, 2, 2, 2])
    assert (estimate.value, estimate.n, estimate.interval) == (0.625, 8, "wilson95")
    assert estimate.effective_n == pytest.approx(4.0909, abs=1e-4)
    assert estimate.low == pytest.approx(0.222169, abs=1e-5)
    assert estimate.high == pytest.approx(0.906763, abs=1e-5)
    plain = statistics.wilson_interval(5, 8)
    assert estimate.low < plain.low and plain.high < estimate.high


@pytest.mark.parametrize(
    ("right", "sizes", "effective"),
    [
        # Alike within a sample: as many as there are samples.
        ([4, 0, 4, 4, 0], [4] * 5, 5),
        # More alike between samples than chance makes them: no more than there are answers.
        ([2, 2, 2, 2, 2], [4] * 5, 20),
        # The spread says nothing: (3 + 1)² / (9 + 1).
        ([3, 1], [3, 1], 1.6),
        ([0, 0], [3, 1], 1.6),
        ([2], [4], 1),
    ],
)
def test_effective_n_stays_between_samples_and_answers(
    right: list[int], sizes: list[int], effective: float
):
    estimate = statistics.clustered_wilson_interval(right, sizes)
    assert estimate.effective_n == pytest.approx(effective)
    assert estimate.n == sum(sizes)
    expected = statistics.wilson_interval(estimate.value * effective, effective)
    assert (estimate.low, estimate.high) == pytest.approx((expected.low, expected.high))


def test_one_answer_a_sample_is_plain_wilson():
    one_each = statistics.clustered_wilson_interval([1, 0, 1, 1], [1] * 4)
    assert one_each == statistics.wilson_interval(3, 4)
    assert "effective_n" not in one_each.row_fields()


def test_intervals_over_samples_hold_the_true_share():
    """Of 400 experiments of 30 samples with 4 answers and a share that varies by sample (beta(1,
    1), p = 1/2, correlation 1/3), 95 % intervals hold p in 91 to 99 %; independent ones do not."""
    random = np.random.default_rng(0)
    held = {"samples": 0, "answers": 0}
    for _ in range(400):
        right = random.binomial(4, random.beta(1, 1, size=30)).tolist()
        estimate = statistics.clustered_wilson_interval(right, [4] * 30)
        plain = statistics.wilson_interval(sum(right), 120)
        held["samples"] += estimate.low <= 0.5 <= estimate.high
        held["answers"] += plain.low <= 0.5 <= plain.high
    assert 0.91 * 400 <= held["samples"] <= 0.99 * 400
    assert held["answers"] < 0.88 * 400


@pytest.mark.parametrize(
    ("right", "sizes"), [([], []), ([1], [2, 2]), ([3], [2]), ([-1], [2]), ([0], [0])]
)
def test_impossible_samples_are_refused(right: list[int], sizes: list[int]):
    with pytest.raises(ValueError, match="received"):
        statistics.clustered_wilson_interval(right, sizes)


def test_pooled_shares_by_hand():
    # 4 of 8 answers worth 4, and 8 of 8 independent ones: 256 / (64 / 4 + 64 / 8) = 10.667.
    shares = [
        statistics.Estimate(0.5, 8, effective_n=4.0),
        statistics.Estimate(1.0, 8),
    ]
    pooled = statistics.pooled_share(shares)
    assert (pooled.value, pooled.n) == (0.75, 16)
    assert pooled.effective_n == pytest.approx(32 / 3)
    expected = statistics.wilson_interval(8, 32 / 3)
    assert (pooled.low, pooled.high) == pytest.approx((expected.low, expected.high))
    independent = [statistics.Estimate(0.5, 8), statistics.Estimate(1.0, 8)]
    assert statistics.pooled_share(independent) == statistics.wilson_interval(12, 16)


def test_bootstrap_of_equal_documents_has_no_width():
    # Every document has 3 bits a byte, so every resample has too.
    estimate = statistics.bootstrap_interval([30.0] * 8, [10.0] * 8)
    assert (estimate.value, estimate.low, estimate.high, estimate.n) == (3.0, 3.0, 3.0, 8)


def test_bootstrap_weighs_documents_by_their_bytes():
    # (7 * 10 + 1 * 100) bits / (7 * 10 + 1 * 50) bytes = 170 / 120; the mean of ratios would be
    # (7 * 1 + 2) / 8 = 1.125.
    estimate = statistics.bootstrap_interval([10.0] * 7 + [100.0], [10.0] * 7 + [50.0])
    assert estimate.value == pytest.approx(170 / 120)
    assert estimate.low < estimate.value < estimate.high


def test_bootstrap_agrees_with_scipy_and_is_seeded():
    values = np.random.default_rng(1).normal(2.3, 0.2, size=60)
    ours = statistics.bootstrap_interval(values, resamples=20_000, seed=3)
    theirs = stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, method="percentile", random_state=4
    ).confidence_interval
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=2e-3)
    assert ours == statistics.bootstrap_interval(values, resamples=20_000, seed=3)
    assert ours != statistics.bootstrap_interval(values, resamples=20_000, seed=5)


def test_bootstrap_refuses_fewer_than_eight_documents():
    with pytest.raises(ValueError, match="at least 8, received 7"):
        statistics.bootstrap_interval([1.0] * 7)


def test_p20_p80_by_hand():
    # Sorted 1..6: the p-th percentile lies at 5 p: 20 % at 1.0 -> 2, 50 % at 2.5 -> 3.5,
    # 80 % at 4.0 -> 5.
    estimate = statistics.p20_p80([6.0, 1.0, 5.0, 2.0, 4.0, 3.0])
    assert (estimate.low, estimate.value, estimate.high) == pytest.approx((2.0, 3.5, 5.0))
    assert (estimate.n, estimate.interval) == (6, "p20_p80")


@pytest.mark.parametrize("function", [statistics.mean, statistics.t_interval, statistics.p20_p80])
def test_no_values_is_an_error(function):
    with pytest.raises(ValueError):
        function([])
