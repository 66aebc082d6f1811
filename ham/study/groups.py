"""Runs side by side: set up, train, evaluate, write their rows.

On a GPU the runs of a group share it in one process: each has a stream of its own and only queues
its graphs there, so that the small kernels of one run fill the gaps of another. A run that fails is
a file of error rows, and the others go on.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ham.errors import HamError
from ham.job import used_providers
from ham.model.precision import precision_context
from ham.report.manifest import manifest_path, write_manifest
from ham.report.rows import Row, RowWriter
from ham.report.statistics import mean
from ham.study.config import Size, Task
from ham.study.data import Examples, generator
from ham.study.evaluation import SizeResult, evaluate_size, held_out
from ham.study.model import RecallModel
from ham.study.runs import (
    LAST_STEPS,
    GroupTimes,
    Run,
    Surroundings,
    add_failure,
    add_result,
    add_training,
)
from ham.study.training import Trainer, TrainingData


@dataclass(frozen=True)
class GroupResult:
    """What a group gave.

    Attributes:
        rows: Rows of every run, in order.
        failed: How many runs gave error rows.
        lines: What to tell the user.
    """

    rows: list[list[Row]]
    failed: int
    lines: list[str]


class GroupRunner:
    """Runs groups one after another; keeps the examples that the next group may need.

    Args:
        surroundings: Configuration, folder, device.
    """

    def __init__(self, surroundings: Surroundings):
        self.surroundings = surroundings
        self._data: dict[tuple, TrainingData] = {}
        self._held_out: dict[tuple[str, str, str], Examples] = {}

    def run(self, group: Sequence[Run]) -> GroupResult:
        """Train runs side by side, then evaluate one after another, and write their rows."""
        begin = time.perf_counter()
        trainers = [_attempt(lambda run=run: self._trainer(run)) for run in group]
        ready = time.perf_counter()
        losses = train_together(trainers)
        trained = time.perf_counter()
        results = [
            _attempt(lambda run=run, trainer=trainer: self._evaluate(run, trainer.model))
            if isinstance(loss, list)
            else loss
            for run, trainer, loss in zip(group, trainers, losses, strict=True)
        ]
        evaluated = time.perf_counter()
        steps = max((t.settings.steps for t in trainers if isinstance(t, Trainer)), default=1)
        overhead = evaluated - trained + ready - begin
        times = GroupTimes(
            len(group), 1e3 * (trained - ready) / steps / len(group), overhead / len(group)
        )
        lines = []
        rows = []
        for run, trainer, loss, result in zip(group, trainers, losses, results, strict=True):
            model = trainer.model if isinstance(trainer, Trainer) else None
            rows.append(self._write(run, model, loss, result, times))
            lines.append(f"{run.name}: {_outcome(loss, result)}")
        lines.append(
            f"{len(group)} side by side: set up {ready - begin:.1f} s, trained "
            f"{trained - ready:.1f} s ({times.step_ms:.2f} ms a step and run), evaluated "
            f"{evaluated - trained:.1f} s; {(evaluated - begin) / len(group):.1f} s a run"
        )
        return GroupResult(rows, sum(isinstance(result, Failure) for result in results), lines)

    def _trainer(self, run: Run) -> Trainer:
        around = self.surroundings
        settings = around.training(run)
        key = (run.task.key, run.seed, settings.steps)
        if key not in self._data:
            # Arms of one seed are neighbours; batches of earlier seeds are not needed again.
            while len(self._data) > 1:
                self._data.pop(next(iter(self._data)))
            self._data[key] = TrainingData(
                around.config, run.task, run.seed, settings.steps, around.device
            )
        torch.manual_seed(generator(torch.device("cpu"), "weights", run.seed).initial_seed())
        model = RecallModel(around.config, run.seeded_arm, run.task, run.width).to(around.device)
        trainer = Trainer(model, self._data[key], settings, run.learning_rate, around.graphs)
        trainer.start()
        return trainer

    def _evaluate(self, run: Run, model: RecallModel) -> list[SizeResult]:
        config, device = self.surroundings.config, self.surroundings.device
        purpose = "tuning" if run.tuning else "test"
        results = []
        for size in self.surroundings.sizes(run):
            with precision_context(device, config.train.precision):
                results.append(
                    evaluate_size(
                        model,
                        self._examples(run.task, size, purpose),
                        size,
                        config.evaluate.batch_size,
                    )
                )
        return results

    def _examples(self, task: Task, size: Size, purpose: str) -> Examples:
        key = (str(task), purpose, str(size))
        if key not in self._held_out:
            around = self.surroundings
            self._held_out[key] = held_out(around.config, size, task, around.device, purpose)
        return self._held_out[key]

    def _write(
        self,
        run: Run,
        model: RecallModel | None,
        losses: list[float] | Failure,
        results: list[SizeResult] | Failure,
        times: GroupTimes,
    ) -> list[Row]:
        """Write the rows of a run and their manifest."""
        around = self.surroundings
        writer = RowWriter(
            model=run.arm.name,
            mixer=run.arm.mixer,
            parameters=None if model is None else model.count_parameters(),
            seed=run.seed,
            provider="torch" if model is None else used_providers(model),
            launch_mode=around.launch_mode,
            device=around.device_name,
            config_hash=around.config_hash(run),
            code_fingerprint=around.codes[run.arm.mixer],
            manifest_id=around.manifest["manifest_id"],
        )
        if isinstance(results, Failure):
            add_failure(writer, run, around, results.message)
        else:
            for result in results:
                add_result(writer, run, around.config, result)
            add_training(writer, run, around.config, losses, times)
        path = around.rows_path(run)
        write_manifest(manifest_path(path), around.manifest)
        writer.write(path)
        return writer.rows


@dataclass(frozen=True)
class Failure:
    """Why a run gave nothing."""

    message: str


def train_together(trainers: list[Trainer | Failure]) -> list[list[float] | Failure]:
    """Advance every trainer in turns to its last step; the losses of each, or why it has none."""
    state = list(trainers)
    steps = max((t.settings.steps for t in trainers if isinstance(t, Trainer)), default=0)
    for _ in range(steps):
        for index, trainer in enumerate(state):
            if isinstance(trainer, Trainer):
                failure = _attempt(trainer.advance)
                state[index] = trainer if failure is None else failure
    return [_attempt(one.losses) if isinstance(one, Trainer) else one for one in state]


def _outcome(losses: list[float] | Failure, results: list[SizeResult] | Failure) -> str:
    """A run in one line."""
    if isinstance(results, Failure):
        return f"failed: {results.message}"
    words = ", ".join(f"{r.size} {r.all.accuracy:.3f}" for r in results)
    return f"loss {mean(losses[-LAST_STEPS:]):.3f}; {words}"


def _attempt(work: Callable[[], Any]) -> Any:
    """The result of `work`, or a `Failure` with what it raised; a defect is printed too."""
    try:
        return work()
    except Exception as error:
        if not isinstance(error, HamError | ArithmeticError):
            traceback.print_exc()
        words = " ".join(str(error).split())
        return Failure(f"{type(error).__name__}: {words}"[:300])
