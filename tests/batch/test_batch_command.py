"""`ham batch` on a real arm, and the workflow that calls it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from ham.cli import main
from ham.files import read_json
from ham.report.rows import read_rows

TINY = {
    "name": "tiny",
    "device": "cpu",
    "data": {"context": 32},
    "model": {"layers": 1, "width": 16, "heads": 2, "max_positions": 2048},
    "arms": [
        {"name": "plain", "mixer": "transformer", "seeds": [0, 1]},
        {"name": "broken", "mixer": "transformer", "options": {"kv_heads": 3}},
    ],
    "train": {"steps": 2, "batch_size": 2, "validation_batches": 1, "calibration_batches": 1},
    "evaluate": {
        "language_modelling": {"tokens": 256, "contexts": [32], "position_bins": 2},
        "lm_eval": None,
        "needle": None,
        "recall": None,
        "dial": None,
    },
    "measure": None,
    "workflow": {"jobs_per_process": 20},
}


def test_arms_run_in_one_process_and_a_failing_one_leaves_error_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(yaml.safe_dump(TINY))
    data = "results/runs/tiny/data"
    assert main(["prepare", "tiny.yaml", "--out", data]) == 0
    assert main(["batch", "tiny.yaml", "--number", "0", "--done", "done.json"]) == 0
    assert "6 jobs done, 0 were done before" in capsys.readouterr().out
    assert len(read_json("done.json")["jobs"]) == 6
    models = Path("results/runs/tiny/models")
    rows = read_rows(sorted(models.glob("*/seed*/*.rows.jsonl")))
    assert {row.model for row in rows if row.error} == {"broken"}
    assert {row.seed for row in rows if row.model == "plain"} == {0, 1}
    manifest = json.loads((models / "plain/seed1/train.manifest.json").read_text())
    # The command that does this job alone, not that of the batch.
    assert manifest["command"][1:6] == [
        "train",
        "results/runs/tiny/config.yaml",
        "--arm",
        "plain",
        "--seed",
    ]
    gap = [row for row in rows if row.model == "plain" and row.task == "training_text"]
    assert [row.x_value for row in gap] == [2, 2]
    assert main(["batch", "tiny.yaml", "--number", "0"]) == 0
    assert "0 jobs done, 6 were done before" in capsys.readouterr().out
    assert main(["batch", "tiny.yaml", "--number", "1"]) == 2
    assert "unknown batch 1; known: 0" in capsys.readouterr().err
