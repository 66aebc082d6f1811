"""Whether a job of a batch is done, and by the code, configuration and data of today.

Snakemake judges a whole batch. Which of its jobs an earlier attempt has finished, or another
machine (`ham unpack`), stands in a key beside each result: `train.rows.jsonl` has `train.key.json`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ham.batch.tasks import Task, Tasks
from ham.config_files import load_config
from ham.errors import MissingDataError
from ham.files import read_json, sha256_file, write_json
from ham.train.tuning import failed_choice
from ham.workflow import stage_hash


def key_path(result: str | Path) -> Path:
    """Where the key of a result stands."""
    path = Path(result)
    stem = path.name.removesuffix(".jsonl").removesuffix(".json").removesuffix(".rows")
    return path.with_name(f"{stem}.key.json")


def expected_key(tasks: Tasks, task: Task) -> dict[str, Any]:
    """What the key of a job holds if it is run now.

    Raises:
        MissingDataError: If the data or a learning rate that it needs are not there yet.
    """
    from ham.cli.train import rate_overrides

    arm = tasks.config.arm(task.arm)
    config = tasks.config
    if task.stage == "train" and not (task.rate is None and _no_rate(tasks, task)):
        rate = None if task.rate is None else float(task.rate)
        tuned = tasks.tuned(task)
        asked = argparse.Namespace(arm=arm.name, seed=task.seed, tuned=tuned, learning_rate=rate)
        config = load_config(tasks.config_file, rate_overrides(asked, config))
    return {
        "job": task.name,
        "config_hash": stage_hash(config, task.stage, arm.name),
        "code_fingerprint": tasks.fingerprint(task.stage, arm.name),
        "data": sha256_file(Path(tasks.data) / "data.json"),
    }


def _no_rate(tasks: Tasks, task: Task) -> bool:
    """Whether the arm failed at every learning rate, so that training will only say so."""
    tuned = tasks.tuned(task)
    return tuned is not None and failed_choice(Path(tuned)) is not None


def is_done(tasks: Tasks, task: Task) -> bool:
    """Whether a job's files are there and its key is that of today.

    A checkpoint that is gone counts only while a job that reads it is still to do.
    """
    if task.stage == "tune" or not all(Path(file).is_file() for file in tasks.files(task)):
        return False
    try:
        same = read_json(key_path(tasks.result(task))) == expected_key(tasks, task)
    except MissingDataError:
        return False
    readers = tasks.readers(task)
    if not same or not readers or Path(tasks.checkpoint(task)).is_dir():
        return same
    return all(is_done(tasks, reader) for reader in readers)


def mark_done(tasks: Tasks, task: Task) -> None:
    """Write the key of a job that has just been done."""
    if task.stage != "tune":
        write_json(key_path(tasks.result(task)), expected_key(tasks, task))


def forget_readers(tasks: Tasks, task: Task) -> None:
    """Before a model is trained anew: what read the earlier one is no longer done."""
    for reader in tasks.readers(task):
        key_path(tasks.result(reader)).unlink(missing_ok=True)
