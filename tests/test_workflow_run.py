"""The whole workflow at the smallest size: killed, continued, changed and run again."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from snakemake_calls import ROOT, planned_jobs, snakemake, snakemake_command, write_yaml

from ham import workflow as wf
from ham.cli import main
from ham.config_files import load_config
from ham.report.rows import read_rows

TINY = {
    "name": "tiny",
    "device": "cpu",
    "data": {"context": 64},
    "model": {"layers": 1, "width": 32, "heads": 2, "max_positions": 1024},
    "arms": [
        {"name": "ham", "mixer": "ham", "options": {"target": 0.5}},
        {"name": "broken", "mixer": "transformer", "options": {"kv_heads": 3}},
    ],
    "train": {
        "steps": 12,
        "batch_size": 2,
        "log_every": 2,
        "validation_every": 6,
        "validation_batches": 1,
        "calibration_batches": 1,
        "checkpoint_seconds": 0.01,
    },
    "evaluate": {
        "language_modelling": {"tokens": 512, "contexts": [64], "position_bins": 2},
        "lm_eval": {"tasks": ["held_out_perplexity"], "limit": 1},
        "needle": {"tasks": ["niah_single_1"], "lengths": [480], "depths": [0.5], "samples": 1},
        "recall": {"pairs": [2], "samples": 1},
        "dial": {"fractions": [0.5], "tokens": 256},
    },
    "measure": {"contexts": [64], "decode_tokens": 2, "repeats": 1, "warmup": 0},
}

STUDY = {
    "name": "small",
    "seeds": [0],
    "learning_rates": [0.01],
    "tasks": [{"filler": "blank"}],
    "widths": [16],
    "vocabulary_size": 64,
    "layers": 1,
    "arms": [
        {"name": "ham-cosine", "mixer": "ham", "options": {"score": "cosine"}},
        {"name": "broken", "mixer": "ham", "options": {"score": "nonsense"}},
    ],
    "train": {"steps": 2, "batch_size": 2, "mixture": [{"length": 16, "pairs": 2}]},
    "evaluate": {"examples": 4, "batch_size": 4, "sizes": [{"length": 16, "pairs": 2}]},
}


class Pipeline:
    """The whole workflow at the smallest size, killed once while it trained."""

    def __init__(self, folder: Path):
        self.folder = folder
        study = write_yaml(folder / "study.yaml", STUDY)
        values = {**TINY, "workflow": {"studies": [study]}}
        self.config = write_yaml(folder / "tiny.yaml", values)

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return snakemake(self.folder, "--configfile", self.config, *arguments)

    def jobs_after(self, **overlay: object) -> dict[str, int]:
        above = write_yaml(self.folder / "overlay.yaml", overlay)
        return planned_jobs(self.folder, "--configfile", self.config, above)

    def kill_while_training(self) -> None:
        """SIGKILL Snakemake and its jobs as soon as a training state is on disk."""
        process = subprocess.Popen(
            snakemake_command(self.folder, "--cores", "1", "--configfile", self.config),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=ROOT,
            start_new_session=True,
        )
        deadline = time.monotonic() + 120
        while not list(self.folder.glob("results/.state/*/state.pt")):
            assert process.poll() is None, "the run ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.005)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    made = Pipeline(tmp_path_factory.mktemp("pipeline"))
    made.kill_while_training()
    assert made.run("--unlock").returncode == 0
    done = made.run("--cores", "2", "--rerun-incomplete", "--show-failed-logs")
    assert done.returncode == 0, done.stderr
    return made


def test_a_killed_run_goes_on_where_it_stopped(pipeline: Pipeline):
    (log,) = pipeline.folder.glob("results/runs/tiny/logs/ham/*/train.log")
    assert "resuming ham at step" in log.read_text()
    assert list(pipeline.folder.glob("results/.state/*")) == []


def test_every_stage_leaves_rows_and_a_report(pipeline: Pipeline):
    config = load_config(pipeline.config)
    rows = read_rows([pipeline.folder / name for name in wf.rows_files(config)])
    assert {row.model for row in rows} == {"ham", "broken"}
    experiments = {"train", "language_modelling", "needle", "recall", "throughput", "memory"}
    assert experiments <= {row.experiment for row in rows}
    failed = [row for row in rows if row.error]
    assert {row.model for row in failed} == {"broken"}
    assert {row.error for row in failed} == {"transformer kv_heads 3 does not divide the 2 heads"}
    assert len(failed) == sum(row.model == "broken" for row in rows)
    assert (pipeline.folder / "reports/tiny/index.html").stat().st_size > 10_000


def test_the_report_links_a_page_of_kept_tokens(pipeline: Pipeline):
    (page,) = wf.inspection_pages(load_config(pipeline.config))
    assert "What ham keeps" in (pipeline.folder / page).read_text()
    link = Path(page).relative_to("reports/tiny").as_posix()
    index = (pipeline.folder / "reports/tiny/index.html").read_text()
    assert f'href="{link}"' in index
    rows = read_rows(pipeline.folder / wf.inspection_files(load_config(pipeline.config))[1])
    assert {"flips", "logit_difference"} <= {row.metric for row in rows}
    assert f"[Kept tokens]({link})" in (pipeline.folder / "reports/tiny/summary.md").read_text()


def test_a_study_is_on_the_page_of_the_run(pipeline: Pipeline):
    folder = pipeline.folder / "results/runs/tiny/studies/small"
    rows = read_rows(sorted((folder / "blank-d16").glob("*.rows.jsonl")))
    assert {row.model for row in rows} == {"ham-cosine", "broken"}
    assert {row.model for row in rows if row.error} == {"broken"}
    assert (folder / "blank-d16.done").exists()
    table = (pipeline.folder / "reports/tiny/tables/mqar.md").read_text()
    assert "ham-cosine" in table
    assert "failed" in table
    assert (pipeline.folder / "reports/tiny/figures/mqar.svg").exists()


def test_rows_carry_the_hashes_that_the_rules_compare(pipeline: Pipeline):
    config = load_config(pipeline.config)
    for stage in ("train", "evaluate", "measure"):
        path = pipeline.folder / f"results/runs/tiny/models/ham/seed0/{stage}.rows.jsonl"
        row = read_rows(path)[0]
        assert row.config_hash == wf.stage_hash(config, stage, "ham")
        assert row.code_fingerprint == wf.stage_fingerprint(stage, "ham")


def test_a_second_run_has_nothing_to_do(pipeline: Pipeline):
    done = pipeline.run("--cores", "2")
    assert done.returncode == 0
    assert "Nothing to be done" in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("overlay", "jobs"),
    [
        ({"title": "another"}, {"report": 1, "all": 1, "total": 2}),
        (
            {"evaluate": {"recall": {"samples": 2}}},
            {"evaluate": 2, "report": 1, "all": 1, "total": 4},
        ),
        (
            {"measure": {"repeats": 2}},
            {"measure": 2, "report": 1, "all": 1, "total": 4},
        ),
        (
            {"train": {"steps": 13}},
            {
                **{"train": 2, "evaluate": 2, "measure": 2, "inspect": 1, "report": 1, "all": 1},
                "total": 9,
            },
        ),
        (
            {"arms": [*TINY["arms"], {"name": "new", "mixer": "transformer"}]},
            {"train": 1, "evaluate": 1, "measure": 1, "report": 1, "all": 1, "total": 5},
        ),
        (
            {"seeds": [0, 1]},
            {"train": 2, "evaluate": 2, "report": 1, "all": 1, "total": 6},
        ),
    ],
    ids=["title", "evaluation", "measurement", "training", "arm", "seed"],
)
def test_a_changed_setting_reruns_what_reads_it(
    pipeline: Pipeline, overlay: dict, jobs: dict[str, int]
):
    assert pipeline.jobs_after(**overlay) == jobs


def test_snakemakes_own_report(pipeline: Pipeline, tmp_path: Path):
    target = tmp_path / "report.html"
    done = pipeline.run("--report", str(target))
    assert done.returncode == 0, done.stderr
    page = target.read_text()
    assert "everything on one page" in page
    assert "Smoke run" in page


def test_gc_finds_state_of_finished_runs_only(
    pipeline: Pipeline, capsys: pytest.CaptureFixture, state_folder: Callable[[str], Path]
):
    config = load_config(pipeline.config)
    done = state_folder(f"ham-seed0-{wf.stage_hash(config, 'train', 'ham')}-{'0' * 12}")
    unfinished = state_folder(f"ham-seed0-{'1' * 12}-{'0' * 12}")
    command = ["gc", "--results", str(pipeline.folder / "results")]
    assert main(command) == 0
    assert "1 to remove" in capsys.readouterr().out
    assert done.exists()
    assert main([*command, "--yes"]) == 0
    assert not done.exists()
    assert unfinished.exists()
    assert main([*command, "--all", "--yes"]) == 0
    assert not unfinished.exists()
    assert main(command) == 0
    assert "nothing to remove" in capsys.readouterr().out


@pytest.fixture
def state_folder(pipeline: Pipeline) -> Callable[[str], Path]:
    def make(name: str) -> Path:
        folder = pipeline.folder / "results/.state" / name
        folder.mkdir(parents=True)
        (folder / "state.pt").write_bytes(b"x" * 1000)
        return folder

    return make
