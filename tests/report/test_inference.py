"""Tests of means, Holm's correction and the n that settles, by hand, by textbook and by scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from ham.report import inference
from ham.report.inference import Margins
from ham.report.statistics import t_interval


def test_one_sided_p_by_hand():
    # 2, 4, 6: mean 4, s = 2, standard error 2 / sqrt(3) = 1.154701. Against 1: t = 3 / 1.154701 =
    # 2.598076. With 2 degrees of freedom P(T <= t) = 1/2 + t / (2 sqrt(2 + t^2)) exactly:
    # t^2 = 6.75, sqrt(8.75) = 2.958040, 0.5 + 2.598076 / 5.916080 = 0.939155.
    above, below = inference.one_sided_p([2.0, 4.0, 6.0], 1.0)
    assert above == pytest.approx(1 - 0.939155, abs=1e-6)
    assert below == pytest.approx(0.939155, abs=1e-6)


def test_one_sided_p_agrees_with_scipy():
    values = [0.021, 0.034, 0.018, 0.029, 0.041]
    above, below = inference.one_sided_p(values, 0.02)
    greater = stats.ttest_1samp(values, 0.02, alternative="greater")
    assert above == pytest.approx(greater.pvalue, rel=1e-9)
    assert above + below == pytest.approx(1.0)


def test_values_without_spread():
    assert inference.one_sided_p([0.3, 0.3, 0.3], 0.1) == (0.0, 1.0)
    assert inference.one_sided_p([0.3, 0.3, 0.3], 0.5) == (1.0, 0.0)
    assert inference.one_sided_p([0.3, 0.3, 0.3], 0.3) == (1.0, 1.0)


def test_holm_by_hand():
    # Sorted 0.01, 0.02, 0.03, 0.04 times 4, 3, 2, 1: 0.04, 0.06, 0.06, 0.04; running maxima
    # 0.04, 0.06, 0.06, 0.06.
    adjusted = inference.holm_adjusted([0.04, 0.01, 0.03, 0.02])
    assert adjusted == pytest.approx([0.06, 0.04, 0.06, 0.06])
    # 0.01 <= 0.05 / 4 is rejected; 0.02 > 0.05 / 3 ends it: all others are held to 0.05 / 3.
    levels = inference.holm_levels([0.04, 0.01, 0.03, 0.02])
    assert levels == pytest.approx([0.05 / 3, 0.05 / 4, 0.05 / 3, 0.05 / 3])


def test_holm_rejects_all_when_each_step_passes():
    # 0.001 <= 0.05 / 3, 0.02 <= 0.05 / 2, 0.04 <= 0.05.
    assert inference.holm_levels([0.02, 0.001, 0.04]) == pytest.approx([0.025, 0.05 / 3, 0.05])
    assert inference.holm_adjusted([0.02, 0.001, 0.04]) == pytest.approx([0.04, 0.003, 0.04])


def test_holm_levels_reject_exactly_what_adjusted_p_values_reject():
    random = np.random.default_rng(3)
    for _ in range(200):
        p_values = list(random.uniform(0, 0.1, size=random.integers(1, 7)))
        adjusted, levels = inference.holm_adjusted(p_values), inference.holm_levels(p_values)
        by_level = [p <= level for p, level in zip(p_values, levels, strict=True)]
        assert by_level == [p <= 0.05 for p in adjusted]


def test_the_interval_leaves_the_bound_out_exactly_when_p_is_small():
    random = np.random.default_rng(5)
    for _ in range(200):
        values = tuple(random.normal(0.02, 0.02, size=random.integers(3, 8)))
        p, level = inference.joint_p([Margins("x", values, 0.0)]), 0.05 / random.integers(1, 5)
        interval = Margins("x", values, 0.0).interval(level)
        assert (p < level) == (interval.low > 0 or interval.high < 0)


def test_joint_p_is_the_weakest_for_support_and_bonferroni_for_refutation():
    good, poor = Margins("a", (1.0, 1.1, 0.9), 0.0), Margins("b", (0.1, 0.3, 0.2), 0.0)
    above = inference.one_sided_p(poor.values, 0.0)[0]
    assert inference.joint_p([good, poor]) == pytest.approx(2 * above)
    bad = Margins("c", (-1.0, -1.1, -0.9), 0.0)
    below = inference.one_sided_p(bad.values, 0.0)[1]
    assert inference.joint_p([good, bad]) == pytest.approx(2 * 2 * below)


def test_what_a_part_may_not_decide_has_no_small_p():
    values = (1.0, 1.1, 0.9)
    above, below = inference.one_sided_p(values, 0.0)
    assert above < 0.01 < 0.99 < below
    assert inference.joint_p([Margins("a", values, 0.0, refutes=False)]) == 2 * above
    assert inference.joint_p([Margins("a", values, 0.0, supports=False)]) == 1.0
    bad = tuple(-value for value in values)
    assert inference.joint_p([Margins("b", bad, 0.0, supports=False)]) == pytest.approx(2 * above)
    assert inference.joint_p([Margins("b", bad, 0.0, refutes=False)]) == 1.0


def test_settling_n_by_hand():
    # Mean 0.1, s = 0.1 (values 0, 0.1, 0.2): t(n-1, 0.975) 0.1 / sqrt(n) < 0.1 where
    # t(n-1) < sqrt(n). n = 6: 2.5706 > 2.4495; n = 7: 2.4469 < 2.6458.
    assert inference.settling_n([0.0, 0.1, 0.2], 0.0, 0.05) == 7


def test_settling_n_is_the_smallest_n_whose_interval_leaves_the_bound_out():
    values, level = [0.03, 0.01, 0.05, 0.02], 0.05
    n = inference.settling_n(values, 0.02, level)
    gap, spread = abs(np.mean(values) - 0.02), np.std(values, ddof=1)
    halves = [stats.t.ppf(1 - level / 2, m - 1) * spread / math.sqrt(m) for m in (n - 1, n)]
    assert halves[0] >= gap > halves[1]


def test_settling_n_is_none_where_no_n_would_do():
    assert inference.settling_n([0.1], 0.0, 0.05) is None
    assert inference.settling_n([-0.1, 0.0, 0.1], 0.0, 0.05) is None
    assert inference.settling_n([-1.0, 0.0, 1.0001], 0.0, 0.05) is None


def test_intervals_keep_their_coverage():
    # 2,000 samples of three normal values: 95 % intervals cover 0 in 95 %, within 4 standard errors
    # of sqrt(0.05 * 0.95 / 2000) = 0.0049.
    random = np.random.default_rng(11)
    samples = random.normal(size=(2000, 3))
    covered = [
        estimate.low <= 0 <= estimate.high for estimate in (t_interval(list(s)) for s in samples)
    ]
    assert np.mean(covered) == pytest.approx(0.95, abs=4 * 0.0049)
