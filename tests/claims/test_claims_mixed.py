"""Timings that hold in some cells only, by hand."""

from __future__ import annotations

import pytest
from invented_claims import make_claims, make_test, observed, timing_rows

from ham.claims.judge import INCONCLUSIVE, REFUTED, SUPPORTED, Judged, judge
from ham.claims.ledger import as_records, as_text
from ham.claims.mixed import holds_from
from ham.claims.timings import Cell
from ham.report.statistics import Estimate

WHERE = {"experiment": "model_decode", "metric": "median_ms", "over": ["batch"]}
TEST = make_test(
    test="timing", where=WHERE, delta={"value": 1.2, "unit": "times", "reason": "invented"}
)


def rows_of(factors: dict[tuple[int, int], float], **fields: object) -> list:
    """Cells by context and batch."""
    return [
        row
        for (x, batch), factor in factors.items()
        for row in timing_rows(factor, batch, x_value=float(x), **fields)
    ]


def judged(factors: dict[tuple[int, int], float], **fields: object) -> Judged:
    return judge(make_claims(TEST), observed(rows_of(factors, **fields)))[0].tests[0]


GRID = {(x, batch): 2.0 for x in (4096, 16384, 32768) for batch in (1, 8, 64)}


def test_some_beyond_and_some_short_is_mixed_with_the_place_from_which_it_holds():
    # Short at (4096, 1) and (16384, 1): from 32,768 on all three cells hold, from batch 8 on six.
    factors = {**GRID, (4096, 1): 0.9, (16384, 1): 1.1}
    one = judged(factors)
    assert (one.verdict, one.holds_from) == (INCONCLUSIVE, {"x": 32768.0, "batch": 8.0})
    assert one.reason.startswith(
        "7 of 9 cells beyond, 2 short; mixed, which no repeat settles: it holds in each of the 3 "
        "cells from x 32,768 on and in each of the 6 cells from batch 8 on; short at "
        "(x 4096, batch 1) and (x 16384, batch 1)"
    )


def test_a_cell_across_the_bound_does_not_hold():
    # At (16384, 64) the range of 1.2 / 1.02² to 1.2 · 1.02² lies across 1.2.
    one = judged({**GRID, (4096, 1): 0.9, (16384, 64): 1.2})
    assert one.holds_from == {"x": 32768.0}


def test_a_failure_at_the_end_of_the_grid_leaves_no_place():
    one = judged({**GRID, (32768, 64): 0.9})
    assert (one.verdict, one.holds_from) == (INCONCLUSIVE, {})
    assert "it holds from no place of the grid on; short at (x 32768, batch 64)" in one.reason


def test_fewer_cells_than_a_decision_needs_say_nothing():
    cells = [Cell("", Estimate(f, 1, f, f), {"x": x}) for x, f in ((1.0, 1.0), (2.0, 2.0))]
    assert holds_from(cells, 1.5) == {}
    assert holds_from([*cells, cells[1], cells[1]], 1.5) == {"x": 2.0}


@pytest.mark.parametrize(
    ("factors", "expected"),
    [
        (GRID, SUPPORTED),
        ({**GRID, (4096, 1): 0.9, (4096, 8): 0.9, (4096, 64): 0.9}, REFUTED),
        # Nothing is wholly short: repeats may settle it.
        ({**GRID, (4096, 1): 1.2}, INCONCLUSIVE),
        ({(4096, 1): 0.9, (4096, 8): 2.0}, INCONCLUSIVE),
    ],
)
def test_other_verdicts_are_not_mixed(factors: dict, expected: str):
    one = judged(factors)
    assert (one.verdict, one.holds_from) == (expected, None)


def test_the_ledger_asks_for_no_repeats_where_they_do_not_help():
    mixed = judge(make_claims(TEST), observed(rows_of({**GRID, (4096, 1): 0.9})))
    assert "mixed, which no repeat settles" in as_text(mixed, ["r"])
    assert "would have to be measured" not in as_text(mixed, ["r"])
    (test,) = as_records(mixed, ["r"])["claims"][0]["tests"]
    assert test["holds_from"] == {"x": 16384.0, "batch": 8.0}
    noisy = judge(make_claims(TEST), observed(rows_of({**GRID, (4096, 1): 1.2})))
    assert "more cells, or cells with less noise, would have to be measured" in as_text(noisy, [""])
