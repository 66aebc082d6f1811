"""What is said beside a timing, made from its rows."""

from __future__ import annotations

from invented_claims import make_claims, make_test, observed, timing_rows

from ham.claims.config import load_claims, shipped_claims
from ham.claims.judge import Judged, judge
from ham.claims.ledger import kept_words
from ham.report.rows import Row

WHERE = {"experiment": "model_train", "metric": "median_ms", "over": ["batch"]}
TIMES = {"value": 1.0, "unit": "times", "reason": "invented"}
GIB = 2**30


def rows_at(x: float, batch: int, peaks: tuple[int, int]) -> list[Row]:
    """One cell of ours, made to keep a quarter, and of theirs."""
    mine, other = timing_rows(2.0, batch, experiment="model_train", x_value=x)
    forced = {"routing": "forced", "fraction": 0.25, "peak_bytes": peaks[0] * GIB}
    ours = {"kv_fraction": 0.25, "parameters": 183_743_232, "provider": "triton"}
    theirs = {"kv_fraction": 1.0, "parameters": 183_690_240, "provider": "sdpa"}
    ours["labels"] = {**mine.labels, **forced}
    theirs["labels"] = {**other.labels, "peak_bytes": peaks[1] * GIB}
    return [mine.model_copy(update=ours), other.model_copy(update=theirs)]


def judged(rows: list[Row]) -> Judged:
    arm = {"model": "ours", "labels": {"fraction": 0.25, "routing": "forced"}}
    test = make_test(test="timing", where=WHERE, delta=TIMES, arm=arm)
    return judge(make_claims(test), observed(rows))[0].tests[0]


def test_sizes_places_and_peak_memory_stand_beside_the_verdict():
    cells = [(8192.0, 4, (30, 15)), (16384.0, 2, (32, 16)), (32768.0, 1, (38, 19))]
    one = judged([row for cell in cells for row in rows_at(*cell)])
    assert one.verdict == "supported"
    assert one.reason == (
        "3 of 3 cells beyond, 0 short; "
        "ours fraction=0.25 routing=forced is 183.743 M parameters, provider triton; "
        "theirs is 183.690 M parameters, provider sdpa; "
        "at x 8,192, 16,384 and 32,768; "
        "routing=forced: tokens are kept as told, no trained score decides; "
        "peak_bytes at x 32768, batch 1: 38.0 GiB against 19.0 GiB"
    )
    assert kept_words(one) == "ours fraction=0.25 routing=forced 25.0 %, theirs 100.0 %"


def test_nothing_is_said_of_what_rows_do_not_tell():
    rows = [row for batch in (1, 2, 4) for row in timing_rows(2.0, batch, experiment="model_train")]
    test = make_test(test="timing", where=WHERE, delta=TIMES)
    one = judge(make_claims(test), observed(rows))[0].tests[0]
    assert one.reason == (
        "3 of 3 cells beyond, 0 short; ours is provider torch; theirs is provider torch; at x 4,096"
    )
    assert one.kept == ()


def test_cells_that_failed_are_not_described():
    rows = rows_at(8192.0, 4, (30, 15)) + rows_at(65536.0, 1, (99, 99))
    rows[2] = rows[2].model_copy(update={"value": None, "error": "out of memory"})
    one = judged(rows)
    assert "at x 8,192;" in one.reason
    assert "x 65536, batch 1: out of memory" in one.reason
    assert "99.0 GiB" not in one.reason


def test_the_shipped_claim_on_training_is_of_time_alone():
    (claim,) = [one for one in load_claims(shipped_claims()).claims if one.id == "C6-training"]
    assert "made to keep a quarter" in claim.statement
    assert "Of time alone" in claim.statement
    assert claim.tests[0].arms[0].labels["routing"] == "forced"
