from __future__ import annotations

import math

import pytest

from ham.report.aggregate import (
    NOT_RUN,
    Results,
    difference,
    kv_fraction_cell,
    most_common,
    or_failure,
    summarise,
    summarise_pooled,
    with_spread_of_time,
)
from ham.report.rows import Row
from ham.report.statistics import wilson_interval


def row(value: float | None = 1.0, **fields) -> Row:
    known = {"experiment": "e", "model": "m", "mixer": "m", "metric": "x", "device": "d", "seed": 0}
    error = "RuntimeError: no" if value is None else None
    return Row(**{**known, "value": value, "error": error, **fields})


def test_one_seed_keeps_the_interval_of_the_run():
    cell = summarise([row(0.5, n=20, low=0.3, high=0.7, interval="wilson95")])
    assert (cell.status, cell.value, cell.estimate.n, cell.observations) == ("ok", 0.5, 1, 20)
    assert (cell.estimate.low, cell.estimate.high, cell.estimate.interval) == (0.3, 0.7, "wilson95")


def test_several_seeds_give_a_t_interval():
    # mean 4, s = 2, half 4.302653 * 2 / sqrt(3) = 4.968276 (as in test_statistics).
    cell = summarise([row(2.0, seed=0), row(4.0, seed=1), row(6.0, seed=2)])
    assert (cell.value, cell.estimate.n, cell.estimate.interval) == (4.0, 3, "t95")
    assert cell.estimate.half_width == pytest.approx(4.968276, abs=1e-5)


def test_the_last_row_of_a_seed_counts():
    assert summarise([row(1.0), row(3.0)]).value == 3.0


def test_failed_partial_and_missing_cells_differ():
    assert summarise([row(None)]).status == "failed"
    partial = summarise([row(None, seed=0), row(2.0, seed=1)])
    assert (partial.status, partial.value, partial.errors) == (
        "partial",
        2.0,
        ("RuntimeError: no",),
    )
    assert summarise([]).status == "not run"


def test_values_that_are_not_finite_are_failures():
    results = Results([row(math.nan), row(math.inf, seed=1)])
    cell = results.cell("e", "x")
    assert cell.status == "failed"
    assert cell.errors[0] == "not finite: x is nan"
    assert len(results.failures()) == 2


def test_pooling_weighs_by_n_and_uses_wilson_for_one_seed():
    # 8 of 10 and 1 of 30: 9 of 40 = 0.225, not the mean of shares 0.4167.
    grid = [
        row(0.8, n=10, low=0.0, high=1.0, interval="wilson95"),
        row(1 / 30, n=30, low=0.0, high=1.0, interval="wilson95"),
    ]
    cell = summarise_pooled(grid)
    assert cell.value == pytest.approx(0.225)
    assert (cell.estimate.n, cell.estimate.interval) == (1, "wilson95")
    # Wilson 9 of 40, z² = 3.841459: centre 0.2730182 / 1.0960365 = 0.249096; half 1.788229 *
    # sqrt(0.225 * 0.775 / 40 + 3.841459 / 6400) = 1.788229 * 0.0704244 = 0.125935.
    assert cell.estimate.low == pytest.approx(0.123161, abs=1e-5)
    assert cell.estimate.high == pytest.approx(0.375031, abs=1e-5)


def test_pooling_counts_answers_of_one_sample_by_what_they_are_worth():
    # 6 of 8 answers worth 4, and 4 of 8 independent ones: 256 / (64 / 4 + 64 / 8) = 10.667.
    grid = [
        row(0.75, n=8, effective_n=4.0, low=0.0, high=1.0, interval="wilson95"),
        row(0.5, n=8, low=0.0, high=1.0, interval="wilson95"),
    ]
    cell = summarise_pooled(grid)
    expected = wilson_interval(0.625 * 32 / 3, 32 / 3)
    assert (cell.estimate.low, cell.estimate.high) == pytest.approx((expected.low, expected.high))
    assert (cell.value, cell.observations, cell.estimate.interval) == (0.625, 16, "wilson95")


def test_pooling_over_seeds_uses_seed_means():
    cell = summarise_pooled([row(0.2, seed=0), row(0.4, seed=0), row(0.5, seed=1)])
    assert cell.by_seed == ((0, pytest.approx(0.3)), (1, 0.5))
    assert cell.estimate.interval == "t95"


def test_difference_is_paired_by_seed():
    ours = summarise([row(1.0, seed=0), row(2.0, seed=1), row(9.0, seed=7)])
    theirs = summarise([row(3.0, seed=1), row(1.5, seed=0)])
    cell = difference(ours, theirs)
    assert cell.by_seed == ((0, -0.5), (1, -1.0))
    assert (cell.value, cell.estimate.n) == (-0.75, 2)
    assert difference(ours, NOT_RUN).status == "not run"
    assert difference(ours, summarise([row(None)])).status == "failed"


def test_realised_fraction_beside_a_value():
    assert kv_fraction_cell([row(2.3, kv_fraction=0.25)]).value == 0.25
    assert kv_fraction_cell([row(2.3)]) is None
    assert kv_fraction_cell([row(None, kv_fraction=0.25)]).status == "failed"
    assert kv_fraction_cell([]).status == "not run"


def test_a_cell_that_was_not_run_takes_the_failure_of_its_measurement():
    failed = summarise([row(None)])
    assert or_failure(NOT_RUN, failed) is failed
    assert or_failure(summarise([row(1.0)]), failed).value == 1.0
    assert or_failure(NOT_RUN, NOT_RUN).status == "not run"


def test_finding_rows():
    rows = [
        row(1.0, x_name="context", x_value=256.0, labels={"layer": 0}, task="a"),
        row(2.0, x_name="context", x_value=512.0, labels={"layer": 1}, task="b"),
        row(None, x_name="context", x_value=1024.0, labels={"layer": 1}, task="b"),
    ]
    results = Results(rows)
    assert [r.value for r in results.find("e", "x", layer=1, task="b")] == [2.0, None]
    assert results.x_values("e", "x") == [256.0, 512.0, 1024.0]
    assert results.label_values("e", "x", "layer") == [0, 1]
    series = results.series("e", "x")
    assert [(p.x, p.cell.status) for p in series] == [(256, "ok"), (512, "ok"), (1024, "failed")]
    assert results.tasks("e") == ["a", "b"]


def test_most_common():
    assert most_common(["a", "b", "b"]) == "b"
    assert most_common([]) is None


def test_a_rate_takes_the_percentiles_of_its_time():
    # 1000 tokens in 50 ms (40 to 80): 20,000 tokens/s, from 1000 / 0.08 to 1000 / 0.04.
    time = summarise([row(50.0, low=40.0, high=80.0, interval="p20_p80")])
    rate = with_spread_of_time(summarise([row(20_000.0)]), time)
    assert (rate.estimate.low, rate.estimate.high) == pytest.approx((12_500.0, 25_000.0))
    assert rate.estimate.interval == "p20_p80"
    seeds = summarise([row(1.0, seed=0), row(2.0, seed=1)])
    assert with_spread_of_time(seeds, time) is seeds
    assert with_spread_of_time(NOT_RUN, time) is NOT_RUN
