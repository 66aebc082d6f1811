"""Intervals that leave what is possible, by hand; verdicts do not change."""

from __future__ import annotations

import pytest
from invented_claims import make_claims, make_row, make_test, observed, seeds_of

from ham.claims.config import Test
from ham.claims.judge import Judged, judge
from ham.claims.ledger import as_records, interval_words, ledger_table
from ham.claims.ranges import Printed, possible, printed

NEEDLES = {"experiment": "needle", "metric": "accuracy"}
SHARE = {"value": 0.05, "unit": "share", "reason": "invented"}


def a_test(**changes: object) -> Test:
    values = {"where": NEEDLES, "delta": SHARE, **changes}
    return make_claims(make_test(**values)).claims[0].tests[0]


def judged(ours: list[float], theirs: list[float]) -> Judged:
    rows = seeds_of("ours", ours, **NEEDLES) + seeds_of("theirs", theirs, **NEEDLES)
    return judge(make_claims(make_test(where=NEEDLES, delta=SHARE)), observed(rows))[0].tests[0]


def test_an_interval_over_everything_has_no_information():
    # Differences 0.9, -0.6, 0.1: mean 0.133333, s = 0.750555, half = 4.302653 * 0.750555 / sqrt(3)
    # = 1.864482: [-1.731149, 1.997816], of which [-1, 1] is possible.
    one = judged([0.95, 0.2, 0.5], [0.05, 0.8, 0.4])
    assert (one.effect.low, one.effect.high) == pytest.approx((-1.731149, 1.997816), abs=1e-5)
    words = "[-1, 1] (95 % t, clipped to what is possible; bound 0.05): no information"
    assert interval_words(one) == words


def test_one_end_may_be_clipped():
    # Differences 0.9, 0.5, 0.7: mean 0.7, s = 0.2, half = 4.302653 * 0.2 / sqrt(3) = 0.496828:
    # [0.203172, 1.196828].
    one = judged([0.95, 0.55, 0.75], [0.05, 0.05, 0.05])
    assert (one.verdict, one.effect.high) == ("supported", pytest.approx(1.196828, abs=1e-5))
    assert interval_words(one) == "[0.203, 1] (95 % t, clipped to what is possible; bound 0.05)"


def test_an_interval_within_the_range_is_printed_as_it_is():
    one = judged([0.5, 0.51, 0.52], [0.3, 0.3, 0.3])
    assert interval_words(one) == "[0.185, 0.235] (95 % t; bound 0.05)"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, (-1.0, 1.0)),
        ({"test": "non_inferiority"}, (-1.0, 1.0)),
        # The accuracy less 0.05.
        ({"test": "threshold", "reference": None}, (-0.05, 0.95)),
        ({"test": "monotone", "reference": None}, (-1.0, 1.0)),
        ({"test": "monotone", "reference": None, "largest_step": 0.5}, (-1.5, 1.5)),
        # Relative to a small reference an effect may be of any size; so may bits.
        ({"delta": {**SHARE, "unit": "relative"}}, None),
        (
            {
                "where": {"experiment": "language_modelling", "metric": "bits_per_byte"},
                "delta": {**SHARE, "unit": "bits per byte"},
            },
            None,
        ),
    ],
)
def test_what_an_effect_can_be(changes: dict, expected: tuple | None):
    assert possible(a_test(**changes)) == expected


def test_an_accuracy_near_one_stays_below_it():
    test = a_test(test="threshold", reference=None, delta={**SHARE, "value": 0.9})
    # 0.9 + 0.15 is more than 1; 0.9 - 0.02 is possible.
    clipped = printed(test, -0.02, 0.15)
    assert clipped == Printed(-0.02, pytest.approx(0.1), clipped=True)


def test_the_table_prints_what_is_possible_and_keeps_what_was_computed():
    rows = [
        make_row(model, value, seed, **NEEDLES)
        for model, values in (("ours", (0.95, 0.2, 0.5)), ("theirs", (0.05, 0.8, 0.4)))
        for seed, value in enumerate(values)
    ]
    claims = judge(make_claims(make_test(where=NEEDLES, delta=SHARE)), observed(rows))
    (record,) = ledger_table(claims, ["r"]).records
    assert record["interval"].endswith("no information")
    assert record["low"] < -1 < 1 < record["high"]
    (test,) = as_records(claims, ["r"])["claims"][0]["tests"]
    assert (test["interval"], test["low"]) == (record["interval"], record["low"])
