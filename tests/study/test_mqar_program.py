"""Runs in one program against the same runs alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from ham.config import ArmConfig
from ham.errors import RoutingError
from ham.fingerprint import repository_root
from ham.study import groups, program
from ham.study.config import MqarConfig, Task
from ham.study.model import RecallModel
from ham.study.program import JointData, NotOneProgramError, Program
from ham.study.runs import Run, Surroundings
from ham.study.training import Trainer, TrainingData

CPU = torch.device("cpu")
STEPS = 4
# Two tasks, two seeds, and two rates for one of them.
RUNS = [("blank", 0, 0.01), ("random", 1, 0.01), ("random", 1, 0.03)]
PARTS = [0, 1, 1]


def shipped_arms() -> dict[str, dict]:
    """The arms of the study, with windows and slots for short texts."""
    values = yaml.safe_load((repository_root() / "workflow/config/mqar.yaml").read_text())
    arms = {arm["name"]: arm for arm in values["arms"]}
    for arm in arms.values():
        options = arm.get("options", {})
        arm["options"] = {**options, **{k: 6 for k in ("window", "slots") if k in options}}
    return arms


ARMS = shipped_arms()


def study(tiny_study, arm: str, **train: object) -> MqarConfig:
    return tiny_study(
        arms=[ARMS[arm]],
        tasks=[{"filler": "blank"}, {"filler": "random"}],
        train={"steps": STEPS, "batch_size": 2, "freeze_fraction": 0.75, **train},
    )


def models(config: MqarConfig) -> list[RecallModel]:
    made = []
    for filler, seed, rate in RUNS:
        torch.manual_seed(seed)
        run = Run(config.arms[0], Task(filler=filler), 32, seed, rate)
        # In float64, so that the order of sums does not hide a mistake.
        made.append(RecallModel(config, run.seeded_arm, run.task, 32).double())
    return made


def data(config: MqarConfig) -> list[TrainingData]:
    distinct = dict.fromkeys((filler, seed) for filler, seed, _ in RUNS)
    return [TrainingData(config, Task(filler=f), seed, STEPS, CPU) for f, seed in distinct]


def move_thresholds(steps: Program | Trainer) -> None:
    """Off the scores of the calibration: where one comes again, rounding would decide."""
    for model in steps.models:
        for controller in model.controllers:
            controller.threshold.mul_(1 - 1e-3)


def one_program(config: MqarConfig) -> Program:
    rates = [rate for *_, rate in RUNS]
    return Program(models(config), JointData(data(config)), PARTS, config.train, rates)


def train(steps: Program | Trainer) -> None:
    for _ in range(STEPS):
        steps.advance()


@pytest.mark.parametrize(
    "arm", [name for name in ARMS if name not in ("ham-cosine", "ham-prefix", "transformer")]
)
def test_every_run_is_what_it_is_alone(tiny_study, arm: str):
    # Thresholds are calibrated once more after the last step.
    config = study(tiny_study, arm, freeze_fraction=1.0)
    together = one_program(config)
    together.start()
    move_thresholds(together)
    train(together)
    parts = data(config)
    for run, model in enumerate(models(config)):
        alone = Trainer(model, parts[PARTS[run]], config.train, RUNS[run][2])
        alone.start()
        move_thresholds(alone)
        before = [parameter.clone() for parameter in model.parameters()]
        train(alone)
        assert together.losses_of(run) == pytest.approx(alone.losses(), rel=1e-6)
        learned = dict(together.models[run].state_dict())
        for name, value in model.state_dict().items():
            torch.testing.assert_close(learned[name], value, rtol=1e-6, atol=1e-8, equal_nan=True)
        assert all(bool(controller.frozen) for controller in model.controllers if arm != "hola")
        moved = [
            not torch.equal(old, new)
            for old, new in zip(before, together.models[run].parameters(), strict=True)
        ]
        assert all(moved), "the views follow the weights of the program"


@pytest.mark.parametrize("arm", ["ham-learned", "transformer"])
def test_recorded_steps_leave_no_trace_of_the_warm_up(
    tiny_study, monkeypatch: pytest.MonkeyPatch, arm: str
):
    """Everything of a capture but the recording itself, which needs a GPU."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    monkeypatch.setattr(Program, "_record", lambda self, work, pool: work)
    found = []
    for captured in (False, True):
        steps = one_program(study(tiny_study, arm))
        steps.start()
        addresses = [x.data_ptr() for x in steps.stacked.tensors()]
        if captured:
            steps._capture()
        train(steps)
        assert addresses == [x.data_ptr() for x in steps.stacked.tensors()], "graphs hold these"
        found.append([steps.losses_of(run) for run in range(len(RUNS))])
    assert found[0] == found[1]


def test_a_run_that_diverges_fails_alone(tiny_study):
    found = []
    for broken in (False, True):
        steps = one_program(study(tiny_study, "ham-committed"))
        steps.start()
        steps.advance()
        if broken:
            with torch.no_grad():
                steps.models[1].blocks[0].mixer.qkv.weight.fill_(torch.nan)
        for _ in range(STEPS - 1):
            steps.advance()
        found.append(steps)
    with pytest.raises(ArithmeticError, match="the loss is nan at step 2"):
        found[1].losses_of(1)
    for run in (0, 2):
        assert found[1].losses_of(run) == found[0].losses_of(run)
        assert all(controller.frozen for controller in found[1].models[run].controllers)
    # The calibration saw the scores of that run, and the others had theirs all the same.
    assert isinstance(found[1]._errors[1], RoutingError)
    assert set(found[1]._errors) == {1}


def test_runs_that_are_not_alike_are_found_out(tiny_study):
    steps = one_program(study(tiny_study, "transformer"))
    steps.models[2].blocks[1].mixer_norm.eps = 0.1
    with pytest.raises(NotOneProgramError, match="gradient of run 3 of 3"):
        steps.start()


@pytest.fixture
def around(tiny_study, tmp_path: Path) -> Surroundings:
    size = {"length": 32, "pairs": 3}
    config = tiny_study(
        arms=[ARMS["ham-oracle"], ARMS["transformer"]],
        seeds=[0, 1, 2],
        tasks=[
            {"filler": "blank"},
            {"filler": "random"},
            {"filler": "random", "updates": 1, "mixture": [size], "sizes": [size]},
        ],
        train={"steps": 3, "runs_per_program": 4},
    )
    codes = dict.fromkeys(("ham", "transformer"), "0" * 12)
    return Surroundings(config, tmp_path, CPU, "a CPU", {"manifest_id": "m"}, codes)


def test_runs_of_one_arm_width_and_mixture_share_a_program(around: Surroundings):
    config = around.config
    runs = [
        Run(arm, task, width, seed, 0.01)
        for seed in config.seeds
        for task in config.tasks
        for width in (32, 64)
        for arm in config.arms
    ]
    programs = around.programs(runs)
    assert sorted(run.name for runs in programs for run in runs) == sorted(r.name for r in runs)
    # Six of the first two tasks, in halves because four is the most, and three of the last.
    assert [len(runs) for runs in programs] == [3, 3] * 4 + [3] * 4
    for runs in programs:
        assert len({(run.arm.name, run.width, str(config.mixture(run.task))) for run in runs}) == 1
    arms = [runs[0].arm.name for runs in programs[:4]]
    assert arms == ["ham-oracle", "ham-oracle", "transformer", "transformer"]
    tuned = [Run(config.arms[0], config.tasks[0], 32, 9, rate, tuning=True) for rate in (1, 2)]
    assert around.programs(tuned) == [tuned]


def test_where_one_program_does_not_work_each_run_is_trained_alone(
    around: Surroundings, monkeypatch: pytest.MonkeyPatch
):
    arm, task = around.config.arms[0], around.config.tasks[0]
    runs = [Run(arm, task, 32, seed, 0.01) for seed in (0, 1)]
    bad = Run(ArmConfig(name="bad", mixer="ham", options={"score": "none"}), task, 32, 0, 0.01)
    monkeypatch.setattr(groups, "write_manifest", lambda path, manifest: None)
    found = {}
    for works in (True, False):
        if not works:
            monkeypatch.setitem(program.AGREEMENT, "float32", -1.0)
        result = groups.GroupRunner(around).run([[runs[0], bad, runs[1]]])
        assert result.failed == 1
        assert [row.error is None for row in (rows[0] for rows in result.rows)] == [1, 0, 1]
        said = [line for line in result.lines if "trained each alone, not in one program" in line]
        assert len(said) == (0 if works else 1), result.lines
        counts = {row.labels.get("in_one_program") for rows in result.rows for row in rows}
        assert counts - {None} == {2 if works else 1}
        losses = [row for rows in result.rows for row in rows if row.metric == "final_loss_nats"]
        found[works] = [row.value for row in losses]
    assert found[True] == pytest.approx(found[False], rel=1e-5)
