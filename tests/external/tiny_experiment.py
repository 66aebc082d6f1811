"""A small experiment around one arm that is not of this project."""

from __future__ import annotations

from typing import Any

from ham.config import Config
from ham.config_files import parse_config

WORDS = ("the", "whale", "and", "a", "ship", "of", "old", "men", "sailed", "upon", "that", "sea")
TINY = {
    "name": "tiny",
    "data": {"context": 32, "recall_fraction": 0.0},
    "model": {"layers": 2, "width": 32, "heads": 2, "max_positions": 1024},
    "train": {"steps": 2, "batch_size": 2, "validation_batches": 1, "calibration_batches": 1},
    "evaluate": {
        "language_modelling": {"tokens": 128, "contexts": [32], "position_bins": 2},
        "lm_eval": None,
        "needle": {"tasks": ["niah_single_1"], "depths": [0.5], "samples": 1, "generate": True},
        "recall": {"pairs": [2], "samples": 2},
        "dial": None,
    },
    "measure": {"contexts": [24, 48], "decode_tokens": 2, "repeats": 1, "warmup": 1},
}


def experiment(*arms: dict[str, Any], **changes: Any) -> Config:
    """A configuration whose first arm is a transformer of this project."""
    values = {**TINY, **changes, "arms": [{"name": "own", "mixer": "transformer"}, *arms]}
    return parse_config(values)


def external_arm(model_type: str, library: str = "transformers", **config: Any) -> dict[str, Any]:
    """An arm called `other`."""
    return {
        "name": "other",
        "external": {"library": library, "model_type": model_type, "config": config},
    }
