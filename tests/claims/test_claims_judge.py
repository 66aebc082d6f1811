from __future__ import annotations

import numpy as np
import pytest
from invented_claims import (
    TEXT,
    make_claims,
    make_row,
    make_test,
    observed,
    seeds_of,
    timing_rows,
)

from ham.claims.judge import (
    INCONCLUSIVE,
    NOT_RUN,
    REFUTED,
    SUPPORTED,
    Judged,
    JudgedClaim,
    judge,
)
from ham.report.rows import Row

DECIDED = {SUPPORTED, REFUTED}
THEIRS = [2.30, 2.31, 2.32]


def verdict_of(rows: list[Row], *tests: dict, **fields: object) -> Judged:
    claims = make_claims(*(tests or [make_test()]))
    return judge(claims, observed(rows, **fields))[0].tests[0]


def with_gain(gain: float, noise: float = 0.001) -> list[Row]:
    """Ours is better by `gain` bits per byte, with a little noise between seeds."""
    ours = [x - gain + e * noise for x, e in zip(THEIRS, (-1, 0, 1), strict=True)]
    return seeds_of("ours", ours) + seeds_of("theirs", THEIRS)


def test_superiority_by_hand():
    # Differences 0.051, 0.050, 0.049: mean 0.05, s = 0.001, half = 4.302653 * 0.001 / sqrt(3) =
    # 0.002484: [0.047516, 0.052484], wholly beyond 0.02.
    one = verdict_of(with_gain(0.05))
    assert (one.verdict, one.n) == (SUPPORTED, 3)
    assert one.effect.value == pytest.approx(0.05)
    assert (one.effect.low, one.effect.high) == pytest.approx((0.047516, 0.052484), abs=1e-6)
    assert (one.bound, one.decisive) == (0.02, "against theirs")


@pytest.mark.parametrize(
    ("gain", "noise", "kind", "expected"),
    [
        (0.05, 0.001, "superiority", SUPPORTED),
        (0.01, 0.001, "superiority", REFUTED),
        (0.05, 0.03, "superiority", INCONCLUSIVE),
        (-0.01, 0.001, "non_inferiority", SUPPORTED),
        (-0.05, 0.001, "non_inferiority", REFUTED),
        (-0.01, 0.03, "non_inferiority", INCONCLUSIVE),
    ],
)
def test_the_interval_decides(gain: float, noise: float, kind: str, expected: str):
    one = verdict_of(with_gain(gain, noise), make_test(test=kind))
    assert one.verdict == expected
    assert (one.settles_at is not None) == (expected == INCONCLUSIVE)


def test_pairs_remove_what_seeds_share():
    # Seeds differ by 0.5, pairs by 0.050 to 0.052.
    rows = seeds_of("ours", [1.95, 2.449, 2.948]) + seeds_of("theirs", [2.0, 2.5, 3.0])
    assert verdict_of(rows).verdict == SUPPORTED


def test_higher_is_better_for_accuracy_and_relative_effects():
    where = {"experiment": "needle", "metric": "accuracy"}
    delta = {"value": 0.1, "unit": "relative", "reason": "x"}
    fields = {"experiment": "needle", "metric": "accuracy"}
    rows = seeds_of("ours", [0.6, 0.61, 0.59], **fields)
    rows += seeds_of("theirs", [0.4, 0.4, 0.4], **fields)
    one = verdict_of(rows, make_test(where=where, delta=delta))
    # (0.6 - 0.4) / 0.4
    assert (one.verdict, one.effect.value) == (SUPPORTED, pytest.approx(0.5))


def test_every_reference_must_be_beaten():
    two = make_test(reference=[{"model": "theirs"}, {"model": "other"}])
    rows = with_gain(0.05)
    assert verdict_of(rows + seeds_of("other", THEIRS), two).verdict == SUPPORTED
    better = verdict_of(rows + seeds_of("other", [2.2, 2.21, 2.22]), two)
    assert (better.verdict, better.decisive) == (REFUTED, "against other")
    # Refutation by one of two parts is at half the level: 97.5 % instead of 95 %.
    assert better.level == pytest.approx(0.025)
    missing = verdict_of(rows, two)
    assert missing.verdict == NOT_RUN
    assert "with model 'other'; there are: ours, theirs" in missing.reason


def test_a_threshold_needs_no_reference():
    where = {"experiment": "mqar", "metric": "accuracy"}
    delta = {"value": 0.99, "unit": "share", "reason": "x"}
    test = make_test(test="threshold", where=where, delta=delta, reference=None)
    fields = {"experiment": "mqar", "metric": "accuracy"}
    assert verdict_of(seeds_of("ours", [1.0, 0.999, 1.0], **fields), test).verdict == SUPPORTED
    assert verdict_of(seeds_of("ours", [0.9, 0.91, 0.9], **fields), test).verdict == REFUTED


def curve(losses: list[float], noise: float = 0.0005) -> list[Row]:
    return [
        make_row("ours", loss + noise * seed, seed, x_value=float(index))
        for index, loss in enumerate(losses)
        for seed in range(3)
    ]


@pytest.mark.parametrize(
    ("losses", "largest", "expected"),
    [
        ([2.4, 2.3, 2.2, 2.1], None, SUPPORTED),
        ([2.4, 2.3, 2.2, 2.1], 0.5, SUPPORTED),
        ([2.4, 2.3, 2.39, 2.1], None, REFUTED),
        ([2.4, 2.395, 2.2, 2.195], 0.5, REFUTED),
        ([2.4, 2.3], None, INCONCLUSIVE),
    ],
)
def test_a_curve_without_bumps_and_cliffs(losses: list[float], largest: float, expected: str):
    test = make_test(test="monotone", reference=None, largest_step=largest)
    assert verdict_of(curve(losses), test).verdict == expected


def test_a_curve_through_several_arms():
    arms = [{"model": name} for name in ("none", "half", "all")]
    test = make_test(test="monotone", reference=None, arm=arms, points=3)
    rows = []
    for (name, loss), wobble in zip(
        (("none", 2.4), ("half", 2.3), ("all", 2.25)), (0.001, 0.002, 0.0), strict=True
    ):
        rows += seeds_of(name, [loss, loss + wobble, loss])
    one = verdict_of(rows, test)
    assert (one.verdict, one.decisive) == (SUPPORTED, "step half to all")


def decode(**changes: object) -> dict:
    where = {"experiment": "model_decode", "metric": "median_ms", "over": ["batch"]}
    delta = {"value": 1.5, "unit": "times", "reason": "x"}
    return make_test(test="timing", where={**where, **changes}, delta=delta)


def cells(*factors: float, **fields: object) -> list[Row]:
    return [row for i, f in enumerate(factors) for row in timing_rows(f, batch=i, **fields)]


@pytest.mark.parametrize(
    ("factors", "spread", "expected"),
    [
        ((2.0, 1.9, 1.8), 0.01, SUPPORTED),
        ((2.0, 1.9), 0.01, INCONCLUSIVE),
        ((2.0, 1.9, 1.2), 0.01, INCONCLUSIVE),
        ((2.0, 1.2, 1.2, 1.2), 0.01, REFUTED),
        ((1.2, 1.2), 0.01, INCONCLUSIVE),
        ((2.0, 1.9, 1.6), 0.05, INCONCLUSIVE),
    ],
)
def test_timings_are_judged_in_cells(factors: tuple, spread: float, expected: str):
    one = verdict_of(cells(*factors, spread=spread), decode())
    assert (one.verdict, one.n) == (expected, len(factors))


def test_the_range_of_a_factor_by_hand():
    # Ours 2 (1.9 to 2.1), theirs 4 (3.8 to 4.2): 3.8 / 2.1 = 1.809524, 4.2 / 1.9 = 2.210526.
    one = verdict_of(cells(2.0, 2.0, 2.0, spread=0.05), decode())
    assert one.effect.value == pytest.approx(2.0)
    assert (one.effect.low, one.effect.high) == pytest.approx((1.809524, 2.210526), abs=1e-6)


def test_repeats_of_a_timing_are_not_seeds():
    one = verdict_of(cells(2.0, n=1000), decode())
    assert (one.verdict, one.n) == (INCONCLUSIVE, 1)
    assert "at least 3 cells" in one.reason


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ({"correct": False}, "wrong or not compared"),
        ({"low": None, "high": None, "interval": None}, "no 20th to 80th percentile"),
    ],
)
def test_faulty_cells_do_not_count(fault: dict, words: str):
    rows = cells(2.0, 2.0, 2.0)
    rows[0] = rows[0].model_copy(update=fault)
    one = verdict_of(rows, decode())
    assert (one.verdict, one.n) == (INCONCLUSIVE, 2)
    assert words in one.reason


def test_sides_launched_differently_are_not_compared():
    rows = cells(2.0, 2.0, 2.0)
    rows[0] = rows[0].model_copy(update={"launch_mode": "eager"})
    assert "launched differently: eager, cuda_graph" in verdict_of(rows, decode()).reason


def test_bytes_in_labels_are_exact():
    one = verdict_of(cells(1.0, 1.0, 1.0), decode(label="kv_bytes"))
    assert (one.verdict, one.effect.value) == (SUPPORTED, 4.0)


def test_a_cell_measured_in_two_runs_counts_once():
    evidence = observed(cells(2.0, 2.0), "a") + observed(cells(2.0, 1.0), "b")
    one = judge(make_claims(decode()), evidence)[0].tests[0]
    assert one.n == 2
    assert one.effect.value == pytest.approx(1.0)


def test_a_family_counts_tests_that_were_not_run():
    absent = make_test(family="main", arm={"model": "absent"})
    run = make_test(family="main")
    alone = judge(make_claims(run), observed(with_gain(0.05)))[0].tests[0]
    among = judge(make_claims(run, absent, absent), observed(with_gain(0.05)))[0].tests[0]
    assert (alone.level, among.level) == (0.05, pytest.approx(0.05 / 3))
    assert among.p_adjusted == pytest.approx(3 * alone.p)
    assert among.effect.low < alone.effect.low


def test_holm_turns_a_lucky_test_inconclusive():
    lucky = with_gain(0.05, noise=0.008)
    assert verdict_of(lucky, make_test(family="main")).verdict == SUPPORTED
    many = [make_test(family="main")] + [make_test(family="main", arm={"model": "absent"})] * 9
    assert verdict_of(lucky, *many).verdict == INCONCLUSIVE


def test_a_claim_is_all_of_its_tests():
    def claim(*verdicts: str) -> str:
        tests = tuple(
            Judged(claim="A", test=None, verdict=verdict, n=3, level=0.05) for verdict in verdicts
        )
        return JudgedClaim(None, tests).verdict

    assert claim(SUPPORTED, SUPPORTED) == SUPPORTED
    assert claim(SUPPORTED, REFUTED, NOT_RUN) == REFUTED
    assert claim(SUPPORTED, NOT_RUN) == claim(SUPPORTED, INCONCLUSIVE) == INCONCLUSIVE
    assert claim(NOT_RUN, NOT_RUN) == NOT_RUN


def test_nothing_decides_below_three_seeds():
    random = np.random.default_rng(1)
    for _ in range(100):
        n = int(random.integers(0, 3))
        gain = float(random.normal(0, 10))
        rows = seeds_of("ours", list(2.0 - gain + random.normal(0, 1e-9, size=n)))
        rows += seeds_of("theirs", [2.0] * int(random.integers(0, 6)))
        kind = str(random.choice(["superiority", "non_inferiority"]))
        assert verdict_of(rows, make_test(test=kind)).verdict not in DECIDED


def test_a_missing_row_or_a_failed_one_never_decides():
    """Whatever is taken away from three seeds on a grid of two, nothing is decided."""
    full = [
        make_row(model, loss + 0.001 * seed, seed, x_value=float(x))
        for model, loss in (("ours", 2.0), ("theirs", 2.3))
        for seed in range(3)
        for x in (1, 2)
    ]
    assert verdict_of(full).verdict == SUPPORTED
    for index, row in enumerate(full):
        without = full[:index] + full[index + 1 :]
        assert verdict_of(without).verdict not in DECIDED
        failed = row.model_copy(update={"value": None, "error": "diverged"})
        one = verdict_of([*without, failed])
        assert one.verdict == INCONCLUSIVE
        assert f"{row.model}, seed {row.seed} failed: diverged" in one.reason


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ({**TEXT, "experiment": "mqar"}, "no rows with experiment 'mqar'; there are: language_mod"),
        ({**TEXT, "metric": "loss_nats"}, "with metric 'loss_nats'; there are: bits_per_byte"),
        ({**TEXT, "task": "poems"}, "with task 'poems'; there are: text"),
        ({**TEXT, "x": 7}, "with x 7; there are: 512"),
        ({**TEXT, "from_x": 1024}, "with x from 1024 on; there are: 512"),
        ({**TEXT, "labels": {"filler": "blank"}}, "with label filler 'blank'; there are: None"),
        ({**TEXT, "config": "h100"}, "with configuration 'h100'; there are: None"),
    ],
)
def test_a_query_that_matches_nothing_says_what_there_is(where: dict, words: str):
    unit = "nats" if where["metric"] == "loss_nats" else "bits per byte"
    test = make_test(where=where, delta={"value": 0.1, "unit": unit, "reason": "x"})
    one = verdict_of(with_gain(0.05), test)
    assert one.verdict == NOT_RUN
    assert words in one.reason


def test_no_rows_at_all():
    assert verdict_of([]).verdict == NOT_RUN


def test_an_ambiguous_query_decides_nothing():
    rows = with_gain(0.05)
    rows += [row.model_copy(update={"labels": {"depth": 0.5}}) for row in rows]
    one = verdict_of(rows)
    assert one.verdict == INCONCLUSIVE
    assert "differ in depth; name a label under `labels` or `over`" in one.reason
    assert verdict_of(rows, make_test(where={**TEXT, "over": ["depth"]})).verdict == SUPPORTED


def test_the_tuned_rate_is_no_coordinate():
    rows = seeds_of("ours", [2.0, 2.01, 2.0], labels={"learning_rate": 0.001})
    rows += seeds_of("theirs", THEIRS, labels={"learning_rate": 0.004})
    assert verdict_of(rows).verdict == SUPPORTED


def test_smoke_runs_decide_nothing_and_never_mix_with_others():
    smoke = verdict_of(with_gain(0.05), smoke=True)
    assert smoke.verdict == INCONCLUSIVE
    assert "smoke run" in smoke.reason
    both = observed(with_gain(0.05), "full") + observed(with_gain(-5.0), "demo", smoke=True)
    one = judge(make_claims(make_test()), both)[0].tests[0]
    assert (one.verdict, one.runs) == (SUPPORTED, ("full",))


def test_rows_of_several_runs_are_not_pooled():
    both = observed(with_gain(0.05), "a") + observed(with_gain(0.05), "b")
    one = judge(make_claims(make_test()), both)[0].tests[0]
    assert one.verdict == INCONCLUSIVE
    assert "several runs have such rows (a and b)" in one.reason
    apart = observed(seeds_of("ours", [2.0] * 3), "a") + observed(seeds_of("theirs", THEIRS), "b")
    split = judge(make_claims(make_test()), apart)[0].tests[0]
    assert (split.verdict, split.reason) == (NOT_RUN, "no run has rows of all of ours and theirs")


def test_two_configurations_in_one_run_are_not_mixed():
    rows = with_gain(0.05)
    rows += [row.model_copy(update={"config_hash": "other"}) for row in rows]
    assert "differ in the hash of their configuration" in verdict_of(rows).reason


def test_nothing_is_relative_to_zero():
    delta = {"value": 0.1, "unit": "relative", "reason": "x"}
    rows = seeds_of("ours", [1.0, 1.1, 1.2]) + seeds_of("theirs", [0.0, 1.0, 1.0])
    one = verdict_of(rows, make_test(delta=delta))
    assert one.verdict == INCONCLUSIVE
    assert "a reference is 0" in one.reason


def test_bytes_must_agree_where_that_is_asked():
    memory = {"experiment": "memory", "metric": "cache_bytes_allocated"}
    test = make_test(same_metric={"where": memory, "tolerance": 0.1})
    rows = with_gain(0.05)
    one = verdict_of(rows, test)
    assert one.verdict == INCONCLUSIVE
    assert "cache_bytes_allocated of ours cannot be compared: no rows" in one.reason
    rows.append(make_row("ours", 105.0, **memory))
    assert verdict_of([*rows, make_row("theirs", 100.0, **memory)], test).verdict == SUPPORTED
    unequal = verdict_of([*rows, make_row("theirs", 200.0, **memory)], test)
    assert unequal.verdict == INCONCLUSIVE
    assert "differs by 47.5 %: ours 105, theirs 200; allowed 10 %" in unequal.reason


@pytest.mark.parametrize("level", [0.0, 1.0])
def test_a_task_that_tells_nothing_apart_refutes_nothing(level: float):
    where = {"experiment": "needle", "metric": "accuracy"}
    test = make_test(where=where, delta={"value": 0.05, "unit": "share", "reason": "as an example"})
    ours, theirs = test["arm"]["model"], test["reference"][0]["model"]

    def judged(values: list[float]) -> Judged:
        rows = seeds_of(ours, values, **where) + seeds_of(theirs, [level] * 3, **where)
        return verdict_of(rows, test)

    assert judged([level] * 3).verdict == "inconclusive"
    assert f"every model has {level:g} with every seed" in judged([level] * 3).reason
    # One answer that differs, and the interval decides again.
    assert judged([level, level, abs(level - 0.01)]).verdict == "refuted"
