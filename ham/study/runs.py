"""What a run of the study is, what it depends on, and its rows.

Rows: experiment `mqar`; task `LENGTH/PAIRS`; metrics `accuracy` (n counts queries) and, per layer,
`kv_fraction`, `routed_precision`, and the routed share of each class of tokens:
`pairs_kept_fraction` (values), `keys_kept_fraction`, `queries_kept_fraction`,
`filler_kept_fraction`. Training gives `final_loss_nats` and `train_step_ms`. The labels name
filler, layout, width and learning rate. Runs that only choose a learning rate have experiment
`mqar_tuning`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ham.config import ArmConfig
from ham.errors import CorruptFileError
from ham.files import stable_hash
from ham.model.registry import mixer_class
from ham.report.rows import Row, RowWriter, read_rows
from ham.report.statistics import mean, wilson_interval
from ham.study.config import Filler, Layout, MqarConfig, Size
from ham.study.data import FILLER, KEY, QUERY, VALUE
from ham.study.evaluation import SizeResult

EXPERIMENT = "mqar"
TUNING = "mqar_tuning"
KEPT_METRICS = {
    "pairs_kept_fraction": VALUE,
    "keys_kept_fraction": KEY,
    "queries_kept_fraction": QUERY,
    "filler_kept_fraction": FILLER,
}
# Steps at the end whose mean loss is reported.
LAST_STEPS = 50


@dataclass(frozen=True)
class Run:
    """One training and its evaluation."""

    arm: ArmConfig
    filler: Filler
    layout: Layout
    width: int
    seed: int
    learning_rate: float
    tuning: bool = False

    @property
    def name(self) -> str:
        """Stem of its files."""
        kind = "tune-" if self.tuning else ""
        end = f"-lr{self.learning_rate:g}" if self.tuning else ""
        place = "" if self.layout == "prefix" else f"-{self.layout}"
        return f"{kind}{self.arm.name}-{self.filler}{place}-d{self.width}-s{self.seed}{end}"

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
        eager: Whether a GPU works without CUDA graphs.
    """

    config: MqarConfig
    folder: Path
    device: torch.device
    device_name: str
    manifest: dict[str, Any]
    codes: dict[str, str]
    eager: bool = False

    @property
    def launch_mode(self) -> str:
        """How the training steps of every run are launched."""
        return "eager" if self.eager or self.device.type == "cpu" else "cuda_graph"

    def rows_path(self, run: Run) -> Path:
        """The file of a run's rows."""
        return self.folder / f"{run.name}.rows.jsonl"

    def config_hash(self, run: Run) -> str:
        """Hash of what a run depends on, apart from the code."""
        config = self.config
        return stable_hash(
            {
                "run": [run.arm.mixer, run.arm.options, run.filler, run.width, run.seed],
                "learning_rate": run.learning_rate,
                "layout": run.layout,
                "model": [config.layers, config.heads, config.vocabulary_size, config.longest],
                "train": config.train.model_dump(mode="json"),
                "evaluate": config.evaluate.model_dump(mode="json"),
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


def labels_of(run: Run) -> dict[str, str | int | float]:
    """The coordinates of a run's rows."""
    return {
        "filler": run.filler,
        "layout": run.layout,
        "width": run.width,
        "learning_rate": run.learning_rate,
    }


def add_result(writer: RowWriter, run: Run, result: SizeResult) -> None:
    """The rows of one size."""
    layers = sorted(result.routed)
    shared = {
        "task": str(result.size),
        "x_name": "pairs",
        "x_value": result.size.pairs,
        "kv_fraction": result.kv_fraction,
    }
    labels = labels_of(run)
    accuracy = wilson_interval(result.right, result.queries)
    writer.add(
        run.experiment,
        "accuracy",
        accuracy.value,
        n=accuracy.n,
        low=accuracy.low,
        high=accuracy.high,
        interval=accuracy.interval,
        labels=labels,
        **shared,
    )
    for layer in layers:
        here = {**labels, "layer": layer}
        numbers = {"kv_fraction": result.fraction(layer)}
        numbers |= {name: result.kept(layer, kind) for name, kind in KEPT_METRICS.items()}
        numbers["routed_precision"] = result.precision(layer)
        for metric, value in numbers.items():
            if value is not None:
                writer.add(run.experiment, metric, value, labels=here, **shared)


def add_training(
    writer: RowWriter, run: Run, losses: list[float], step_ms: float, together: int
) -> None:
    """The rows of one training, `together` of which ran side by side."""
    labels = labels_of(run)
    writer.add(
        run.experiment, "final_loss_nats", mean(losses[-LAST_STEPS:]), task="train", labels=labels
    )
    labels = {**labels, "side_by_side": together}
    writer.add(run.experiment, "train_step_ms", step_ms, task="train", labels=labels)


def add_failure(writer: RowWriter, run: Run, sizes: list[Size], message: str) -> None:
    """The error rows of a run that gave nothing, one for each size."""
    for size in sizes:
        writer.add(
            run.experiment,
            "accuracy",
            None,
            task=str(size),
            x_name="pairs",
            x_value=size.pairs,
            labels=labels_of(run),
            error=message,
        )
