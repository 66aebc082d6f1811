"""Threats to validity that are computed from configurations and seeds."""

from __future__ import annotations

import pytest

from ham.report.aggregate import Results
from ham.report.needle_seeds import bimodal, seeds_that_find
from ham.report.rows import Row
from ham.report.threats import threats

SETTINGS = {"data": {}, "arms": [{"name": "chance", "options": {"score": "random"}}]}


def row(seed: int, experiment: str, metric: str, value: float, **fields) -> Row:
    common = {"model": "chance", "mixer": "ham", "device": "CPU", "manifest_id": f"m{seed}"}
    return Row(**common, experiment=experiment, metric=metric, value=value, seed=seed, **fields)


def trained(seeds: int) -> list[Row]:
    place = {"task": "train", "x_name": "step", "x_value": 1}
    return [row(seed, "train", "loss_nats", 1.0, **place) for seed in range(seeds)]


def needles(*shares: float, task: str = "single", length: int = 1024) -> list[Row]:
    place = {"task": task, "x_name": "length", "x_value": length, "labels": {"depth": 0.5}, "n": 20}
    return [row(seed, "needle", "accuracy", share, **place) for seed, share in enumerate(shares)]


def configured(*options: dict) -> dict[str, dict]:
    return {
        f"m{seed}": {"config": {"arms": [{"name": "chance", "options": one}]}}
        for seed, one in enumerate(options)
    }


RANDOM = {"score": "random"}


@pytest.mark.parametrize(
    ("manifests", "said"),
    [
        ({}, True),
        (configured(RANDOM, RANDOM), True),
        (configured({**RANDOM, "routing_seed": 3}, {**RANDOM, "routing_seed": 3}), True),
        (configured({**RANDOM, "routing_seed": 0}, {**RANDOM, "routing_seed": 1}), False),
        (configured({"score": "cosine"}, {"score": "cosine"}), False),
    ],
)
def test_one_routing_hash_for_all_seeds_is_said(manifests, said):
    text = threats(Results(trained(2)), SETTINGS, manifests)
    assert ("Control: chance route by one hash" in text) is said


def test_a_hash_that_follows_the_seed_of_training_is_no_threat():
    rows = trained(2) + [row(seed, "train", "routing_seed", seed) for seed in range(2)]
    assert "Control" not in threats(Results(rows), SETTINGS, configured(RANDOM, RANDOM))
    same = trained(2) + [row(seed, "train", "routing_seed", 4) for seed in range(2)]
    assert "Control: chance" in threats(Results(same), SETTINGS, configured(RANDOM, RANDOM))


def test_a_single_seed_has_no_spread_to_mislead():
    assert "Control" not in threats(Results(trained(1)), SETTINGS, {})


def test_seeds_of_two_kinds_are_counted_and_said():
    results = Results(needles(0.9, 0.05, 0.1) + needles(0.0, 0.0, 0.0, length=4096))
    assert seeds_that_find(results, "chance").words == "1 of 3"
    assert bimodal(results) == ["chance"]
    text = threats(results, SETTINGS, {})
    assert "more than half of the needles at the shortest length: chance 1 of 3;" in text


def test_seeds_alike_are_not_of_two_kinds():
    for shares in ((0.9, 0.8, 0.7), (0.05, 0.1, 0.0), (0.6, 0.4, 0.5)):
        results = Results(needles(*shares))
        assert bimodal(results) == []
        assert "Needles" not in threats(results, SETTINGS, {})


def test_a_seed_counts_by_the_task_that_it_does_best():
    results = Results(needles(0.9, 0.0) + needles(0.1, 0.8, task="other"))
    assert seeds_that_find(results, "chance").words == "2 of 2"
