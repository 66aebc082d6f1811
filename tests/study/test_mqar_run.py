"""The grid: files, resuming, failures, choice of the learning rate; the commands; the plan."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest
import yaml

from ham.cli import main
from ham.fingerprint import repository_root
from ham.report.rows import Row, read_rows, write_rows
from ham.study import grid
from ham.study.config import MqarConfig, load_mqar_config
from ham.study.report import chosen_rates

GOOD = {"name": "ham-cosine", "mixer": "ham", "options": {"score": "cosine"}}
TASKS = [{"filler": "blank"}, {"filler": "random"}]
BAD = {"name": "ham-bad", "mixer": "ham", "options": {"score": "surprise"}}


@pytest.fixture
def config_file(tmp_path: Path, tiny_values: dict) -> Path:
    path = tmp_path / "tiny.yaml"
    values = {**tiny_values, "arms": [GOOD, BAD], "tasks": TASKS, "seeds": [0, 1]}
    path.write_text(yaml.safe_dump(values))
    return path


TIMES = ("train_step_ms", "overhead_seconds")


def run(config: Path, rows: Path, *more: str) -> int:
    return main(["mqar", "run", str(config), "--rows", str(rows), "--device", "cpu", *more])


def accuracy_row(value: float) -> Row:
    arm = {"model": "ham-committed", "mixer": "ham", "device": "invented"}
    return Row(experiment="mqar_tuning", metric="accuracy", value=value, **arm)


def rows_of(folder: Path) -> dict[str, list[Row]]:
    return {
        path.name.removesuffix(".rows.jsonl"): read_rows(path)
        for path in sorted(folder.glob("*.rows.jsonl"))
    }


def test_the_shipped_configuration_is_valid_and_every_arm_can_be_built():
    from ham.study.model import RecallModel

    config = load_mqar_config(repository_root() / "workflow/config/mqar.yaml")
    task = config.tasks[0]
    counts = {
        arm.name: RecallModel(config, arm, task, 64).count_parameters() for arm in config.arms
    }
    assert len(counts) == len(config.arms)
    assert max(counts.values()) / min(counts.values()) < 1.04


def test_a_run_writes_rows_a_failed_one_errors_and_only_that_is_repeated(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    folder = tmp_path / "rows"
    assert run(config_file, folder, "--tasks", "random", "--jobs", "3") == 1
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
        "variant": "plain",
        "width": 32,
        "learning_rate": 0.01,
        "training_context": 32,
    }
    manifest = json.loads((folder / f"{good}-s1.manifest.json").read_text())
    assert manifest["manifest_id"] == rows[0].manifest_id

    capsys.readouterr()
    assert run(config_file, folder, "--tasks", "random") == 1
    printed = capsys.readouterr().out
    assert f"{good}-s0: finished earlier" in printed
    assert f"{bad}-s0: failed: ConfigError" in printed
    assert run(config_file, folder, "--tasks", "random", "--keep-going") == 0
    assert all(row.error for row in rows_of(folder)[f"{bad}-s0"])
    assert run(config_file, folder, "--tasks", "random", "--arms", "ham-cosine") == 0
    capsys.readouterr()
    assert run(config_file, folder, "--arms", "ham-cosine", "--seeds", "0", "--steps", "3") == 0
    assert "finished earlier" not in capsys.readouterr().out


def test_arms_of_a_seed_start_alike_whatever_runs_beside_them(config_file: Path, tmp_path: Path):
    values = []
    for name, more in (
        ("alone", []),
        ("beside", ["--jobs", "2"]),
        # One run, because every process needs seconds to start.
        ("process", ["--processes", "2", "--seeds", "1"]),
    ):
        choice = ("--arms", "ham-cosine", "--tasks", "blank")
        assert run(config_file, tmp_path / name, *choice, *more) == 0
        rows = rows_of(tmp_path / name)["ham-cosine-blank-d32-s1"]
        values.append([row.value for row in rows if row.metric not in TIMES])
    assert values[0] == values[1]
    # Alone in its program, sums go in another order.
    assert values[2] == pytest.approx(values[0], rel=1e-5)


@pytest.mark.parametrize(
    ("scores", "chosen"),
    [
        # Equally good: the smallest. Half a point counts as equal, two points do not.
        ([0.2, 1.0, 1.0, 1.0], 0.003),
        ([0.2, 0.993, 0.998, 0.1], 0.003),
        ([0.2, 0.97, 0.99, 0.1], 0.01),
        ([0.0, 0.0, 0.0, 0.5], 0.03),
        # A run that failed is worse than one that answers nothing.
        ([None, 0.0, None, None], 0.003),
        ([None, None, None, None], 0.001),
    ],
)
def test_of_equally_good_rates_the_smallest_is_chosen(
    scores: list[float | None], chosen: float, tiny_study: Callable[..., MqarConfig]
):
    study = tiny_study(learning_rates=[0.001, 0.003, 0.01, 0.03])
    runs = grid.tuning_runs(study)
    rows = [[accuracy_row(score)] if score is not None else [] for score in scores]
    tuned = list(zip(runs, rows, strict=True))
    assert grid.chosen_rates(study, tuned) == {("ham-committed", "blank", 32): chosen}


def test_the_learning_rate_is_chosen_on_a_seed_that_is_not_reported(
    config_file: Path, tmp_path: Path
):
    values = yaml.safe_load(config_file.read_text())
    tasks = [*TASKS, {"filler": "blank", "layout": "scattered", "rates_from": "blank"}]
    values |= {"learning_rates": [1e-9, 0.02], "tasks": tasks, "seeds": [3], "arms": [GOOD]}
    values["train"] |= {"steps": 20, "tuning_steps": 12, "batch_size": 8}
    values["evaluate"]["sizes"].append({"length": 64, "pairs": 9})
    values["evaluate"]["examples"] = 60
    config_file.write_text(yaml.safe_dump(values))
    assert run(config_file, tmp_path / "rows", "--tasks", "blank-scattered") == 0
    found = rows_of(tmp_path / "rows")
    tuned = {name for name in found if name.startswith("tune-")}
    assert tuned == {f"tune-ham-cosine-blank-d32-s1000-lr{rate:g}" for rate in (1e-9, 0.02)}
    means = {}
    for name in tuned:
        assert {row.experiment for row in found[name]} == {"mqar_tuning"}
        assert {row.task for row in found[name]} == {"16/2", "32/8", "train"}, "none is longer"
        scores = [row.value for row in found[name] if row.metric == "accuracy"]
        means[found[name][0].labels["learning_rate"]] = sum(scores) / len(scores)
    assert set(found) == {*tuned, "ham-cosine-blank-scattered-d32-s3"}
    (row, *_) = found["ham-cosine-blank-scattered-d32-s3"]
    near = [rate for rate, value in means.items() if value >= max(means.values()) - 0.01]
    assert row.labels["learning_rate"] == min(near)
    every = [row for rows in found.values() for row in rows]
    text = chosen_rates(every)
    assert "Chosen among 1e-09 and 0.02, the same for every arm." in text
    assert "0.02 (at the edge of the range: a better one may lie outside)" in text[-1]


def test_no_group_starts_after_the_time_is_over_and_the_rest_is_run_later(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    choice = ("--arms", "ham-cosine", "--tasks", "blank", "--steps", "1")
    late = [*choice, "--minutes", "0", "--keep-going"]
    assert run(config_file, tmp_path / "rows", *late) == 1
    assert "2 runs are left; the same command goes on with them" in capsys.readouterr().err
    assert not rows_of(tmp_path / "rows")
    assert run(config_file, tmp_path / "rows", *choice) == 0
    assert set(rows_of(tmp_path / "rows")) == {f"ham-cosine-blank-d32-s{s}" for s in (0, 1)}


def test_a_process_that_dies_is_one_clear_message(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch
):
    class DyingPool(ThreadPoolExecutor):
        def __init__(self, workers: int, **_: object):
            super().__init__(workers)

    def die(group: object) -> None:
        raise BrokenProcessPool("terminated abruptly")

    monkeypatch.setattr(grid, "ProcessPoolExecutor", DyingPool)
    monkeypatch.setattr(grid, "_run_in_process", die)
    assert run(config_file, tmp_path / "rows", "--processes", "2") == 2
    assert "a process of the grid ended before its runs did" in capsys.readouterr().err


def test_the_plan_counts_runs_and_their_minutes(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    values = yaml.safe_load(config_file.read_text())
    values |= {"learning_rates": [0.01, 0.02], "arms": [GOOD], "widths": [32, 64]}
    values["train"] |= {"steps": 1000, "tuning_steps": 500}
    config_file.write_text(yaml.safe_dump(values))
    common = {"experiment": "mqar", "model": "a", "mixer": "ham", "device": "an H100"}
    labels = {"width": 32, "side_by_side": 4, "in_one_program": 2}
    rows = [
        Row(**common, metric="train_step_ms", value=6.0, labels=labels),
        Row(**common, metric="overhead_seconds", value=3.0, labels=labels),
    ]
    write_rows(tmp_path / "measured/a.rows.jsonl", rows)
    # Beside other processes: no cost of a GPU.
    slow = [row.model_copy(update={"value": 99.0}) for row in rows]
    write_rows(tmp_path / "measured/b.rows.jsonl", slow)
    command = {"command": ["ham", "mqar", "run", "--processes", "2"]}
    (tmp_path / "measured/b.manifest.json").write_text(json.dumps(command))
    plan = ("mqar", "plan", str(config_file), "--measured", str(tmp_path / "measured"))
    assert main([*plan]) == 0
    text = capsys.readouterr().out
    # Two rates of 3 + 3 s and two seeds of 6 + 3 s: 30 s for each of two tasks and two widths.
    assert [line.split() for line in text.splitlines() if line.startswith(("blank", "total"))] == [
        ["blank", "32", "2", "2", "0.5"],
        ["blank", "64", "2", "2", "0.5"],
        ["total", "8", "8", "2.0"],
    ]
    assert (
        "an H100, 4 runs side by side, 2 in one program" in text
        and "width 64 was not measured" in text
    )
    assert main([*plan[:3], "--measured", str(tmp_path)]) == 2
    assert "no rows of metric 'train_step_ms'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--arms", "nobody"], "unknown arm 'nobody'; known: ham-bad, ham-cosine"),
        (["--tasks", "noise"], "unknown task 'noise'; known: blank, random"),
        (["--seeds", "1000"], "tuning_seed 1000"),
        (["--steps", "0"], "train.steps"),
        (["--jobs", "0"], "--jobs must be at least 1, received 0"),
        (["--processes", "0"], "--processes must be at least 1, received 0"),
        (["--launch", "graph"], "train.launch 'graph' needs a GPU"),
    ],
)
def test_bad_choices_have_one_clear_message(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture, more: list[str], words: str
):
    assert run(config_file, tmp_path / "rows", *more) == 2
    assert words in capsys.readouterr().err
