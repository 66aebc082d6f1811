"""The answer of a full run: words follow from numbers, verdicts and what the configuration says."""

from __future__ import annotations

from datetime import datetime
from types import SimpleNamespace

import pytest

from ham.claims.evidence import Evidence, Observation
from ham.report.aggregate import Results
from ham.report.answer import answer
from ham.report.rows import Row
from ham.report.speed_words import launch_words, speed_note, sweep_ratios

SETTINGS = {
    "data": {"context": 2048, "tokenizer": "byte"},
    "arms": [
        {"name": "full", "mixer": "transformer", "options": {}},
        {"name": "conv", "mixer": "transformer", "options": {"short_conv": 4}},
        {"name": "mixed", "mixer": "transformer", "options": {}, "placement": {"every": 4}},
        {"name": "routed", "mixer": "ham", "options": {"score": "cosine", "target": 0.25}},
        {"name": "chance", "mixer": "ham", "options": {"score": "random", "target": 0.25}},
        {"name": "window", "mixer": "gated_delta_rule_window", "options": {"window": 516}},
        {"name": "wide", "mixer": "gated_delta_rule_window", "options": {"window": 1032}},
    ],
}
BITS = {"full": 1.8, "conv": 1.5, "mixed": 1.6, "routed": 1.5, "chance": 1.6, "window": 1.5}
RECALL = {"full": 0.04, "conv": 0.9, "mixed": 0.9, "routed": 0.9, "chance": 0.6, "window": 0.9}
KEPT = {"full": 1.0, "routed": 0.135, "chance": 0.244}
MEBIBYTES = {"full": 16, "routed": 4.8, "chance": 4.6, "window": 4.6, "wide": 8.6}
# Seeds of a pair that differ by more than their own spread are told apart.
NOISE = {"routed": (0.0, 0.01, 0.02), "chance": (0.0, 0.01, 0.02)}
OTHER_NOISE = (0.02, 0.0, 0.01)


def row(model: str, seed: int, experiment: str, metric: str, value: float, **fields) -> Row:
    return Row(
        experiment=experiment,
        metric=metric,
        value=value,
        model=model,
        mixer="m",
        device="CPU",
        seed=seed,
        **fields,
    )


def rows(bits: dict[str, float] = BITS, recall: dict[str, float] = RECALL) -> list[Row]:
    made = []
    for model, value in bits.items():
        for seed in range(3):
            noise = NOISE.get(model, OTHER_NOISE)[seed]
            place = {"x_name": "context", "x_value": 2048}
            text = ("language_modelling", "bits_per_byte", value + noise)
            made.append(row(model, seed, *text, **place))
            place = {"x_name": "pairs", "x_value": 64, "n": 100, "kv_fraction": KEPT.get(model)}
            made.append(row(model, seed, "recall", "accuracy", recall[model] + noise, **place))
    for model, size in MEBIBYTES.items():
        place = {"task": "decode", "x_name": "context", "x_value": 2048}
        size = size * 2.0**20
        made.append(row(model, 0, "memory", "cache_bytes_allocated", size, **place))
    return made


def verdict(claim: str, other: str, said: str) -> SimpleNamespace:
    test = SimpleNamespace(
        where=SimpleNamespace(experiment="language_modelling", metric="bits_per_byte"),
        arms=[SimpleNamespace(name="routed", model="routed")],
        reference=[SimpleNamespace(name=other, model=other)],
    )
    return SimpleNamespace(tests=(SimpleNamespace(claim=claim, test=test, verdict=said),))


def said(made: list[Row], judged=(), evidence: Evidence | None = None) -> dict[str, str]:
    return dict(answer(Results(made), SETTINGS, judged, evidence or Evidence()))


def test_quality_is_told_where_seeds_tell_and_undecided_elsewhere():
    text = said(rows())["Quality"]
    assert text.startswith("With a quarter of the tokens in its cache, routed needs 1.510 bits")
    assert "fewer than full (1.810; −0.300 ± " in text
    assert "undecided against conv, which has HAM's short convolution (1.510; " in text
    assert "mixed" not in text


def test_a_transformer_that_recalls_nothing_is_no_yardstick():
    text = said(rows())["Quality"]
    assert "routed" in text and "It recalls 91.0 % of 64 pairs: undecided against conv" in text
    assert "full itself recalls 5.0 % of 64 pairs, so it is no yardstick there." in text
    good = said(rows(recall={**RECALL, "full": 0.5}))["Quality"]
    assert "yardstick" not in good
    assert "higher than full (51.0 %; +40.0 ± 4.3 points, n=3)" in good


def test_an_inconclusive_claim_leaves_a_difference_undecided():
    supported = said(rows(), [verdict("P1", "full", "supported")])["Quality"]
    assert "fewer than full (1.810; −0.300 ± 0.043, n=3; P1)" in supported
    text = said(rows(), [verdict("P1", "full", "inconclusive")])["Quality"]
    assert "undecided against full (1.810; −0.300 ± 0.043, n=3; P1)" in text


def test_two_seeds_decide_nothing():
    few = [one for one in rows() if one.seed != 2]
    assert "undecided against full" in said(few)["Quality"]


def test_which_tokens_names_the_share_kept_of_these_documents():
    text = said(rows())["Which tokens"]
    assert "Against random tokens (chance): bits per byte fewer (1.610; −0.100 ± " in text
    assert "recall of 64 pairs higher (61.0 %; +30.0 ± 0.0 points, n=3)" in text
    assert "where routed keeps 13.5 % of the tokens and chance 24.4 %" in text


def test_a_window_of_as_many_bytes_may_hold_whole_documents():
    text = said(rows(bits={**BITS, "wide": 1.5}, recall={**RECALL, "wide": 0.9}))["Which tokens"]
    assert "Against the last tokens in as many bytes (window)" in text
    assert "the window of 516 tokens all" in text
    assert "wide" not in text


def test_without_an_arm_at_a_quarter_there_is_no_answer():
    assert said([one for one in rows() if one.model != "routed"]) == {}


def speed(model: str, task: str, rate: float, **fields) -> Row:
    place = {"task": task, "x_name": "context", "x_value": 2048, "labels": {"batch_size": 1}}
    return row(model, 0, "throughput", "tokens_per_second", rate, **place, **fields)


def swept(model: str, ms: float, run: str, day: int, **labels) -> Observation:
    one = Row(
        experiment="model_decode",
        metric="median_ms",
        value=ms,
        model=model,
        mixer="m",
        device="GPU",
        launch_mode="cuda_graph",
        parameters=2_000_000,
        x_name="context",
        x_value=4096,
        labels={"batch": 8, "head_dim": 64, "heads": 2, **labels},
    )
    return Observation(one, run, started=datetime(2026, 1, day))


ROUTED = {"fraction": 0.25, "routing": "forced"}


def test_cost_names_memory_launch_mode_and_the_latest_sweep():
    times = [
        speed("full", "train", 200.0),
        speed("routed", "train", 100.0),
        speed("full", "decode", 100.0),
        speed("routed", "decode", 25.0),
    ]
    sweeps = [
        swept("ham", 9.0, "evidence/old", 1, **ROUTED),
        swept("transformer", 1.0, "evidence/old", 1),
        swept("ham", 2.0, "evidence/new", 2, **ROUTED),
        swept("ham", 1.0, "evidence/new", 2, fraction=0.5, routing="forced"),
        swept("transformer", 3.0, "evidence/new", 2),
    ]
    text = said(rows() + times, evidence=Evidence(tuple(sweeps)))["Cost"]
    assert text == (
        "After 2,048 tokens routed decodes with 4.80 MiB, full with 16.0 MiB. Launched eagerly, "
        "one sequence, without CUDA graphs, at 2,048 tokens: a training step runs at 0.50 and "
        "decoding at 0.25 times the speed of full. With CUDA graphs, in a sweep over models of "
        "2.000 M parameters that are forced to route 25.0 %: decoding at 1.50 times (4,096 tokens, "
        "batch 8) the transformer's speed."
    )


def test_ratios_compare_only_what_was_measured_alike():
    alike = [swept("ham", 2.0, "r", 1, **ROUTED).row, swept("transformer", 3.0, "r", 1).row]
    other = swept("transformer", 1.0, "r", 1, heads=4).row
    assert [ratio.value for ratio in sweep_ratios([*alike, other], 0.25)] == [1.5]
    assert sweep_ratios(alike, 0.5) == []


@pytest.mark.parametrize(
    ("mode", "batch", "words"),
    [
        ("eager", 1, "launched eagerly, one sequence, without CUDA graphs"),
        ("cuda_graph", 4, "replayed as CUDA graphs, batch 4"),
    ],
)
def test_launch_mode_and_batch_are_those_of_the_rows(mode, batch, words):
    one = speed("full", "decode", 1.0, launch_mode=mode)
    one = one.model_copy(update={"labels": {"batch_size": batch}})
    assert launch_words(Results([one])) == words
    assert launch_words(Results([])) == ""


def test_a_caption_points_at_the_sweep_only_where_there_is_one():
    eager = Results([speed("full", "decode", 1.0)])
    assert "sweep" not in speed_note(eager, Evidence())
    note = speed_note(eager, Evidence((swept("ham", 2.0, "x/evidence/day", 1, **ROUTED),)))
    assert "Launched eagerly, one sequence, without CUDA graphs." in note
    assert "sweep with CUDA graphs (`evidence/day`, page `sweep.md` of the same name)" in note
