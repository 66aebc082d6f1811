"""A small experiment around one arm that is not of this project."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ham.cli import main
from ham.config import Config
from ham.config_files import parse_config
from ham.report.rows import Row, read_rows

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


def run_stages(
    path: str, data: Path, folder: Path, checkpoint: bool = True
) -> dict[str, list[Row]]:
    """Rows of `ham train`, `ham evaluate` and `ham measure` for the arm `other`."""
    common = [path, "--arm", "other", "--seed", "0", "--data", str(data), "--keep-going"]
    where = ["--checkpoint", str(folder / "checkpoint")] if checkpoint else []
    if checkpoint:
        state = ["--state", str(folder / "state")]
        assert main(["train", *common, "--out", str(folder), *state]) == 0
    for stage in ("evaluate", "measure"):
        rows = folder / f"{stage}.rows.jsonl"
        assert main([stage, *common, *where, "--rows", str(rows)]) == 0
    return {file.name.split(".")[0]: read_rows(file) for file in folder.glob("*.rows.jsonl")}


def checkpoint_arm(folder: Path) -> dict[str, str]:
    """An arm called `other` that reads a folder."""
    return {"name": "other", "checkpoint": str(folder)}
