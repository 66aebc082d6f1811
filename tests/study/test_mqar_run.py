"""The grid: files, resuming, failures, choice of the learning rate; the command; the report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from conftest import TINY

from ham.cli import main
from ham.fingerprint import repository_root
from ham.report.aggregate import Results
from ham.report.rows import Row, read_rows, write_rows
from ham.study.config import load_mqar_config
from ham.study.report import (
    accuracy_table,
    build_report,
    chosen_rates,
    comparison_table,
    mean_over_sizes,
    verdicts,
)

GOOD = {"name": "ham-cosine", "mixer": "ham", "options": {"score": "cosine"}}
BAD = {"name": "ham-bad", "mixer": "ham", "options": {"score": "surprise"}}


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    values = {**TINY, "arms": [GOOD, BAD], "fillers": ["blank", "random"], "seeds": [0, 1]}
    path.write_text(yaml.safe_dump(values))
    return path


def run(config: Path, rows: Path, *more: str) -> int:
    return main(["mqar", "run", str(config), "--rows", str(rows), "--device", "cpu", *more])


def rows_of(folder: Path) -> dict[str, list[Row]]:
    return {
        path.name.removesuffix(".rows.jsonl"): read_rows(path)
        for path in sorted(folder.glob("*.rows.jsonl"))
    }


def test_the_shipped_configuration_is_valid_and_every_arm_can_be_built():
    from ham.study.model import RecallModel

    config = load_mqar_config(repository_root() / "workflow/config/mqar.yaml")
    counts = {arm.name: RecallModel(config, arm, 64).count_parameters() for arm in config.arms}
    assert len(counts) == len(config.arms)
    assert max(counts.values()) / min(counts.values()) < 1.04


def test_a_run_writes_rows_a_failed_one_errors_and_only_that_is_repeated(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    folder = tmp_path / "rows"
    assert run(config_file, folder, "--filler", "random", "--jobs", "3") == 1
    found = rows_of(folder)
    good, bad = "ham-cosine-random-d32", "ham-bad-random-d32"
    assert list(found) == [f"{bad}-s0", f"{bad}-s1", f"{good}-s0", f"{good}-s1"]
    assert all("score" in row.error for row in found[f"{bad}-s0"])
    assert {row.task for row in found[f"{bad}-s0"]} == {"16/2", "32/8"}
    rows = found[f"{good}-s1"]
    accuracy = [row for row in rows if row.metric == "accuracy"]
    assert [(row.task, row.n, row.x_value) for row in accuracy] == [
        ("16/2", 20, 2),
        ("32/8", 80, 8),
    ]
    assert all(0 <= row.kv_fraction <= 1 and row.interval == "wilson95" for row in accuracy)
    per_layer = {(row.metric, row.labels["layer"]) for row in rows if "layer" in row.labels}
    assert {layer for _, layer in per_layer} == {0, 1}
    assert {"kv_fraction", "pairs_kept_fraction", "routed_precision"} <= {m for m, _ in per_layer}
    assert rows[0].labels == {
        "filler": "random",
        "layout": "prefix",
        "width": 32,
        "learning_rate": 0.01,
    }
    manifest = json.loads((folder / f"{good}-s1.manifest.json").read_text())
    assert manifest["manifest_id"] == rows[0].manifest_id

    capsys.readouterr()
    assert run(config_file, folder, "--filler", "random") == 1
    printed = capsys.readouterr().out
    assert f"{good}-s0: finished earlier" in printed
    assert f"{bad}-s0: failed: ConfigError" in printed
    assert run(config_file, folder, "--filler", "random", "--arms", "ham-cosine") == 0
    capsys.readouterr()
    assert run(config_file, folder, "--arms", "ham-cosine", "--seeds", "0", "--steps", "3") == 0
    assert "finished earlier" not in capsys.readouterr().out


def test_arms_of_a_seed_start_alike_whatever_runs_beside_them(config_file: Path, tmp_path: Path):
    values = []
    for name, jobs in (("alone", "1"), ("beside", "2")):
        assert run(config_file, tmp_path / name, "--arms", "ham-cosine", "--jobs", jobs) == 0
        rows = rows_of(tmp_path / name)["ham-cosine-blank-d32-s1"]
        values.append([row.value for row in rows if row.metric != "train_step_ms"])
    assert values[0] == values[1]


def test_the_learning_rate_is_chosen_on_a_seed_that_is_not_reported(
    config_file: Path, tmp_path: Path
):
    values = yaml.safe_load(config_file.read_text())
    values |= {"learning_rates": [1e-9, 0.02], "fillers": ["blank"], "seeds": [3], "arms": [GOOD]}
    values["train"] |= {"steps": 12, "batch_size": 8}
    values["evaluate"]["examples"] = 60
    config_file.write_text(yaml.safe_dump(values))
    assert run(config_file, tmp_path / "rows") == 0
    found = rows_of(tmp_path / "rows")
    tuned = {name for name in found if name.startswith("tune-")}
    assert tuned == {f"tune-ham-cosine-blank-d32-s1000-lr{rate:g}" for rate in (1e-9, 0.02)}
    means = {}
    for name in tuned:
        assert {row.experiment for row in found[name]} == {"mqar_tuning"}
        scores = [row.value for row in found[name] if row.metric == "accuracy"]
        means[found[name][0].labels["learning_rate"]] = sum(scores) / len(scores)
    (row, *_) = found["ham-cosine-blank-d32-s3"]
    assert row.labels["learning_rate"] == max(means, key=lambda rate: means[rate])
    every = [row for rows in found.values() for row in rows]
    assert "Chosen among 1e-09 and 0.02." in chosen_rates(every)


def test_no_group_starts_after_the_time_is_over_and_the_rest_is_run_later(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    choice = ("--arms", "ham-cosine", "--filler", "blank", "--steps", "1")
    assert run(config_file, tmp_path / "rows", *choice, "--minutes", "0") == 1
    assert "2 runs are left; the same command goes on with them" in capsys.readouterr().err
    assert not rows_of(tmp_path / "rows")
    assert run(config_file, tmp_path / "rows", *choice) == 0
    assert run(config_file, tmp_path / "rows", *choice, "--layout", "scattered") == 0
    names = [f"ham-cosine-blank{layout}-d32" for layout in ("", "-scattered")]
    assert set(rows_of(tmp_path / "rows")) == {f"{n}-s{seed}" for n in names for seed in (0, 1)}


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--arms", "nobody"], "unknown arm 'nobody'; known: ham-bad, ham-cosine"),
        (["--filler", "noise"], "unknown filler 'noise'; known: blank, random"),
        (["--seeds", "1000"], "tuning_seed 1000"),
        (["--steps", "0"], "train.steps"),
        (["--jobs", "0"], "--jobs must be at least 1, received 0"),
    ],
)
def test_bad_choices_have_one_clear_message(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture, more: list[str], words: str
):
    assert run(config_file, tmp_path / "rows", *more) == 2
    assert words in capsys.readouterr().err


def made_up_rows() -> list[Row]:
    """Committed is better than cosine by 0.10, 0.20, 0.30 at 8 pairs, alike at 2."""
    rows = []
    for model, shift in (("ham-cosine", 0.0), ("ham-committed", 0.1)):
        for seed in range(3):
            for task, value in (("16/2", 0.9), ("32/8", 0.4 + shift * (seed + 1))):
                rows.append(
                    Row(
                        experiment="mqar",
                        model=model,
                        mixer="ham",
                        seed=seed,
                        metric="accuracy",
                        value=value,
                        task=task,
                        x_name="pairs",
                        x_value=float(task.split("/")[1]),
                        labels={
                            "filler": "blank",
                            "layout": "prefix",
                            "width": 64,
                            "learning_rate": 0.003,
                        },
                        kv_fraction=0.25,
                        device="cpu",
                    )
                )
    return rows


def test_paired_differences_are_those_worked_out_by_hand():
    results = Results(made_up_rows())
    (record,) = comparison_table(results).records
    assert record["pair"] == "ham-committed − ham-cosine"
    cell = record["difference_32/8"]
    # Mean 0.2, standard deviation 0.1, t(2) = 4.3027: half width 4.3027 * 0.1 / sqrt(3).
    assert cell.value == pytest.approx(0.2)
    assert cell.estimate.high - cell.value == pytest.approx(0.24841, abs=1e-5)
    assert record["difference_16/2"].value == 0
    assert record["difference_mean"].value == pytest.approx(0.1)
    assert mean_over_sizes(results, "ham-committed").value == pytest.approx(0.75)
    assert verdicts(results)[-1].endswith("not decided: the interval holds 0")
    narrower = [row for row in made_up_rows() if row.seed < 2]
    assert verdicts(Results(narrower))[-1].endswith("fewer than three common seeds")


def test_a_seed_that_lacks_a_measurement_is_left_out_of_means():
    rows = [row for row in made_up_rows() if (row.seed, row.task) != (2, "32/8")]
    results = Results([*rows, made_up_rows()[-1]])
    assert mean_over_sizes(results, "ham-committed").estimate.n == 3
    assert mean_over_sizes(results, "ham-cosine").estimate.n == 2


def test_a_score_is_called_better_only_outside_the_interval():
    rows = [
        row.model_copy(update={"value": row.value + 0.3 * (row.model == "ham-cosine")})
        for row in made_up_rows()
    ]
    assert verdicts(Results(rows))[-1].endswith("; ham-cosine is better")


def test_the_report_has_table_figure_and_failures(tmp_path: Path):
    failed = made_up_rows()[0].model_copy(
        update={"model": "ham-broken", "value": None, "error": "RuntimeError: no luck"}
    )
    folder = tmp_path / "rows"
    write_rows(folder / "a.rows.jsonl", [*made_up_rows(), failed])
    assert main(["mqar", "report", str(folder), "--out", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out/mqar.md").read_text()
    assert "failed: RuntimeError: no luck" in text
    assert "| blank filler, d 64 | ham-committed | 90.0 % ± 0.0 % (n=3) | 60.0 %" in text
    assert "One rate for all; it was not tuned." in text
    assert (tmp_path / "out/mqar.png").read_bytes()[:4] == b"\x89PNG"
    table = accuracy_table(Results(made_up_rows()))
    assert [column.title for column in table.columns][:4] == [
        "setting",
        "model",
        "16/2",
        "32/8",
    ]


def test_a_report_of_nothing_says_so(tmp_path: Path, capsys: pytest.CaptureFixture):
    (tmp_path / "rows").mkdir()
    assert main(["mqar", "report", str(tmp_path / "rows"), "--out", str(tmp_path / "out")]) == 2
    assert "holds no *.rows.jsonl" in capsys.readouterr().err
    with pytest.raises(Exception, match="no rows of experiment 'mqar'"):
        build_report([], tmp_path / "out")
