"""What counts as a difference: noise by rule, practical threshold, direction."""

from __future__ import annotations

import math

import pytest

from ham.compare.cells import Key, Pair, match
from ham.compare.judge import better_direction, independent_difference, judge
from ham.report.rows import Row
from ham.report.statistics import wilson_interval


def row(metric: str = "bits_per_byte", value: float | None = 1.0, **fields: object) -> Row:
    common = {"experiment": "x", "model": "m", "mixer": "m", "device": "CPU"}
    return Row(metric=metric, value=value, **{**common, **fields})


def spread(low: float, high: float, interval: str = "p20_p80") -> dict:
    return {"low": low, "high": high, "interval": interval}


def pair(one: list[Row], other: list[Row]) -> Pair:
    (only,) = match(one, other).pairs
    return only


def test_shares_by_newcombes_worked_example() -> None:
    # Newcombe 1998, table II, column (a), method 10: 56/70 against 48/80 is 0.2000, interval 0.0524
    # to 0.3339; column (h): 10/10 against 0/10 is 1, interval 0.6075 to 1.
    for left, right, low, high in (
        ((48, 80), (56, 70), 0.0524, 0.3339),
        ((0, 10), (10, 10), 0.6075, 1.0),
    ):
        found = independent_difference(wilson_interval(*left), wilson_interval(*right))
        assert found == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(
    ("successes", "verdict"), [(48, "same"), (52, "noise"), (64, "better"), (30, "worse")]
)
def test_counts_are_judged_by_wilson(successes: int, verdict: str) -> None:
    def counted(count: int) -> Row:
        found = wilson_interval(count, 80)
        ends = spread(found.low, found.high, found.interval)
        return row("accuracy", found.value, n=80, seed=0, **ends)

    found = judge(pair([counted(48)], [counted(successes)]), 0.02)
    assert found.verdict == verdict and found.noise.rule == "wilson95"


def test_seeds_are_paired() -> None:
    # Differences 0.1, 0.2, 0.3: mean 0.2, s = 0.1, t(2) = 4.302653, half = 0.248414.
    one = [row(value=value, seed=seed) for seed, value in enumerate((1.0, 2.0, 3.0))]
    other = [row(value=value, seed=seed) for seed, value in enumerate((1.1, 2.2, 3.3))]
    found = judge(pair(one, other), 0.02)
    assert (found.noise.low, found.noise.high) == pytest.approx((-0.048414, 0.448414), abs=1e-6)
    assert found.verdict == "noise" and found.noise.rule == "paired t, 3 seeds"
    assert found.relative == pytest.approx(0.1)
    # The same differences in size, but steady: an unpaired test would drown them in the seeds.
    steady = [row(value=value + 0.2, seed=seed) for seed, value in enumerate((1.0, 2.0, 3.0))]
    found = judge(pair(one, steady), 0.02)
    assert found.verdict == "worse" and found.noise.beyond


def test_only_common_seeds_are_paired() -> None:
    one = [row(value=value, seed=seed) for seed, value in enumerate((1.0, 1.0, 9.0))]
    other = [row(value=1.5, seed=seed) for seed in range(2)]
    found = judge(pair(one, other), 0.02)
    assert found.relative == pytest.approx(0.5) and found.verdict == "worse"
    assert found.notes == ("seeds 0 1 2 → 0 1",)


@pytest.mark.parametrize(
    ("value", "low", "high", "verdict"),
    [
        (1.5, 1.4, 1.6, "worse"),
        (1.5, 1.05, 1.6, "noise"),
        (0.5, 0.4, 0.6, "better"),
        (1.019, 1.015, 1.02, "small"),
        (1.0, 0.95, 1.01, "same"),
    ],
)
def test_times_are_judged_by_their_percentiles(
    value: float, low: float, high: float, verdict: str
) -> None:
    before = row("decode_ms", 1.0, **spread(0.9, 1.01 if verdict == "small" else 1.1))
    assert judge(pair([before], [row("decode_ms", value, **spread(low, high))]), 0.02).verdict == (
        verdict
    )


@pytest.mark.parametrize(
    ("metric", "verdict"),
    [
        ("tokens_per_second", "unjudged"),
        ("wall_seconds", "unjudged"),
        ("kv_bytes", "worse"),
        ("loss_nats", "worse"),
        ("accuracy_norm", "better"),
        ("routed_precision", "better"),
        ("kv_fraction", "changed"),
        ("chance_accuracy", "changed"),
        ("smoothed_loss_difference_nats", "changed"),
    ],
)
def test_without_a_spread_only_times_cannot_be_judged(metric: str, verdict: str) -> None:
    assert judge(pair([row(metric, 1.0)], [row(metric, 1.1)]), 0.02).verdict == verdict


def test_every_metric_of_a_claim_has_a_direction() -> None:
    higher = ("accuracy", "tokens_per_second", "copy_gb_per_second", "matmul_tflop_per_second")
    assert {better_direction(metric) for metric in higher} == {"higher"}
    lower = ("median_ms", "peak_memory_bytes", "bits_per_byte", "word_perplexity", "loss_nats")
    assert {better_direction(metric) for metric in lower} == {"lower"}


def test_from_zero_any_change_is_beyond_the_threshold() -> None:
    found = judge(pair([row("kv_bytes", 0.0)], [row("kv_bytes", 8.0)]), 0.5)
    assert math.isinf(found.relative) and found.verdict == "worse"


def test_what_else_differs_is_noted() -> None:
    one = row("median_ms", 1.0, kv_fraction=0.25, launch_mode="cuda_graph", provider="triton")
    other = row("median_ms", 1.0, kv_fraction=0.5)
    found = judge(pair([one], [other]), 0.02)
    assert found.notes == ("triton cuda_graph → torch eager", "KV fraction 0.25 → 0.5")


def test_a_failed_side_has_no_difference() -> None:
    assert judge(pair([row()], [row(value=None, error="broken")]), 0.02) is None


def test_labels_that_were_found_out_do_not_separate_rows() -> None:
    asked = {"fraction": 0.25, "mode": "forward"}
    one = row("forward_ms", labels={**asked, "floor_ms": 0.1, "error d k": 1e-3, "guard": "x"})
    other = row("forward_ms", labels={**asked, "tokens_per_s": 5.0, "worst_tensor": "d k"})
    (only,) = match([one], [other]).pairs
    assert only.key.labels == (("fraction", 0.25), ("mode", "forward"))
    assert len(match([one], [row("forward_ms", labels={**asked, "fraction": 0.5})]).pairs) == 2


def test_providers_separate_rows_only_where_a_run_has_several() -> None:
    torch, triton = row(provider="torch"), row(provider="triton")
    assert match([torch], [triton]).pairs[0].key.variant is None
    pairs = match([torch, triton], [triton]).pairs
    assert [(p.key.variant, len(p.one), len(p.other)) for p in pairs] == [
        (("torch", "eager"), 1, 0),
        (("triton", "eager"), 1, 1),
    ]


def test_repeated_rows_are_counted_and_the_last_holds() -> None:
    found = match([row(value=1.0), row(value=2.0)], [row(value=2.0)])
    assert found.repeated == (1, 0)
    assert judge(found.pairs[0], 0.0).verdict == "same"


def test_a_key_in_words() -> None:
    key = Key("x", "m", "forward_ms", "T1", "context", 64.0, (("mode", "f"),), ("torch", "eager"))
    assert key.words == "x: forward_ms, T1, context 64, mode f, torch, eager"
