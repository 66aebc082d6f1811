"""`ham evaluate` from end to end: rows, failures at their coordinates, faults of the user."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from ham.cli import main
from ham.evaluate import recall
from ham.files import read_json, read_jsonl
from ham.model.checkpoint import save_model
from ham.report.rows import read_rows

EVALUATE: dict[str, Any] = {
    "language_modelling": {"tokens": 1280, "contexts": [64, 128], "position_bins": 2},
    "lm_eval": {"tasks": ["held_out_continuation"], "limit": 2},
    "needle": {"tasks": ["niah_single_1"], "lengths": [480], "depths": [0.5], "samples": 2},
    "recall": {"pairs": [2], "samples": 2},
    "dial": {"fractions": [0.5], "tokens": 1280},
}


@pytest.fixture
def evaluate(tiny_model, tmp_path: Path, data_folder: Path) -> Callable[..., int]:
    """Run the command on a tiny HAM; keyword arguments replace parts of its configuration."""
    save_model(tmp_path / "checkpoint", tiny_model("ham"))

    def run(arm: str = "ham", data: Path = data_folder, **parts: Any) -> int:
        config = {
            "name": "test",
            "device": "cpu",
            "arms": [
                {"name": "ham", "mixer": "ham"},
                {"name": "transformer", "mixer": "transformer"},
            ],
            "data": {"context": 128},
            "train": {"calibration_batches": 1, "batch_size": 4},
            "evaluate": {**EVALUATE, **parts},
        }
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
        checkpoint, rows = tmp_path / "checkpoint", tmp_path / "out" / "evaluate.rows.jsonl"
        arguments = ["evaluate", tmp_path / "config.yaml", "--arm", arm, "--seed", "0"]
        arguments += ["--data", data, "--checkpoint", checkpoint, "--rows", rows]
        return main([str(argument) for argument in arguments])

    return run


def test_every_part_makes_rows_of_one_manifest(evaluate, tmp_path: Path) -> None:
    assert evaluate() == 0
    rows = read_rows(tmp_path / "out" / "evaluate.rows.jsonl")
    assert [row for row in rows if row.error] == []
    found = {(row.experiment, row.metric) for row in rows}
    assert found >= {
        ("language_modelling", "bits_per_byte"),
        ("language_modelling", "unigram_bits_per_byte"),
        ("language_modelling", "loss_nats"),
        ("language_modelling", "kv_fraction"),
        ("lm_eval", "accuracy"),
        ("lm_eval", "chance_accuracy"),
        ("needle", "accuracy"),
        ("needle", "answer_loss_nats"),
        ("needle", "kept_fraction"),
        ("recall", "accuracy"),
        ("dial", "bits_per_byte"),
    }
    manifest = read_json(tmp_path / "out" / "evaluate.manifest.json")
    for row in rows:
        assert (row.model, row.mixer, row.seed) == ("ham", "ham", 0)
        assert row.manifest_id == manifest["manifest_id"] and row.code_fingerprint
        assert row.parameters > 0
    assert len(read_jsonl(tmp_path / "out" / "evaluate.samples.jsonl")) == 2


def test_a_part_that_fails_becomes_error_rows(
    evaluate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("first line\n  second line")

    monkeypatch.setattr(recall, "measure_pairs", broken)
    assert evaluate(recall={"pairs": [2, 4], "samples": 1}) == 0
    rows = read_rows(tmp_path / "out" / "evaluate.rows.jsonl")
    failed = [row for row in rows if row.error]
    assert [(row.experiment, row.metric, row.x_value) for row in failed] == [
        ("recall", "accuracy", 2.0),
        ("recall", "accuracy", 4.0),
        ("dial", "recall_accuracy", 0.5),
    ]
    assert failed[0].error == "RuntimeError: first line second line" and failed[0].value is None
    assert {"needle", "dial"} <= {row.experiment for row in rows if row.error is None}
    message = capsys.readouterr().err
    assert "warning: recall, 2 pairs failed: RuntimeError" in message
    assert "2 parts failed" in message


def test_parts_that_are_left_out_are_not_run(evaluate, tmp_path: Path) -> None:
    nothing = dict.fromkeys(EVALUATE)
    assert evaluate(**{**nothing, "recall": EVALUATE["recall"]}) == 0
    rows = read_rows(tmp_path / "out" / "evaluate.rows.jsonl")
    assert [row.experiment for row in rows] == ["recall"]
    for what in ("samples", "documents"):
        assert read_jsonl(tmp_path / "out" / f"evaluate.{what}.jsonl") == [], "declared, so written"


def test_a_corrupt_checkpoint_leaves_earlier_results(evaluate, tmp_path: Path, capsys) -> None:
    nothing = dict.fromkeys(EVALUATE)
    evaluate(**{**nothing, "recall": EVALUATE["recall"]})
    before = (tmp_path / "out" / "evaluate.rows.jsonl").read_bytes()
    weights = tmp_path / "checkpoint" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert evaluate() == 2
    assert "truncated or changed" in capsys.readouterr().err
    assert (tmp_path / "out" / "evaluate.rows.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arm": "transformer"}, "holds a model with arm 'ham'"),
        ({"arm": "mamba"}, "unknown model 'mamba'; known: ham, transformer"),
        (
            {"lm_eval": {"tasks": ["lambda"]}},
            "unknown lm-eval task 'lambda'; known: arc_challenge, arc_easy, boolq, common",
        ),
        ({"needle": {"lengths": [20]}}, "evaluate.needle asks niah_single_1 at 20 tokens"),
        ({"dial": {"fractions": [1.5]}}, "evaluate.dial.fractions.0"),
        (
            {"language_modelling": {"contexts": [800], "tokens": 1}},
            "a context of 800 tokens needs a held-out document of 801",
        ),
        ({"data": Path("/nowhere")}, "/nowhere/test.json does not exist"),
    ],
)
def test_user_mistakes_end_with_status_2_and_no_files(
    evaluate, tmp_path: Path, capsys, change: dict, message: str
) -> None:
    assert evaluate(**change) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert not (tmp_path / "out").exists()
