"""Conditions beside a comparison: tokens kept, and bytes at the length of the task."""

from __future__ import annotations

from datetime import timedelta

import pytest
from invented_claims import STATED, make_claims, make_row, make_test, observed, seeds_of

from ham.claims.conditions import check_fraction
from ham.claims.judge import INCONCLUSIVE, REFUTED, SUPPORTED, Judged, judge
from ham.claims.ledger import as_records, as_text, kept_words, ledger_table
from ham.claims.query import Gathered
from ham.report.inference import Margins
from ham.report.rows import Row

THEIRS = [2.30, 2.31, 2.32]
BETTER, WORSE = [2.20, 2.209, 2.221], [2.40, 2.409, 2.421]
SAME = {"value": 0.03, "reason": "invented"}


def pairs(ours: list[float], share: float | None, their_share: float | None = 0.244) -> list[Row]:
    return [
        *seeds_of("ours", ours, kv_fraction=share),
        *seeds_of("theirs", THEIRS, kv_fraction=their_share),
    ]


def judged(rows: list[Row], **changes: object) -> Judged:
    test = make_test(**{"same_fraction": SAME, **changes})
    return judge(make_claims(test), observed(rows))[0].tests[0]


@pytest.mark.parametrize("kind", ["superiority", "non_inferiority"])
@pytest.mark.parametrize(
    ("ours", "share", "expected", "words"),
    [
        # 0.25 - 0.244 is within 0.03.
        (BETTER, 0.25, SUPPORTED, ""),
        (WORSE, 0.25, REFUTED, ""),
        # Fewer tokens: a win is conservative, a loss says nothing.
        (BETTER, 0.126, SUPPORTED, "with fewer tokens kept (12.6 % against 24.4 % of theirs)"),
        (WORSE, 0.126, INCONCLUSIVE, "with fewer tokens kept (12.6 % against 24.4 % of theirs)"),
        # More tokens: the other way round.
        (BETTER, 0.486, INCONCLUSIVE, "with more tokens kept (48.6 % against 24.4 % of theirs)"),
        (WORSE, 0.486, REFUTED, "with more tokens kept (48.6 % against 24.4 % of theirs)"),
        (BETTER, None, INCONCLUSIVE, "rows of ours or theirs carry no kv_fraction"),
    ],
)
def test_only_the_side_that_keeps_fewer_can_win(
    kind: str, ours: list[float], share: float | None, expected: str, words: str
):
    one = judged(pairs(ours, share), test=kind)
    assert one.verdict == expected
    assert words in one.reason
    assert ("tokens kept" in one.reason) == ("tokens kept" in words)
    # What may not be decided is not settled by more seeds, and has no small p-value.
    assert one.blocked == (expected == INCONCLUSIVE)
    assert one.settles_at is None
    if one.p is not None:
        assert (one.p == 1.0) == (expected == INCONCLUSIVE)


def test_a_plain_number_is_the_value():
    assert judged(pairs(BETTER, 0.486), same_fraction=0.03).verdict == INCONCLUSIVE
    assert judged(pairs(BETTER, 0.486), same_fraction=0.25).verdict == SUPPORTED


def test_shares_are_compared_at_every_place_of_the_grid():
    """Equal means hide nothing: more at one length and fewer at another decide nothing."""
    rows = [
        make_row(model, loss, seed, x_value=x, kv_fraction=share)
        for model, losses, shares in (("ours", BETTER, (0.1, 0.4)), ("theirs", THEIRS, (0.25,) * 2))
        for seed, loss in enumerate(losses)
        for x, share in zip((1.0, 2.0), shares, strict=True)
    ]
    one = judged(rows)
    assert one.verdict == INCONCLUSIVE
    assert "differ from theirs both ways over the grid (25.0 % against 25.0 %)" in one.reason
    assert kept_words(one) == "ours 25.0 % (10.0 to 40.0), theirs 25.0 %"


def test_each_reference_has_shares_of_its_own():
    two = {"reference": [{"model": "theirs"}, {"model": "other"}]}
    rows = [*pairs(BETTER, 0.25), *seeds_of("other", THEIRS, kv_fraction=0.1)]
    one = judged(rows, **two)
    assert one.verdict == INCONCLUSIVE
    assert "with more tokens kept (25.0 % against 10.0 % of other)" in one.reason
    # What falls short of one reference is refuted, whatever the other keeps.
    assert judged([*pairs(WORSE, 0.25), *rows[6:]], **two).verdict == REFUTED


def test_only_rows_of_the_seeds_compared_count():
    rows = [*pairs(BETTER, 0.25), make_row("ours", 2.2, 3, kv_fraction=0.9)]
    one = judged(rows)
    assert (one.verdict, kept_words(one)) == (SUPPORTED, "ours 25.0 %, theirs 24.4 %")


def test_a_limit_stays():
    side = Gathered("a", {0: {("text",): make_row("a", 2.0, kv_fraction=0.25)}})
    limited = Margins("against b", (0.1, 0.1), 0.0, supports=False)
    test = make_claims(make_test(same_fraction=SAME)).claims[0].tests[0]
    assert check_fraction(test, [side, side], [limited]).margins == [limited]


def test_what_is_kept_stands_in_every_form_of_the_ledger():
    claims = judge(make_claims(make_test()), observed(pairs(BETTER, 0.126)))
    assert "tokens kept: ours 12.6 %, theirs 24.4 %" in as_text(claims, ["r"])
    (record,) = ledger_table(claims, ["r"]).records
    assert record["kept"] == "ours 12.6 %, theirs 24.4 %"
    (test,) = as_records(claims, ["r"])["claims"][0]["tests"]
    assert test["kv_fraction"] == pytest.approx({"ours": 0.126, "theirs": 0.244})
    # A recurrent reference routes nothing.
    claims = judge(make_claims(make_test()), observed(pairs(BETTER, 0.126, None)))
    assert kept_words(claims[0].tests[0]) == "ours 12.6 %"


def test_a_condition_that_is_younger_than_the_rows_is_marked():
    late = STATED + timedelta(days=2)
    for stated, marked in ((late, True), (None, False)):
        test = make_test(same_fraction={**SAME, "stated": stated})
        evidence = observed(pairs(BETTER, 0.25), started=STATED + timedelta(days=1))
        one = judge(make_claims(test), evidence)[0].tests[0]
        words = "rows are from before its condition on tokens kept was stated (2026-01-03)"
        assert (words in one.reason) == marked


MEMORY = {"experiment": "memory", "metric": "cache_bytes_allocated"}
OWN_LENGTH = {"where": MEMORY, "tolerance": 0.1, "own_length": True}


def with_memory(rows: list[Row], ours: float | None, x: float = 512.0) -> list[Row]:
    common = {**MEMORY, "x_value": x}
    return [
        *rows,
        make_row("ours", 105.0, kv_fraction=ours, **common),
        make_row("theirs", 100.0, kv_fraction=None, **common),
    ]


def of_bytes(rows: list[Row]) -> Judged:
    return judged(rows, same_fraction=None, same_metric=OWN_LENGTH)


def test_bytes_count_at_the_length_of_the_task():
    rows = pairs(BETTER, 0.25, None)
    assert of_bytes(with_memory(rows, 0.25)).verdict == SUPPORTED
    other = of_bytes(with_memory(rows, 0.25, x=2048.0))
    assert (other.verdict, other.blocked) == (INCONCLUSIVE, True)
    words = (
        "bytes differ on this task: they were matched at 2,048 tokens, its texts have 512 tokens"
    )
    assert words in other.reason


def test_rows_that_tell_no_length_have_no_bytes():
    rows = [row.model_copy(update={"x_name": "pairs"}) for row in pairs(BETTER, 0.25, None)]
    one = of_bytes(with_memory(rows, 0.25, x=2048.0))
    assert one.verdict == INCONCLUSIVE
    assert "at 2,048 tokens, its texts have a length that their rows do not give" in one.reason


@pytest.mark.parametrize(
    ("ours", "share", "expected"),
    [
        # 0.24 is within a tenth of the 0.25 at which bytes were matched.
        (BETTER, 0.24, SUPPORTED),
        (BETTER, 0.18, SUPPORTED),
        (WORSE, 0.18, INCONCLUSIVE),
        (BETTER, 0.32, INCONCLUSIVE),
        (WORSE, 0.32, REFUTED),
    ],
)
def test_bytes_move_with_the_tokens_kept(ours: list[float], share: float, expected: str):
    one = of_bytes(with_memory(pairs(ours, share, None), 0.25))
    assert one.verdict == expected
    words = {0.18: "ours with fewer bytes than were matched (18.0 % of tokens kept here, 25.0 %"}
    words[0.32] = words[0.18].replace("fewer", "more").replace("18.0", "32.0")
    assert words.get(share, "") in one.reason


def test_a_reference_that_keeps_more_than_was_matched_cannot_refute():
    rows = pairs(WORSE, 0.25, 0.4)
    rows = with_memory(rows, 0.25)
    rows[-1] = rows[-1].model_copy(update={"kv_fraction": 0.25})
    one = of_bytes(rows)
    assert one.verdict == INCONCLUSIVE
    assert "theirs with more bytes than were matched" in one.reason


def test_bytes_of_before_may_be_of_any_length():
    """Files without `own_length` are judged as they were."""
    same = {"where": MEMORY, "tolerance": 0.1}
    rows = with_memory(pairs(BETTER, 0.25, None), 0.25, x=2048.0)
    assert judged(rows, same_fraction=None, same_metric=same).verdict == SUPPORTED
