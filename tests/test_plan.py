from __future__ import annotations

import pytest

from ham.cli import main
from ham.config import Config
from ham.config_files import load_config
from ham.fingerprint import repository_root
from ham.plan import Plan, readable_bytes

FOLDER = repository_root() / "workflow/config"


def config(name: str, *overrides: str) -> Config:
    return load_config(FOLDER / f"{name}.yaml", overrides)


@pytest.mark.parametrize("name", ["demo", "h100", "paper"])
def test_command_works_for_every_configuration(name: str, capsys: pytest.CaptureFixture):
    assert main(["plan", str(FOLDER / f"{name}.yaml")]) == 0
    printed = capsys.readouterr().out
    for word in ("parameters", "minutes", "disk", "checkpoints", "assumed", "ham-cosine"):
        assert word in printed


def test_the_paper_configuration_says_that_it_was_not_run(capsys: pytest.CaptureFixture):
    main(["plan", str(FOLDER / "paper.yaml")])
    assert "not run" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["demo", "h100", "paper"])
def test_parameters_agree_within_one_percent(name: str):
    counts = [arm.parameters for arm in Plan(config(name), cores=2).arms]
    assert max(counts) - min(counts) <= 0.01 * counts[0]


def test_jobs_are_arms_times_seeds():
    plan = Plan(config("h100"), cores=16)
    jobs = {stage.stage: stage.jobs for stage in plan.stages}
    assert jobs == {
        "prepare": 1,
        "tune": 24,
        "train": 18,
        "evaluate": 18,
        "measure": 6,
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
    small = Plan(config("paper"), cores=2)
    assert small.token_bytes == 2 * small.corpus_tokens
    name = "hub:some/tokenizer-of-unknown-size"
    assert Plan(config("paper", f"data.tokenizer='{name}'"), 2).vocabulary_size == 50_304


@pytest.mark.parametrize(
    ("count", "text"), [(999, "999 B"), (1500, "1.5 kB"), (2.5e9, "2.5 GB"), (3e15, "3e+03 TB")]
)
def test_readable_bytes(count: float, text: str):
    assert readable_bytes(count) == text
