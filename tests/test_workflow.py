from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from ham import workflow as wf
from ham.cli import main
from ham.config import Config
from ham.config_files import load_config
from ham.errors import ConfigError, DeviceError
from ham.fingerprint import repository_root
from ham.report.rows import read_rows

ROOT = repository_root()
FOLDER = ROOT / "workflow/config"

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


def snakemake_command(folder: Path, *arguments: str, snakefile: Path = ROOT / "Snakefile") -> list:
    base = [sys.executable, "-m", "snakemake", "--snakefile", str(snakefile)]
    return [*base, "--directory", str(folder), *arguments]


def snakemake(
    folder: Path, *arguments: str, snakefile: Path = ROOT / "Snakefile"
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        snakemake_command(folder, *arguments, snakefile=snakefile),
        capture_output=True,
        text=True,
        cwd=ROOT,
    )


def planned_jobs(folder: Path, *arguments: str) -> dict[str, int]:
    """Jobs by rule that a dry run announces."""
    done = snakemake(folder, "--dry-run", "--quiet", "rules", *arguments)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines() + done.stderr.splitlines()
    counts = {}
    for line in lines[next((i for i, one in enumerate(lines) if one.startswith("job ")), -1) :]:
        words = line.split()
        if len(words) == 2 and words[1].isdigit():
            counts[words[0]] = int(words[1])
        if words[:1] == ["total"]:
            break
    return counts


def write_yaml(path: Path, values: object) -> str:
    path.write_text(yaml.safe_dump(values))
    return str(path)


def demo(**changes: object) -> Config:
    values = yaml.safe_load((FOLDER / "demo.yaml").read_text())
    return wf.parse_workflow_config({**values, **changes})


@pytest.mark.parametrize(
    ("name", "jobs"),
    [
        ("demo", {"train": 6, "evaluate": 6, "measure": 6, "total": 22}),
        ("paper", {"train": 8, "evaluate": 8, "measure": 8, "total": 28}),
    ],
)
def test_dry_run_of_shipped_configurations(name: str, jobs: dict[str, int], tmp_path: Path):
    found = planned_jobs(tmp_path, "--configfile", str(FOLDER / f"{name}.yaml"))
    assert found == {"prepare": 1, "inspect": 1, "report": 1, "all": 1, **jobs}
    assert not (tmp_path / "results").exists()
    assert not (tmp_path / "reports").exists()


def test_jobs_that_share_processes_are_one_rule(tmp_path: Path):
    found = planned_jobs(tmp_path, "--configfile", str(FOLDER / "h100.yaml"))
    jobs = {"prepare": 1, "batch": 16, "study": 4, "report": 1, "all": 1}
    assert found == {**jobs, "total": sum(jobs.values())}


def test_a_study_runs_beside_any_configuration(tmp_path: Path):
    assert planned_jobs(tmp_path, "--cores", "2", "mqar") == {"study": 4, "mqar": 1, "total": 5}


def test_the_demo_is_the_default(tmp_path: Path):
    default = planned_jobs(tmp_path)
    assert default == planned_jobs(tmp_path, "--configfile", str(FOLDER / "demo.yaml"))


@pytest.mark.parametrize("profile", ["default", "slurm"])
def test_profiles_dry_run(profile: str, tmp_path: Path):
    folder = ROOT / "workflow/profiles" / profile
    config = ["--configfile", str(FOLDER / "h100.yaml")]
    assert planned_jobs(tmp_path, "--profile", str(folder), *config)["batch"] == 16


def test_linters_pass(tmp_path: Path):
    lint = snakemake(tmp_path, "--lint")
    assert lint.returncode == 0, lint.stdout + lint.stderr
    snakefmt = Path(sys.executable).with_name("snakefmt")
    formatted = subprocess.run(
        [snakefmt, "--check", ROOT / "Snakefile", ROOT / "workflow"], capture_output=True
    )
    assert formatted.returncode == 0, formatted.stderr


@pytest.mark.parametrize("stage", wf.STAGES)
def test_every_rule_is_logged_bounded_and_fingerprinted(stage: str):
    rule = (ROOT / f"workflow/rules/{stage}.smk").read_text()
    assert rule.startswith(f"rule {stage}:")
    for part in ("log:", "resources:", "mem_mb=", "runtime=", f"python -m ham {stage} "):
        assert part in rule
    assert re.search(rf'code=.*stage_fingerprint\("{stage}"', rule)
    assert re.search(rf'config=.*stage_hash\(CONFIG, "{stage}"', rule)
    assert ("gpu=GPU" in rule) == (stage in ("train", "evaluate", "measure", "inspect"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trian": 1}, "trian: unknown key; known: arms, data"),
        ({"arms": [{"name": "x", "mixer": "rwkv"}]}, "unknown mixer 'rwkv'; known: gated_delta"),
    ],
)
def test_bad_configuration_stops_before_any_job(changes: dict, message: str, tmp_path: Path):
    values = {**yaml.safe_load((FOLDER / "demo.yaml").read_text()), **changes}
    config = write_yaml(tmp_path / "bad.yaml", values)
    done = snakemake(tmp_path / "run", "--cores", "1", "--configfile", config)
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run/results").exists()


def test_missing_gpu_stops_before_any_job(tmp_path: Path):
    if wf.visible_gpus():
        pytest.skip("this machine has the GPU whose absence is tested")
    done = snakemake(tmp_path, "--cores", "1", "--configfile", str(FOLDER / "h100.yaml"))
    assert done.returncode != 0
    assert "configuration 'h100' asks for device 'cuda'" in done.stderr
    assert not (tmp_path / "results").exists()


GPU_JOBS = """
from ham.workflow import limit_gpus, timing_threads
GPUS = limit_gpus(workflow)
rule all:
    input: "0", "1", "2"
rule job:
    output: "{n}"
    threads: lambda wildcards: timing_threads(workflow.cores, GPUS)
    priority: lambda wildcards: 3 - int(wildcards.n)
    resources: gpu=1
    shell: "date +%s.%N > {output}.t; sleep 0.4; date +%s.%N >> {output}.t; touch {output}"
"""


@pytest.mark.parametrize(("arguments", "overlap"), [((), False), (("--resources", "gpu=2"), True)])
def test_as_many_gpu_jobs_as_gpus_in_the_order_of_priority(
    arguments: tuple[str, ...], overlap: bool, tmp_path: Path
):
    snakefile = tmp_path / "Snakefile"
    snakefile.write_text(GPU_JOBS)
    environment_gpus = os.environ.get("CUDA_VISIBLE_DEVICES")
    assert len(wf.visible_gpus()) <= 1 or environment_gpus, "tested for one GPU or none"
    done = snakemake(tmp_path, "--cores", "4", *arguments, snakefile=snakefile)
    assert done.returncode == 0, done.stderr
    first, second, third = sorted(
        ([float(line) for line in (tmp_path / name).read_text().split()] for name in THREE),
    )
    assert (second[0] < first[1]) == overlap
    assert third[0] > min(first[1], second[1])
    last = max(THREE, key=lambda name: (tmp_path / name).read_text())
    assert last == "2.t"


THREE = ("0.t", "1.t", "2.t")


def test_gpu_limit_follows_the_visible_gpus(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(wf, "visible_gpus", lambda: ["0", "1", "2"])
    resources = {}
    workflow = SimpleNamespace(global_resources=resources, register_resource=resources.__setitem__)
    assert wf.limit_gpus(workflow) == resources["gpu"].value == 3
    given = {"gpu": SimpleNamespace(value=8)}
    chosen = SimpleNamespace(global_resources=given, register_resource=pytest.fail)
    assert wf.limit_gpus(chosen) == 8


@pytest.mark.parametrize(
    ("cores", "gpus", "threads"), [(32, 0, 32), (32, 1, 32), (32, 8, 4), (10, 4, 2), (2, 8, 1)]
)
def test_jobs_with_timings_share_the_cores_by_gpu(cores: int, gpus: int, threads: int):
    assert wf.timing_threads(cores, gpus) == threads


def test_require_device(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(wf, "visible_gpus", lambda: [])
    wf.require_device(demo())
    with pytest.raises(DeviceError, match="asks for device 'cuda'"):
        wf.require_device(demo(device="cuda"))
    monkeypatch.setattr(wf, "visible_gpus", lambda: ["0"])
    wf.require_device(demo(device="cuda"))


def test_mixers_are_found_without_importing_them():
    from ham.model.registry import registered_mixers

    assert wf.mixer_files() == {
        name: mixer.__module__ for name, mixer in registered_mixers().items()
    }


def test_unknown_stage_and_mixer():
    with pytest.raises(ConfigError, match="unknown stage 'trian'; known: evaluate"):
        wf.stage_modules("trian")
    with pytest.raises(ConfigError, match="unknown mixer 'rwkv'; known: gated_delta_rule"):
        wf.stage_modules("train", "rwkv")


CHANGES = {
    "title": ({"title": "x"}, {"report"}),
    "evaluation": ({"evaluate": {"recall": None}}, {"evaluate", "report"}),
    "measurement": ({"measure": {"repeats": 9}}, {"measure", "report"}),
    "steps": ({"train": {"steps": 7}}, {"train", "report"}),
    "tokenizer": ({"data": {"tokenizer": "bpe-4096"}}, {"prepare", "train", "report"}),
    "recall share": ({"data": {"recall_fraction": 0.2}}, {"train", "report"}),
    "memory of one job": ({"threads_per_job": 2}, {"report"}),
}


@pytest.mark.parametrize("case", CHANGES)
def test_each_stage_hashes_what_it_reads(case: str):
    change, expected = CHANGES[case]
    overrides = [f"{key}={yaml.safe_dump(value)}" for key, value in change.items()]
    before, after = demo(), load_config(FOLDER / "demo.yaml", overrides)
    changed = {
        stage
        for stage in wf.STAGES
        if wf.stage_hash(before, stage, arm_of(stage)) != wf.stage_hash(after, stage, arm_of(stage))
    }
    assert changed == expected


def arm_of(stage: str) -> str | None:
    return None if stage in ("prepare", "report") else "mamba2"


def test_another_arm_changes_nothing_for_this_one():
    before = demo()
    arms = [arm.model_dump() for arm in before.arms]
    after = demo(arms=[*arms, {"name": "new", "mixer": "transformer"}])
    assert wf.stage_hash(before, "train", "mamba2") == wf.stage_hash(after, "train", "mamba2")


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


def test_only_ham_arms_have_a_page_of_kept_tokens():
    assert wf.inspection_pages(demo()) == ["reports/demo/inspect/ham-cosine-seed0.html"]
    assert wf.inspection_pages(demo(arms=[{"name": "t", "mixer": "transformer"}])) == []


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
