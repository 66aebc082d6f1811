"""The jobs of a batch: order, who reads what, which share a process."""

from __future__ import annotations

import pytest

from ham.batch.tasks import Task, Tasks
from ham.cli import build_parser
from ham.config_files import parse_config
from ham.errors import ConfigError
from ham.workflow import rows_files

VALUES = {
    "name": "tiny",
    "seeds": [0, 1],
    "arms": [
        {"name": "transformer", "mixer": "transformer", "seeds": [0, 1, 2]},
        {
            "name": "evicted",
            "checkpoint_of": "transformer",
            "eviction": {"policy": "random", "fraction": 0.5},
        },
        {"name": "ham", "mixer": "ham"},
        {"name": "ham-half", "mixer": "ham", "options": {"target": 0.5}, "tuned_like": "ham"},
    ],
    "tuning": {"learning_rates": [0.001, 0.002]},
}


def tasks(**changes: object) -> Tasks:
    return Tasks(parse_config({**VALUES, **changes}), "config.yaml")


def test_every_job_comes_after_those_that_it_reads():
    made = tasks()
    for index, task in enumerate(made.all):
        assert set(made.needs(task)) <= set(made.all[:index]), task


def test_there_is_one_job_for_every_file_of_rows():
    made = tasks()
    results = [made.result(task) for task in made.all]
    assert len(set(results)) == len(results)
    assert {name for name in results if name.endswith(".jsonl")} == set(rows_files(made.config))


def test_an_arm_stays_in_one_process_where_it_fits():
    made = tasks(workflow={"jobs_per_process": 10})
    # transformer: 2 rates, choice, 3 × (train, evaluate), measure; ham: a seed less, and a page.
    assert [len(batch) for batch in made.batches] == [10, 9, 8]
    assert [{task.arm for task in batch} for batch in made.batches] == [
        {"transformer"},
        {"ham"},
        {"ham-half", "evicted"},
    ]
    assert [made.earlier_batches(number) for number in range(3)] == [[], [], [0, 1]]


def test_what_times_comes_last_and_alone_where_processes_share_a_gpu():
    made = tasks(workflow={"jobs_per_process": 10, "processes_per_gpu": 3})
    alone = [number for number in range(len(made.batches)) if made.is_alone(number)]
    assert alone == [len(made.batches) - 1]
    assert {task.stage for task in made.batches[-1]} == {"measure"}
    assert "measure" not in {task.stage for batch in made.batches[:-1] for task in batch}
    assert {task for batch in made.batches for task in batch} == set(made.all)
    assert made.earlier_batches(len(made.batches) - 1)
    assert all(map(tasks().is_alone, range(len(tasks().batches))))


def test_an_arm_too_large_for_a_process_is_cut():
    made = tasks(workflow={"jobs_per_process": 4})
    assert max(map(len, made.batches)) == 4
    assert [task for batch in made.batches for task in batch] == made.all


def test_an_arm_tuned_like_another_reads_its_rate():
    made = tasks()
    train = Task("train", "ham-half", 0)
    assert made.needs(train) == [Task("tune", "ham")]
    assert "results/runs/tiny/tuning/ham/chosen.json" in made.command(train)
    assert not [task for task in made.all if task.rate and task.arm == "ham-half"]


def test_every_command_is_one_that_ham_understands():
    made, parser = tasks(), build_parser()
    for task in made.all:
        parsed = parser.parse_args(made.command(task))
        assert parsed.handler.__module__ == f"ham.cli.{task.stage}"


def test_arms_and_seeds_choose_jobs():
    made = tasks()
    chosen = made.select(["ham"], [1])
    assert {task.arm for task in chosen} == {"ham"}
    assert [task.name for task in chosen] == [
        "tuning ham rate 0.001",
        "tuning ham rate 0.002",
        "tune ham",
        "train ham seed 1",
        "evaluate ham seed 1",
    ]
    with pytest.raises(ConfigError, match="unknown seed 7; known: 0, 1, 2"):
        made.select(None, [7])


def test_a_batch_changes_with_what_its_jobs_read():
    shared = {"workflow": {"jobs_per_process": 10}}
    before, after = tasks(**shared), tasks(**shared, evaluate={"recall": {"samples": 2}})
    assert before.batch_hash(0) != after.batch_hash(0)
    assert before.batch_code(0) == after.batch_code(0)


@pytest.mark.parametrize(
    ("arm", "message"),
    [
        ({"tuned_like": "nobody"}, "not an earlier arm with a rate of its own; legal: transformer"),
        ({"tuned_like": "ham-half"}, "legal: transformer, ham"),
        ({"seeds": [1, 1]}, "seeds must differ"),
        ({"seeds": [1000]}, "tuning.seed 1000 must not be one of the reported seeds"),
    ],
)
def test_wrong_seeds_and_rates_are_refused(arm: dict, message: str):
    arms = [{"name": "last", "mixer": "ham", **arm}]
    if arm.get("tuned_like") != "nobody":
        arms = [*VALUES["arms"], *arms]
    else:
        arms = [VALUES["arms"][0], *arms]
    with pytest.raises(ConfigError, match=message):
        tasks(arms=arms)


def test_an_evicted_arm_has_only_seeds_that_were_trained():
    arms = [{**VALUES["arms"][0], "seeds": [0]}, VALUES["arms"][1]]
    with pytest.raises(ConfigError, match="'transformer' is not trained with seed 1"):
        tasks(arms=arms)
