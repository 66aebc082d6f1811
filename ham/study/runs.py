"""What a run of the study is, what it depends on, and its rows.

Rows: experiment `mqar`; task `LENGTH/PAIRS`; metrics `accuracy` (n counts queries) and, per layer,
`kv_fraction`, `pairs_kept_fraction` (routing recall), `routed_precision`, and the routed share of
each class of tokens: `keys_kept_fraction`, `queries_kept_fraction`, `filler_kept_fraction`,
`repeats_kept_fraction`, `stale_kept_fraction`. With overwrites also `accuracy_once`,
`accuracy_overwritten` and `stale_answer_fraction`, by how often the queried key was written.
Training gives `final_loss_nats` and `train_step_ms`, and `overhead_seconds` is what set-up and
evaluation took. The labels name filler, layout, variant, width, learning rate and the longest
training example; of times also the runs on the device at the same time (`side_by_side`) and those
of them in one program (`in_one_program`). Runs that only choose a learning rate have experiment
`mqar_tuning`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ham.config import ArmConfig
from ham.errors import ConfigError, CorruptFileError
from ham.files import stable_hash
from ham.model.registry import mixer_class
from ham.report.rows import Row, RowWriter, read_rows
from ham.report.statistics import mean, wilson_interval
from ham.study.config import MqarConfig, MqarTrain, Size, Task
from ham.study.data import FILLER, KEY, QUERY, REPEAT, STALE
from ham.study.evaluation import SizeResult, Tally

EXPERIMENT = "mqar"
TUNING = "mqar_tuning"
KEPT_METRICS = {
    "keys_kept_fraction": KEY,
    "queries_kept_fraction": QUERY,
    "filler_kept_fraction": FILLER,
    "repeats_kept_fraction": REPEAT,
    "stale_kept_fraction": STALE,
}
# Steps at the end whose mean loss is reported.
LAST_STEPS = 50


@dataclass(frozen=True)
class Run:
    """One training and its evaluation."""

    arm: ArmConfig
    task: Task
    width: int
    seed: int
    learning_rate: float
    tuning: bool = False

    @property
    def name(self) -> str:
        """Stem of its files."""
        kind = "tune-" if self.tuning else ""
        end = f"-lr{self.learning_rate:g}" if self.tuning else ""
        return f"{kind}{self.arm.name}-{self.task}-d{self.width}-s{self.seed}{end}"

    @property
    def experiment(self) -> str:
        """The experiment of its rows."""
        return TUNING if self.tuning else EXPERIMENT

    @property
    def seeded_arm(self) -> ArmConfig:
        """The arm; rules that route by chance do so differently for each seed."""
        if "routing_seed" not in mixer_class(self.arm.mixer).Options.model_fields:
            return self.arm
        options = {"routing_seed": self.seed, **self.arm.options}
        return self.arm.model_copy(update={"options": options})


@dataclass(frozen=True)
class Surroundings:
    """What all rows of one command share.

    Attributes:
        folder: Where the files go.
        device_name: For readers; `device` is where torch computes.
        manifest: Of the command.
        codes: Fingerprint of the code behind each mixer.

    Raises:
        ConfigError: For CUDA graphs on a device without them.
    """

    config: MqarConfig
    folder: Path
    device: torch.device
    device_name: str
    manifest: dict[str, Any]
    codes: dict[str, str]

    def __post_init__(self) -> None:
        if self.config.train.launch == "graph" and self.device.type != "cuda":
            raise ConfigError(
                f"train.launch 'graph' needs a GPU; the device is {self.device.type}; legal there: "
                "auto, eager"
            )

    @property
    def graphs(self) -> bool:
        """Whether training steps are replayed as CUDA graphs."""
        return self.device.type == "cuda" and self.config.train.launch != "eager"

    @property
    def launch_mode(self) -> str:
        """How the training steps of every run are launched."""
        return "cuda_graph" if self.graphs else "eager"

    def training(self, run: Run) -> MqarTrain:
        """How a run is trained."""
        return self.config.train.for_tuning if run.tuning else self.config.train

    def programs(self, runs: Sequence[Run]) -> list[list[Run]]:
        """Runs that train in one program, in the order of the first of each.

        They differ in seed, learning rate and task alone, and their mixtures are equal.
        """
        alike: dict[tuple, list[Run]] = {}
        for run in runs:
            mixture = [(str(size), size.weight) for size in self.config.mixture(run.task)]
            # Tables of positions are as long as the longest example.
            shape = (run.arm.name, run.width, run.tuning, self.config.longest(run.task))
            alike.setdefault((*shape, *mixture), []).append(run)
        most = self.config.train.runs_per_program
        programs = []
        for group in alike.values():
            size = math.ceil(len(group) / math.ceil(len(group) / most))
            programs += [group[first : first + size] for first in range(0, len(group), size)]
        return programs

    def sizes(self, run: Run) -> list[Size]:
        """The sizes that a run is evaluated at."""
        sizes = self.config.trained_sizes if run.tuning else self.config.sizes
        return sizes(run.task)

    def rows_path(self, run: Run) -> Path:
        """The file of a run's rows."""
        return self.folder / f"{run.name}.rows.jsonl"

    def config_hash(self, run: Run) -> str:
        """Hash of what a run depends on, apart from the code."""
        config = self.config
        return stable_hash(
            {
                "run": [run.arm.mixer, run.arm.options, run.task.key, run.width, run.seed],
                "learning_rate": run.learning_rate,
                "model": [
                    config.layers,
                    config.heads,
                    config.vocabulary_size,
                    config.longest(run.task),
                ],
                "train": self.training(run).model_dump(
                    mode="json",
                    exclude={"launch", "tuning_steps", "runs_per_program", "mixture"},
                ),
                "mixture": [size.model_dump() for size in config.mixture(run.task)],
                "evaluate": [config.evaluate.examples, *map(str, self.sizes(run))],
                "device": [self.device.type, self.launch_mode],
            }
        )

    def finished(self, run: Run) -> list[Row] | None:
        """The rows of a run that was completed earlier by the same code, or None."""
        path = self.rows_path(run)
        if not path.is_file():
            return None
        try:
            rows = read_rows(path)
        except CorruptFileError:
            return None
        if not rows or any(row.error is not None for row in rows):
            return None
        wanted = (self.config_hash(run), self.codes[run.arm.mixer])
        same = (rows[0].config_hash, rows[0].code_fingerprint) == wanted
        return rows if same else None


@dataclass(frozen=True)
class GroupTimes:
    """What runs on the device at the same time took, each number per run.

    Attributes:
        runs: Runs of the group.
        step_ms: Wall time of a training step of all runs, divided by their number.
        overhead_seconds: Set-up and evaluation.
    """

    runs: int
    step_ms: float
    overhead_seconds: float


def labels_of(run: Run, config: MqarConfig) -> dict[str, str | int | float]:
    """The coordinates of a run's rows."""
    return {
        "filler": run.task.filler,
        "layout": run.task.layout,
        "variant": run.task.variant,
        "width": run.width,
        "learning_rate": run.learning_rate,
        "training_context": config.training_context(run.task),
    }


def add_result(writer: RowWriter, run: Run, config: MqarConfig, result: SizeResult) -> None:
    """The rows of one size."""
    shared = {
        "task": str(result.size),
        "x_name": "pairs",
        "x_value": result.size.pairs,
        "kv_fraction": result.kv_fraction,
    }
    labels = labels_of(run, config)
    for metric, count, total in _shares(result):
        answered = wilson_interval(count, total)
        writer.add(
            run.experiment,
            metric,
            answered.value,
            n=answered.n,
            low=answered.low,
            high=answered.high,
            interval=answered.interval,
            labels=labels,
            **shared,
        )
    for layer in sorted(result.routed):
        here = {**labels, "layer": layer}
        numbers = {
            "kv_fraction": result.fraction(layer),
            "pairs_kept_fraction": result.recall(layer),
            "routed_precision": result.precision(layer),
        }
        numbers |= {name: result.kept(layer, kind) for name, kind in KEPT_METRICS.items()}
        for metric, value in numbers.items():
            if value is not None:
                writer.add(run.experiment, metric, value, labels=here, **shared)


def _shares(result: SizeResult) -> list[tuple[str, int, int]]:
    """Metric, hits and queries of what was answered."""
    every: Tally = result.all
    shares = [("accuracy", every.right, every.queries)]
    if result.updated.queries:
        updated = result.updated
        shares.append(("accuracy_overwritten", updated.right, updated.queries))
        shares.append(("stale_answer_fraction", updated.stale, updated.queries))
        if result.once.queries:
            shares.append(("accuracy_once", result.once.right, result.once.queries))
    return shares


def add_training(
    writer: RowWriter,
    run: Run,
    config: MqarConfig,
    losses: list[float],
    times: GroupTimes,
    in_one_program: int,
) -> None:
    """The rows of one training, whose program trained that many runs."""
    labels = labels_of(run, config)
    writer.add(
        run.experiment, "final_loss_nats", mean(losses[-LAST_STEPS:]), task="train", labels=labels
    )
    labels = {**labels, "side_by_side": times.runs, "in_one_program": in_one_program}
    writer.add(run.experiment, "train_step_ms", times.step_ms, task="train", labels=labels)
    writer.add(
        run.experiment, "overhead_seconds", times.overhead_seconds, task="train", labels=labels
    )


def add_failure(writer: RowWriter, run: Run, around: Surroundings, message: str) -> None:
    """The error rows of a run that gave nothing, one for each size."""
    for size in around.sizes(run):
        writer.add(
            run.experiment,
            "accuracy",
            None,
            task=str(size),
            x_name="pairs",
            x_value=size.pairs,
            labels=labels_of(run, around.config),
            error=message,
        )
