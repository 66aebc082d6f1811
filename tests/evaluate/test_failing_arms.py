"""An arm that fails leaves error rows in every stage, and the other arms are not touched."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from ham.cli import main
from ham.conformance.starter import starting_file
from ham.failure import read_failure
from ham.report.aggregate import Results
from ham.report.html import failure_lines
from ham.report.plots_base import Look
from ham.report.rows import Row, read_rows
from ham.report.table_format import to_markdown
from ham.report.tables import all_tables
from ham.workflow import failed_arms, parse_workflow_config, stage_fingerprint

pytestmark = pytest.mark.usefixtures("own_registry")

RAISING = starting_file("raising").replace(
    "        v_BTD = self.values",
    '        if self.training:\n            raise ValueError("not trained yet")\n'
    "        v_BTD = self.values",
)
MODULES = {
    "rival_raising": RAISING,
    "rival_costless": starting_file("costless").replace("def decode_flops", "def cost"),
    "rival_liar": starting_file("liar").replace(
        "    title:", "    routes: ClassVar = True\n    title:"
    ),
    "rival_broken": "import nothing_of_this_name",
    "rival_garbled": "def broken(:",
}
REASONS = {
    "raising": "ValueError: not trained yet",
    "costless": "mixer 'costless' cannot be used: Costless lacks decode_flops",
    "liar": "mixer 'liar' cannot be used: Liar.routes is true, but it has no `controller`",
    "broken": "'rival_broken' cannot be imported: ModuleNotFoundError: No module named 'nothing",
    "garbled": "'rival_garbled' cannot be imported: SyntaxError: invalid syntax",
    "absent": "'rival_absent' cannot be imported: ModuleNotFoundError: No module named 'rival_ab",
    "refused": "transformer kv_heads 3 does not divide the 2 heads",
}
SETTINGS = {
    "name": "failing",
    "device": "cpu",
    "data": {"context": 64, "recall_fraction": 0.0},
    "model": {
        "layers": 1,
        "width": 16,
        "heads": 2,
        "max_positions": 512,
        "match_parameters": False,
    },
    "train": {
        "steps": 2,
        "batch_size": 2,
        "validation_batches": 1,
        "calibration_batches": 1,
    },
    "evaluate": {
        "language_modelling": {"tokens": 128, "contexts": [64], "position_bins": 2},
        "lm_eval": None,
        "needle": {"tasks": ["niah_single_1"], "lengths": [480], "depths": [0.5], "samples": 1},
        "recall": {"pairs": [2], "samples": 2},
        "dial": None,
    },
    "measure": {"contexts": [64], "decode_tokens": 2, "repeats": 1, "warmup": 0},
    "arms": [
        {"name": "transformer", "mixer": "transformer"},
        {"name": "refused", "mixer": "transformer", "options": {"kv_heads": 3}},
        *({"name": name, "mixer": name} for name in REASONS if name != "refused"),
    ],
}


@pytest.fixture
def config(install: Callable, tmp_path: Path) -> str:
    points = {name.removeprefix("rival_"): name for name in MODULES}
    install(MODULES, {**points, "absent": "rival_absent"})
    path = tmp_path / "failing.yaml"
    path.write_text(yaml.safe_dump(SETTINGS))
    return str(path)


class Jobs:
    """The commands of the workflow for one arm after the other."""

    def __init__(self, config: str, data: Path, folder: Path):
        self.config, self.data, self.folder = config, data, folder

    def run(self, stage: str, arm: str, *further: str) -> int:
        out = self.folder / arm / "seed0"
        common = [stage, self.config, "--arm", arm, "--seed", "0", "--data", str(self.data)]
        if stage == "train":
            places = ["--out", str(out), "--state", str(self.folder / "state")]
        else:
            places = ["--checkpoint", str(out / "checkpoint")]
            places += ["--rows", str(out / f"{stage}.rows.jsonl")]
        return main([*common, *places, *further])

    def rows(self, stage: str, arm: str) -> list[Row]:
        return read_rows(self.folder / arm / "seed0" / f"{stage}.rows.jsonl")


@pytest.fixture
def jobs(config: str, data_folder: Path, tmp_path: Path) -> Jobs:
    return Jobs(config, data_folder, tmp_path / "results/runs/failing/models")


def main_numbers(rows: list[Row]) -> set[tuple]:
    return {(row.experiment, row.metric, row.task, row.x_value) for row in rows}


def test_every_stage_of_a_failing_arm_has_rows_and_the_report_shows_them(
    jobs: Jobs, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for stage in ("train", "evaluate", "measure"):
        for arm in ("transformer", "raising"):
            assert jobs.run(stage, arm, "--keep-going") == 0
    rows: list[Row] = []
    for stage in ("train", "evaluate", "measure"):
        good, bad = jobs.rows(stage, "transformer"), jobs.rows(stage, "raising")
        assert bad and {row.error for row in bad} == {"ValueError: not trained yet"}
        assert not any(row.error for row in good)
        if stage == "evaluate":
            assert main_numbers(bad) <= main_numbers(good)
        rows += good + bad
    tables, _ = all_tables(Results(rows), Look.of(Results(rows), smoke=True, context=64))
    for table in tables:
        line = next(x for x in to_markdown(table, True).splitlines() if x.startswith("| raising"))
        assert "failed: ValueError: not trained yet" in line and "not run" not in line, table.name
    (failure,) = failure_lines(Results(rows).failures())
    assert failure["experiment"].startswith("train, language modelling, needle, recall")
    monkeypatch.chdir(tmp_path)
    lines = failed_arms(parse_workflow_config(SETTINGS))
    assert lines[0] == "raising, seed 0, failed: ValueError: not trained yet" and len(lines) == 2


@pytest.mark.parametrize("arm", REASONS)
def test_each_fault_is_one_clear_message(
    arm: str, jobs: Jobs, capsys: pytest.CaptureFixture
) -> None:
    assert jobs.run("train", arm, "--keep-going") == 0
    errors = {row.error for row in jobs.rows("train", arm)}
    assert len(errors) == 1 and REASONS[arm] in errors.pop()
    assert REASONS[arm] in read_failure(jobs.folder / arm / "seed0/checkpoint")
    capsys.readouterr()
    # Without the option the fault is the command's own, as for anyone who runs it alone.
    if arm == "raising":
        with pytest.raises(ValueError, match="not trained yet"):
            jobs.run("train", arm)
    else:
        assert jobs.run("train", arm) == 2
        message = capsys.readouterr().err
        assert REASONS[arm] in message and message.count("\n") == 1


def test_the_workflow_can_be_planned_around_a_source_that_cannot_be_read(config: str) -> None:
    prints = {arm: stage_fingerprint("train", arm) for arm in ("garbled", "absent", "costless")}
    assert len(set(prints.values())) == 3
    assert {arm.name for arm in parse_workflow_config(SETTINGS).arms} >= set(REASONS)


def test_what_is_missing_around_the_arm_still_ends_the_job(
    jobs: Jobs, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    jobs.data = tmp_path / "nowhere"
    assert jobs.run("train", "transformer", "--keep-going") == 2
    assert "nowhere" in capsys.readouterr().err
    assert not (jobs.folder / "transformer/seed0/train.rows.jsonl").exists()


def test_a_repaired_arm_forgets_its_failure(jobs: Jobs, capsys: pytest.CaptureFixture) -> None:
    checkpoint = jobs.folder / "refused/seed0/checkpoint"
    jobs.run("train", "refused", "--keep-going")
    assert jobs.run("evaluate", "refused") == 2
    assert "holds no model: training failed: transformer kv_heads 3" in capsys.readouterr().err
    page = jobs.folder / "kept.html"
    inspect = ["inspect", str(checkpoint), "--sample", str(jobs.data / "test.tokens")]
    assert main([*inspect, "--out", str(page), "--keep-going"]) == 0
    assert "training failed. transformer kv_heads 3" in page.read_text()
    Path(jobs.config).write_text(
        Path(jobs.config).read_text().replace("kv_heads: 3", "kv_heads: 1")
    )
    assert jobs.run("train", "refused", "--keep-going") == 0
    assert read_failure(checkpoint) is None
    assert not any(row.error for row in jobs.rows("train", "refused"))


def test_an_arm_that_fails_at_every_learning_rate(jobs: Jobs, tmp_path: Path) -> None:
    """Tuning, the choice and the training that waits for it: each says what failed, none stops."""
    tuned = {**SETTINGS, "tuning": {"learning_rates": [1e-3, 1e-2], "seed": 1000, "steps": 2}}
    Path(jobs.config).write_text(yaml.safe_dump(tuned))
    files = []
    for rate in ("0.001", "0.01"):
        out = tmp_path / f"lr{rate}"
        command = ["train", jobs.config, "--arm", "raising", "--seed", "1000", "--learning-rate"]
        command += [rate, "--data", str(jobs.data), "--out", str(out), "--keep-going"]
        assert main([*command, "--state", str(tmp_path / "state")]) == 0
        files.append(str(out / "tuning.rows.jsonl"))
    chosen = str(tmp_path / "chosen.json")
    tune = ["tune", jobs.config, "--arm", "raising", "--rows", *files, "--out", chosen]
    assert main(tune) == 2
    assert main([*tune, "--keep-going"]) == 0
    assert jobs.run("train", "raising", "--tuned", chosen) == 2
    assert jobs.run("train", "raising", "--tuned", chosen, "--keep-going") == 0
    (error,) = {row.error for row in jobs.rows("train", "raising")}
    assert "no learning rate of arm 'raising'" in error and "not trained yet" in error
