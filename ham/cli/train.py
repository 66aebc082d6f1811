"""`ham train`: train one arm with one seed, resuming where an earlier attempt stopped.

Where the configuration has a `tuning` section the learning rate comes from `ham tune` (`--tuned`).
A tuning run (`--learning-rate`) uses the tuning seed and writes rows only.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ham.config import Config
    from ham.job import Job

TUNING_ROWS = "tuning.rows.jsonl"


def register(subparsers: argparse._SubParsersAction) -> None:
    """Add the parser of `ham train`."""
    parser = subparsers.add_parser("train", help="train one arm with one seed (resumable)")
    from ham.job import add_job_arguments

    add_job_arguments(parser)
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoint and rows")
    parser.add_argument(
        "--state",
        type=Path,
        default=Path("results/.state"),
        help="root of the resumable states (default: %(default)s)",
    )
    rate = parser.add_mutually_exclusive_group()
    rate.add_argument(
        "--tuned", type=Path, metavar="FILE", help="learning rate that `ham tune` chose"
    )
    rate.add_argument(
        "--learning-rate", type=float, metavar="RATE", help="a tuning run: rows and no checkpoint"
    )
    parser.set_defaults(handler=run)


def run(arguments: argparse.Namespace) -> int:
    """Train, write checkpoint, manifest and rows."""
    from ham.config_files import load_config
    from ham.failure import clear_failure, write_failure
    from ham.job import open_job
    from ham.report.rows import RowWriter
    from ham.train.loop import Trainer, expected_rows
    from ham.train.tuning import failed_choice

    config = load_config(arguments.config, arguments.overrides)
    failed_before = failed_choice(arguments.tuned) if arguments.keep_going else None
    if failed_before is None:
        arguments.overrides = [*arguments.overrides, *rate_overrides(arguments, config)]
    checkpoint = arguments.out / "checkpoint"
    trainer: Trainer | None = None

    def train() -> RowWriter:
        nonlocal trainer
        trainer = Trainer(job, arguments.data, arguments.state)
        return trainer.run(arguments.out)

    with open_job(arguments, "train") as job:
        if arguments.learning_rate is not None:
            _tune(job, arguments)
            return 0
        clear_failure(checkpoint)
        writer = job.attempt(train, failed_before)
        if writer is None:
            writer = job.error_writer(expected_rows(trainer.step if trainer else 0))
            write_failure(checkpoint, job.failure)
        job.finish(writer, arguments.out / "train.rows.jsonl")
        if trainer and not job.failure:
            trainer.discard_state()
    return 0


def rate_overrides(arguments: argparse.Namespace, config: Config) -> list[str]:
    """What the chosen or tried learning rate changes in the configuration.

    Raises:
        ConfigError: For a rate or a seed that is not the tuning section's, or none where it asks
            for one.
    """
    from ham.errors import ConfigError
    from ham.train.tuning import chosen_rate, legal_rate, tuning_of

    if arguments.tuned is not None:
        tuning_of(config)
        return [_rate_override(chosen_rate(arguments.tuned, config, arguments.arm))]
    if arguments.learning_rate is None:
        if config.tuning is not None:
            raise ConfigError(
                f"configuration {config.name!r} has a tuning section: give --tuned FILE of "
                "`ham tune`, or --learning-rate for a tuning run"
            )
        return []
    tuning = tuning_of(config)
    if arguments.seed != tuning.seed:
        raise ConfigError(
            f"a tuning run has seed tuning.seed, {tuning.seed}; received {arguments.seed}"
        )
    rate = legal_rate(config, arguments.learning_rate, "--learning-rate")
    # An arm may have seeds and steps of its own; in tuning runs all have the same.
    same = {"seeds": None} if tuning.steps is None else {"seeds": None, "steps": None}
    arms = [arm.model_copy(update=same).model_dump(mode="json") for arm in config.arms]
    overrides = [
        _rate_override(rate),
        f"seeds=[{tuning.seed}]",
        "tuning=null",
        f"arms={json.dumps(arms)}",
    ]
    return overrides if tuning.steps is None else [*overrides, f"train.steps={tuning.steps}"]


def _rate_override(rate: float) -> str:
    """As YAML writes it: what Python calls 1e-05 is a text there."""
    import yaml

    return f"train.learning_rate={yaml.safe_dump(rate).split()[0]}"


def _tune(job: Job, arguments: argparse.Namespace) -> None:
    """Train without a checkpoint; what fails at one rate is a row with its error."""
    from ham.report.rows import RowWriter
    from ham.train.loop import Trainer
    from ham.train.tuning import EXPERIMENT, LABEL, METRIC, TASKS, as_tuning_rows

    rate, steps = arguments.learning_rate, job.config.train.steps
    trainer: Trainer | None = None

    def train() -> RowWriter:
        nonlocal trainer
        trainer = Trainer(job, arguments.data, arguments.state)
        writer = trainer.run(None)
        writer.rows = as_tuning_rows(writer.rows, rate)
        return writer

    job.keep_going = True
    writer = job.attempt(train)
    if writer is None:
        where = {"experiment": EXPERIMENT, "metric": METRIC, "task": TASKS[-1]}
        where["labels"] = {LABEL: rate}
        writer = job.error_writer([{**where, "x_name": "step", "x_value": steps}])
    job.finish(writer, arguments.out / TUNING_ROWS)
    if trainer:
        trainer.discard_state()
