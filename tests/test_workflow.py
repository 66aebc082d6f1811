from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from snakemake_calls import ROOT, planned_jobs, snakemake, write_yaml

from ham import workflow as wf
from ham.config import Config
from ham.config_files import load_config
from ham.errors import ConfigError, DeviceError

FOLDER = ROOT / "workflow/config"


def demo(**changes: object) -> Config:
    values = yaml.safe_load((FOLDER / "demo.yaml").read_text())
    return wf.parse_workflow_config({**values, **changes})


@pytest.mark.parametrize(
    ("name", "jobs"),
    [
        ("demo", {"train": 6, "evaluate": 6, "measure": 6, "study": 1, "total": 23}),
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
    jobs = {"prepare": 1, "batch": 19, "study": 4, "report": 1, "all": 1}
    assert found == {**jobs, "total": sum(jobs.values())}


def test_a_study_runs_beside_any_configuration(tmp_path: Path):
    config = ["--configfile", str(FOLDER / "paper.yaml")]
    found = planned_jobs(tmp_path, *config, "--cores", "2", "mqar")
    assert found == {"study": 4, "mqar": 1, "total": 5}


def test_the_demo_is_the_default(tmp_path: Path):
    default = planned_jobs(tmp_path)
    assert default == planned_jobs(tmp_path, "--configfile", str(FOLDER / "demo.yaml"))


@pytest.mark.parametrize("profile", ["default", "slurm"])
def test_profiles_dry_run(profile: str, tmp_path: Path):
    folder = ROOT / "workflow/profiles" / profile
    config = ["--configfile", str(FOLDER / "h100.yaml")]
    assert planned_jobs(tmp_path, "--profile", str(folder), *config)["batch"] == 19


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


def test_decisions_are_compared_where_a_threshold_makes_them():
    rows = "reports/demo/inspect/ham-cosine-seed0.rows.jsonl"
    assert wf.inspection_options(demo()) == ["--rows", rows, "--agreement"]
    assert wf.inspection_files(demo())[1:] == [rows, rows.replace(".rows.jsonl", ".manifest.json")]
    bounded = {"name": "h", "mixer": "ham", "options": {"budget": "bounded"}}
    assert wf.inspection_options(demo(arms=[bounded]))[2:] == []
    assert wf.inspection_options(demo(arms=[{"name": "t", "mixer": "transformer"}])) == []


def test_only_ham_arms_have_a_page_of_kept_tokens():
    assert wf.inspection_pages(demo()) == ["reports/demo/inspect/ham-cosine-seed0.html"]
    assert wf.inspection_pages(demo(arms=[{"name": "t", "mixer": "transformer"}])) == []
