"""An equal learning-rate budget: every arm is trained at the same rates on a seed of its own.

The rate with the lowest loss on held-out rows is used for the seeds that are reported; the tuning
seed never is. Where recall documents are read, text and recall count by their shares of the rows:
text alone would choose rates at which some models never learn to recall. Rows of tuning runs have
experiment `tuning` and carry the rate as a label; a run whose loss is not finite is a row with its
error, and its rate cannot be chosen.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass

from ham.config import Config, TuningConfig
from ham.errors import ConfigError, CorruptFileError, MissingDataError
from ham.files import read_json, write_json
from ham.report.rows import Row

EXPERIMENT = "tuning"
METRIC = "loss_nats"
TASKS = ("mixture", "validation")
"""Held-out rows that decide: the first that a run has."""
LABEL = "learning_rate"
KEPT = (METRIC, "wall_seconds")


@dataclass(frozen=True)
class Choice:
    """The learning rate of one arm and how it was found.

    Attributes:
        losses: Last held-out loss in nats by rate; None where the run failed.
        edge: `lowest` or `highest` if the choice is at that end of the rates tried, so that the
            best rate may lie outside; None otherwise.
    """

    arm: str
    learning_rate: float
    losses: dict[float, float | None]
    edge: str | None


def last_losses(rows: Iterable[Row], arm: str) -> dict[float, Row]:
    """The last deciding loss of each rate that was tried for an arm, failed ones included."""
    of_arm = [
        row
        for row in rows
        if (row.experiment, row.metric, row.model) == (EXPERIMENT, METRIC, arm)
        and row.task in TASKS
    ]
    task = next((task for task in TASKS if any(row.task == task for row in of_arm)), None)
    found: dict[float, Row] = {}
    for row in of_arm:
        # A run that failed has one row, of the last task.
        if row.task != task and row.error is None:
            continue
        rate = float(row.labels[LABEL])
        if rate not in found or (row.x_value or 0) >= (found[rate].x_value or 0):
            found[rate] = row
    return dict(sorted(found.items()))


def choose(rows: Iterable[Row], arm: str, rates: Iterable[float]) -> Choice:
    """The rate with the lowest validation loss, the lower one of equals.

    Raises:
        MissingDataError: If a rate was not tried; names those that were.
        ConfigError: If no rate gave a finite loss.
    """
    found = last_losses(rows, arm)
    wanted = sorted(rates)
    missing = [rate for rate in wanted if rate not in found]
    if missing:
        tried = ", ".join(f"{rate:g}" for rate in found) or "none"
        raise MissingDataError(
            f"no tuning rows of arm {arm!r} at learning rate {missing[0]:g}; tried: {tried}"
        )
    losses = {rate: found[rate].value for rate in wanted}
    if best_rate(losses) is None:
        raise ConfigError(
            f"no learning rate of arm {arm!r} gave a finite loss "
            f"({found[wanted[0]].error}); lower tuning.learning_rates ({wanted})"
        )
    best = best_rate(losses)
    return Choice(arm, best, losses, edge_of(best, losses))


def best_rate(losses: Mapping[float, float | None]) -> float | None:
    """The rate with the lowest loss, the lower one of equals; None where all failed."""
    good = {rate: loss for rate, loss in losses.items() if loss is not None}
    return min(good, key=lambda rate: (good[rate], rate), default=None)


def edge_of(rate: float | None, losses: Mapping[float, float | None]) -> str | None:
    """`lowest` or `highest` where a rate is at that end of those tried, else None."""
    return {min(losses): "lowest", max(losses): "highest"}.get(rate)


def write_choice(path: str | os.PathLike, choice: Choice) -> None:
    """Write a choice as JSON, atomically."""
    losses = {repr(rate): loss for rate, loss in choice.losses.items()}
    write_json(path, {**asdict(choice), "losses": losses})


def write_failed_choice(path: str | os.PathLike, arm: str, reason: str) -> None:
    """Write why there is no choice for an arm, in the place of one."""
    write_json(path, {"arm": arm, "error": reason})


def failed_choice(path: str | os.PathLike | None) -> str | None:
    """Why there is no choice in a file of `ham tune`; None where there is one, or no file."""
    record = None if path is None else read_json(path)
    return record.get("error") if isinstance(record, Mapping) else None


def chosen_rate(path: str | os.PathLike, config: Config, arm: str) -> float:
    """The learning rate in a file of `write_choice`.

    Raises:
        MissingDataError: If the file does not exist.
        CorruptFileError: If it holds no choice.
        ConfigError: If it is another arm's, a rate that the configuration does not list, or says
            why there is no choice.
    """
    record = read_json(path)
    if failure := failed_choice(path):
        raise ConfigError(f"{path} holds no learning rate: {failure}")
    if not isinstance(record, Mapping) or not {"arm", "learning_rate"} <= set(record):
        raise CorruptFileError(f"{path} is not a choice of `ham tune`")
    source = config.tuned_as(config.arm(arm)).name
    if record["arm"] != source:
        raise ConfigError(f"{path} is the choice of arm {record['arm']!r}; asked for {source!r}")
    return legal_rate(config, record["learning_rate"], str(path))


def legal_rate(config: Config, rate: float, source: str) -> float:
    """`rate`, which must be one that the configuration tries.

    Raises:
        ConfigError: Names the rates.
    """
    tuning = tuning_of(config)
    if rate not in tuning.learning_rates:
        raise ConfigError(
            f"{source}: learning rate {rate!r} is not in tuning.learning_rates; known: "
            f"{tuning.learning_rates}"
        )
    return rate


def tuning_of(config: Config) -> TuningConfig:
    """The tuning section.

    Raises:
        ConfigError: If the configuration has none.
    """
    if config.tuning is None:
        raise ConfigError(f"configuration {config.name!r} has no tuning section")
    return config.tuning


def as_tuning_rows(rows: Iterable[Row], rate: float) -> list[Row]:
    """The rows of a training run as those of a tuning run."""
    return [
        row.model_copy(update={"experiment": EXPERIMENT, "labels": {**row.labels, LABEL: rate}})
        for row in rows
        if row.metric in KEPT
    ]
