"""Running batches: what is kept, what fails alone, what a new model makes void."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import yaml

import ham.cli
from ham.batch.keys import is_done, key_path
from ham.batch.run import run_tasks
from ham.batch.tasks import Task, Tasks
from ham.config_files import load_config
from ham.files import write_json, write_text
from ham.train.tuning import Choice, write_choice

VALUES = {
    "name": "tiny",
    "device": "cpu",
    "seeds": [0, 1],
    "arms": [{"name": "a", "mixer": "transformer"}, {"name": "b", "mixer": "transformer"}],
    "tuning": {"learning_rates": [0.001, 0.002]},
    "measure": None,
}


class Commands:
    """Stands for `ham`: writes the files of a job, fails or dies where told to."""

    def __init__(self, tasks: Tasks):
        self.tasks = tasks
        self.done: list[str] = []
        self.recorded: list[list[str]] = []
        self.fails: dict[str, int | BaseException] = {}

    def __call__(self, command: list[str]) -> int:
        task = next(task for task in self.tasks.all if self.tasks.command(task) == command)
        self.recorded.append(sys.argv[1:])
        print("working on", task.name)
        outcome = self.fails.get(task.name, 0)
        if isinstance(outcome, BaseException):
            raise outcome
        if outcome:
            print("ham: error: no good", file=sys.stderr)
            return outcome
        self.done.append(task.name)
        if task.stage == "tune":
            write_choice(self.tasks.result(task), Choice(task.arm, 0.001, {0.001: 1.0}, None))
        for file in self.tasks.files(task) if task.stage != "tune" else ():
            write_text(file, f"{task.name}\n")
        if task.stage == "train" and task.rate is None:
            write_text(f"{self.tasks.checkpoint(task)}/model.json", "{}")
        return 0


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tasks:
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_text(yaml.safe_dump(VALUES))
    made = Tasks(load_config("config.yaml"), "config.yaml")
    write_json(f"{made.data}/data.json", {"made": "once"})
    return made


@pytest.fixture
def commands(tasks: Tasks, monkeypatch: pytest.MonkeyPatch) -> Commands:
    made = Commands(tasks)
    monkeypatch.setattr(ham.cli, "main", made)
    # Collecting the garbage of a process that has loaded torch takes a third of a second.
    monkeypatch.setattr("ham.batch.run._start_job", lambda new_arm: None)
    return made


def test_a_second_run_keeps_everything(tasks: Tasks, commands: Commands):
    first = run_tasks(tasks, tasks.all)
    assert first.ran == [task.name for task in tasks.all]
    second = run_tasks(tasks, tasks.all)
    # The choice of a rate takes no time and leaves no key.
    assert second.ran == ["tune a", "tune b"]
    assert len(second.kept) == len(tasks.all) - 2
    assert commands.recorded == [
        *(tasks.command(task) for task in tasks.all),
        *(tasks.command(Task("tune", arm)) for arm in "ab"),
    ]


def test_a_failing_job_stops_only_those_that_need_it(tasks: Tasks, commands: Commands):
    commands.fails = {"train a seed 0": 2, "evaluate b seed 1": ValueError("broken")}
    outcome = run_tasks(tasks, tasks.all)
    assert outcome.left_out == ["evaluate a seed 0"]
    assert outcome.failed["train a seed 0"].startswith("no good (see ")
    assert outcome.failed["evaluate b seed 1"].startswith("ValueError: broken (see ")
    assert "train a seed 1" in outcome.ran
    log = Path(tasks.log(Task("evaluate", "b", 1))).read_text()
    assert "working on evaluate b seed 1" in log
    assert "Traceback" in log


def test_a_killed_batch_goes_on_with_the_job_that_it_was_at(tasks: Tasks, commands: Commands):
    commands.fails = {"train a seed 1": SystemExit(143)}
    with pytest.raises(SystemExit):
        run_tasks(tasks, tasks.all)
    before = list(commands.done)
    assert before[-1] == "evaluate a seed 0"
    commands.fails = {}
    outcome = run_tasks(tasks, tasks.all)
    assert outcome.ran[:2] == ["tune a", "train a seed 1"]
    assert set(before) - {"tune a"} == set(outcome.kept)


def test_a_model_trained_anew_is_evaluated_anew(tasks: Tasks, commands: Commands):
    run_tasks(tasks, tasks.all)
    key_path(tasks.result(Task("train", "a", 0))).unlink()
    # Killed after training: the old evaluation must not pass for one of the new model.
    commands.fails = {"evaluate a seed 0": SystemExit(143)}
    with pytest.raises(SystemExit):
        run_tasks(tasks, tasks.all)
    assert is_done(tasks, Task("train", "a", 0))
    assert not is_done(tasks, Task("evaluate", "a", 0))
    assert is_done(tasks, Task("evaluate", "a", 1))


def test_other_data_another_rate_and_a_lost_checkpoint_undo_a_job(tasks: Tasks, commands: Commands):
    run_tasks(tasks, tasks.all)
    train, evaluate = Task("train", "a", 0), Task("evaluate", "a", 0)
    weights = Path(tasks.checkpoint(train)) / "model.json"
    weights.unlink()
    weights.parent.rmdir()
    assert is_done(tasks, train), "nobody needs the checkpoint any more"
    key_path(tasks.result(evaluate)).unlink()
    assert not is_done(tasks, train), "its evaluation needs the checkpoint"
    other = Task("train", "b", 0)
    write_choice(tasks.tuned(other), Choice("b", 0.002, {0.002: 1.0}, None))
    assert not is_done(tasks, other)
    write_json(f"{tasks.data}/data.json", {"made": "again"})
    assert not any(is_done(tasks, task) for task in tasks.all)
