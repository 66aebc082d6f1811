"""Learning-rate schedule by hand, and which parameters decay."""

from __future__ import annotations

import pytest

from ham.config import TrainConfig
from ham.train.optimiser import learning_rate, make_optimiser


def test_schedule_by_hand() -> None:
    config = TrainConfig(steps=101, learning_rate=1.0, warmup_fraction=0.1)
    # 10 warm-up steps, then cosine from 1 to 0.1 over steps 10..100; the middle is step 55.
    assert learning_rate(0, config) == pytest.approx(0.1)
    assert learning_rate(9, config) == pytest.approx(1.0)
    assert learning_rate(10, config) == pytest.approx(1.0)
    assert learning_rate(55, config) == pytest.approx(0.55)
    assert learning_rate(100, config) == pytest.approx(0.1)


def test_schedule_without_warmup_starts_at_the_peak() -> None:
    config = TrainConfig(steps=10, learning_rate=2.0, warmup_fraction=0.0)
    assert learning_rate(0, config) == 2.0
    assert learning_rate(9, config) == pytest.approx(0.2)


def test_only_matrices_decay(tiny_model) -> None:
    model = tiny_model("ham")
    decayed, free = make_optimiser(model, TrainConfig(weight_decay=0.3)).param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert decayed["weight_decay"] == 0.3
    assert free["weight_decay"] == 0.0
    assert {names[id(p)] for p in decayed["params"]} == {
        name
        for name in names.values()
        if (name.endswith("weight") and "norm" not in name) or name == "embedding.weight"
    }
    assert len(decayed["params"]) + len(free["params"]) == len(names)
