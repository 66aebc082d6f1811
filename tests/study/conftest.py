"""A study small enough for tests."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

from ham.study.config import MqarConfig, parse_mqar_config

TINY = {
    "name": "tiny",
    "seeds": [0],
    "learning_rates": [0.01],
    "tasks": [{"filler": "blank"}],
    "widths": [32],
    "vocabulary_size": 64,
    "arms": [{"name": "ham-committed", "mixer": "ham", "options": {"score": "committed"}}],
    "train": {
        "steps": 6,
        "batch_size": 4,
        "mixture": [{"length": 16, "pairs": 2, "weight": 2}, {"length": 32, "pairs": 4}],
    },
    "evaluate": {
        "examples": 10,
        "batch_size": 4,
        "sizes": [{"length": 16, "pairs": 2}, {"length": 32, "pairs": 8}],
    },
}


@pytest.fixture
def tiny_values() -> dict[str, Any]:
    """The configuration of `tiny_study` as a file has it."""
    return copy.deepcopy(TINY)


@pytest.fixture
def tiny_study() -> Callable[..., MqarConfig]:
    """`tiny_study(seeds=[1], train={"steps": 3})`: sections are merged, other keys replaced."""

    def make(**changes: Any) -> MqarConfig:
        merged = {**TINY, **changes}
        for section in ("train", "evaluate"):
            merged[section] = {**TINY[section], **changes.get(section, {})}
        return parse_mqar_config(merged, source="test")

    return make
