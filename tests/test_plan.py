from __future__ import annotations

import functools
from pathlib import Path

import pytest

from ham.cli import main
from ham.config import Config
from ham.config_files import load_config
from ham.errors import ConfigError
from ham.fingerprint import repository_root
from ham.plan import Plan, format_plan, readable_bytes
from ham.plan_gpu import (
    COMPILE_SECONDS,
    PROCESS_SECONDS,
    GpuTimes,
    format_batches,
    measured_speeds,
)
from ham.plan_note import note_lines, with_note
from ham.plan_schedule import SHARED_GAIN, Process, wall_minutes
from ham.report.manifest import collect_manifest, manifest_path, write_manifest
from ham.report.rows import Row, write_rows

FOLDER = repository_root() / "workflow/config"


@functools.cache
def planned(name: str) -> Plan:
    """The plan of a shipped configuration; that of the large one takes seconds."""
    return Plan(config(name), cores=16)


def config(name: str, *overrides: str) -> Config:
    return load_config(FOLDER / f"{name}.yaml", overrides)


@pytest.mark.parametrize("name", ["demo", "h100"])
def test_command_works_for_every_configuration(name: str, capsys: pytest.CaptureFixture):
    assert main(["plan", str(FOLDER / f"{name}.yaml")]) == 0
    printed = capsys.readouterr().out
    for word in ("parameters", "minutes", "disk", "checkpoints", "assumed", "ham-cosine"):
        assert word in printed


def test_the_paper_configuration_says_that_it_was_not_run():
    assert "not run" in format_plan(planned("paper"))


@pytest.mark.parametrize("name", ["demo", "h100", "h100-c", "paper"])
def test_parameters_agree_within_one_percent(name: str):
    counts = [arm.parameters for arm in planned(name).arms]
    assert max(counts) - min(counts) <= 0.01 * counts[0]


def test_jobs_are_arms_times_seeds():
    plan = planned("h100")
    jobs = {stage.stage: stage.jobs for stage in plan.stages}
    assert jobs == {
        "prepare": 1,
        "tune": 27,
        "train": 48,
        "evaluate": 48,
        "measure": 14,
        "inspect": 1,
        "report": 1,
    }


def test_training_arithmetic_is_three_forward_passes():
    steps, batch = 10, 4
    plan = Plan(
        config(
            "demo",
            f"train.steps={steps}",
            f"train.batch_size={batch}",
            "train.validation_every=10",
            "train.validation_batches=1",
            "arms=[{name: t, mixer: transformer}]",
        ),
        cores=2,
    )
    # One layer by hand: QKV and output projections, causal pairs, SwiGLU of width 344; then logits
    # over 320 padded rows.
    tokens, width, hidden, layers = 512, 128, 344, 2
    projections = 2 * tokens * width * 4 * width
    attention = 2 * (tokens * (tokens + 1) / 2) * 2 * width
    mlp = 2 * tokens * width * 3 * hidden
    forward = layers * (projections + attention + mlp) + 2 * tokens * width * 320
    assert plan.arms[0].train_flops == pytest.approx(forward * batch * (3 * steps + 1), rel=0.01)


def test_disk_of_checkpoints_is_four_bytes_a_parameter():
    plan = Plan(config("demo", "seeds=[0, 1]"), cores=2)
    assert plan.checkpoint_bytes == 2 * 4 * sum(arm.parameters for arm in plan.arms)


def test_more_cores_make_it_shorter_and_more_steps_longer():
    minutes = Plan(config("demo"), cores=1).minutes
    assert Plan(config("demo"), cores=2).minutes < minutes
    assert Plan(config("demo", "train.steps=5000"), cores=1).minutes > minutes


def test_larger_token_ids_need_wider_shards():
    small = planned("paper")
    assert small.token_bytes == 2 * small.corpus_tokens
    name = "hub:some/tokenizer-of-unknown-size"
    assert Plan(config("paper", f"data.tokenizer='{name}'"), 2).vocabulary_size == 50_304


@pytest.mark.parametrize(
    ("count", "text"), [(999, "999 B"), (1500, "1.5 kB"), (2.5e9, "2.5 GB"), (3e15, "3e+03 TB")]
)
def test_readable_bytes(count: float, text: str):
    assert readable_bytes(count) == text


def test_tier_a_fits_into_the_time_of_one_gpu_and_is_balanced_over_several():
    plan = planned("h100")
    assert 20 < plan.gpu_minutes < 50
    batches = plan.gpu.processes[: len(plan.gpu.batch_minutes)]
    shares = plan.gpu.shares
    # On two GPUs the last process, which times alone, and the longest arm leave one of them idle.
    for gpus, slower in ((1, 1.25), (2, 1.6)):
        assert wall_minutes(batches, gpus, shares) < slower * plan.gpu_minutes / gpus


def test_arms_of_main_claims_come_first():
    names = [arm.name for arm in config("h100").arms]
    assert names[:6] == [
        *("transformer", "transformer-conv", "gated-delta-rule", "ham-cosine"),
        *("ham-random", "hybrid-3-to-1"),
    ]


def test_processes_go_to_the_gpu_that_is_free_first():
    minutes = [4.0, 3.0, 2.0, 5.0, 1.0]
    processes = [Process(str(number), one) for number, one in enumerate(minutes)]
    assert wall_minutes(processes, 1) == sum(minutes)
    # The first GPU: 4, then 5; the second: 3, 2, then 1.
    assert wall_minutes(processes[:3], 2) == 5.0
    assert wall_minutes(processes, 2) == 9.0
    assert wall_minutes([], 2) == 0.0
    with pytest.raises(ConfigError, match="--gpus must be at least 1, received 0"):
        wall_minutes(processes, 0)


def test_processes_share_a_gpu_unless_they_need_all_of_it():
    shared = [Process("a", 4.0), Process("b", 3.0), Process("c", 2.0)]
    assert wall_minutes(shared, 1, shares=2) == 5.0
    assert wall_minutes([*shared, Process("d", 1.0, shares=2)], 1, shares=2) == 6.0


def test_a_process_waits_for_those_whose_results_it_reads():
    processes = [Process("a", 4.0), Process("b", 2.0, needs=(0,)), Process("c", 3.0)]
    assert wall_minutes(processes, 1) == 9.0
    # b begins when a ends, though the second GPU is free from minute 3 on.
    assert wall_minutes(processes, 2) == 6.0


def test_the_plan_says_wall_time_and_has_the_study():
    printed = "\n".join(format_batches(planned("h100").gpu, gpus=4))
    for words in ("wall time with 1 GPU: ", "wall time with 4 GPUs: ", "mqar random-d64"):
        assert words in printed


def test_minutes_of_processes_are_those_of_their_jobs():
    gpu = planned("h100").gpu
    shared = gpu.minutes("train", tuning=True) + sum(
        gpu.minutes(stage) for stage in ("train", "tune", "evaluate", "inspect")
    )
    by_stage = shared / SHARED_GAIN + gpu.minutes("measure")
    assert sum(gpu.batch_minutes) == pytest.approx(by_stage)
    first, second = gpu.costs[:2]
    assert first.seconds - second.seconds == pytest.approx(PROCESS_SECONDS + COMPILE_SECONDS)


def test_a_measured_speed_takes_the_place_of_the_assumed_one(tmp_path: Path):
    described = config("h100")
    manifest = collect_manifest(described.model_dump(mode="json"), ["ham"])
    rows = tmp_path / "published/x/transformer-seed0-train.rows.jsonl"
    common = {"experiment": "train", "model": "transformer", "mixer": "transformer"}
    speed = {"metric": "steady_tokens_per_second", "value": 5e6, "device": "NVIDIA H100"}
    write_rows(rows, [Row(**common, **speed)])
    write_manifest(manifest_path(rows), manifest)
    assert list(measured_speeds(tmp_path).values()) == [5e6]
    arms = Plan(described, cores=16).arms
    times = GpuTimes(described, arms, tmp_path)
    assert times.tokens_per_second("transformer") == (5e6, True)
    assert times.tokens_per_second("ham-cosine")[1] is False
    other = config("h100", "train.batch_size=16")
    assert GpuTimes(other, arms, tmp_path).tokens_per_second("transformer")[1] is False


def test_the_estimate_in_the_paper_configuration_is_that_of_the_cost_model():
    text = (FOLDER / "paper.yaml").read_text()
    assert with_note(text, note_lines(planned("paper"))) == text
    with pytest.raises(ConfigError, match="estimates GPU hours"):
        note_lines(Plan(config("demo"), cores=1))
