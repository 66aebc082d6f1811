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
    from ham.errors import UnusableModelError
    from ham.job import Job
    from ham.report.rows import RowWriter

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
    import sys

    from ham.config_files import load_config
    from ham.errors import UnusableModelError
    from ham.job import open_job
    from ham.train.loop import Trainer

    config = load_config(arguments.config, arguments.overrides)
    arguments.overrides = [*arguments.overrides, *rate_overrides(arguments, config)]
    with open_job(arguments, "train") as job:
        try:
            trainer = Trainer(job, arguments.data, arguments.state)
        except UnusableModelError as error:
            print(f"ham: warning: {error}", file=sys.stderr)
            _note_unusable(job, arguments, error)
            return 0
        if arguments.learning_rate is not None:
            _tune(job, trainer, arguments)
            return 0
        writer = trainer.run(arguments.out)
        job.finish(writer, arguments.out / "train.rows.jsonl")
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
    overrides = [_rate_override(rate), f"seeds=[{tuning.seed}]", "tuning=null"]
    if tuning.steps is None:
        return overrides
    # An arm may have steps of its own; in tuning runs all have the same.
    arms = [arm.model_copy(update={"steps": None}) for arm in config.arms]
    described = json.dumps([arm.model_dump(mode="json") for arm in arms])
    return [*overrides, f"train.steps={tuning.steps}", f"arms={described}"]


def _rate_override(rate: float) -> str:
    """As YAML writes it: what Python calls 1e-05 is a text there."""
    import yaml

    return f"train.learning_rate={yaml.safe_dump(rate).split()[0]}"


def _tune(job: Job, trainer: object, arguments: argparse.Namespace) -> None:
    """Train without a checkpoint; a loss that is not finite becomes a row with its error."""
    from ham.errors import HamError
    from ham.train.tuning import as_tuning_rows

    rate = arguments.learning_rate
    try:
        writer = trainer.run(None)
        writer.rows = as_tuning_rows(writer.rows, rate)
    except HamError as error:
        writer = job.writer(trainer.model)
        _add_failed_rate(writer, job, rate, " ".join(str(error).split()))
    job.finish(writer, arguments.out / TUNING_ROWS)
    trainer.discard_state()


def _add_failed_rate(writer: RowWriter, job: Job, rate: float, reason: str) -> None:
    from ham.train.tuning import EXPERIMENT, LABEL, METRIC, TASK

    steps = job.config.train.steps
    place = {"task": TASK, "x_name": "step", "x_value": steps, "labels": {LABEL: rate}}
    writer.add(EXPERIMENT, METRIC, None, error=reason, **place)


def _note_unusable(job: Job, arguments: argparse.Namespace, error: UnusableModelError) -> None:
    """Error rows of a model that cannot be trained here; its checkpoint holds the reason."""
    from ham.model.arm import unusable
    from ham.model.checkpoint import save_failure
    from ham.train.tuning import unusable_reason

    writer = job.writer(unusable(job.config, job.arm, str(error)))
    reason = unusable_reason(error)
    if arguments.learning_rate is not None:
        _add_failed_rate(writer, job, arguments.learning_rate, reason)
        job.finish(writer, arguments.out / TUNING_ROWS)
        return
    save_failure(arguments.out / "checkpoint", str(error))
    for task in ("train", "validation"):
        writer.add("train", "loss_nats", None, task=task, x_name="step", x_value=0, error=reason)
    job.finish(writer, arguments.out / "train.rows.jsonl")
