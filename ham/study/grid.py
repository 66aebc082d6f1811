"""The grid of the study: choosing learning rates, running models side by side, writing their rows.

A run's rows stand in a file of its own with a manifest beside it; a run whose file is complete,
from the same configuration and code, is not run again. A run that fails is a file of error rows,
and the others go on.

On a GPU `jobs` runs share it in one process: each has a stream of its own and only queues its
graphs there, so that the small kernels of one run fill the gaps of another.
"""

from __future__ import annotations

import math
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ham.config import ArmConfig
from ham.errors import HamError
from ham.job import used_providers
from ham.model.precision import precision_context
from ham.report.manifest import manifest_path, write_manifest
from ham.report.rows import Row, RowWriter
from ham.report.statistics import mean
from ham.study.config import Filler
from ham.study.data import Examples, generator
from ham.study.evaluation import SizeResult, evaluate_size, held_out
from ham.study.model import RecallModel
from ham.study.runs import (
    LAST_STEPS,
    Run,
    Surroundings,
    add_failure,
    add_result,
    add_training,
)
from ham.study.training import Trainer, TrainingData


class Grid:
    """Runs of one command.

    Args:
        surroundings: Configuration, folder, device.
        jobs: Runs side by side.
        report: Called with one line about each finished run.
        seconds: After them no further runs are started.

    Attributes:
        failed: Runs that gave error rows.
        left: Runs that were not started for want of time.
    """

    def __init__(
        self,
        surroundings: Surroundings,
        jobs: int,
        report: Callable[[str], None],
        seconds: float = math.inf,
    ):
        self.surroundings, self.jobs, self.report = surroundings, jobs, report
        self.failed = self.left = 0
        self._deadline = time.perf_counter() + seconds
        self._data: dict[tuple[Filler, int], TrainingData] = {}
        self._held_out: dict[tuple[str, str, str], Examples] = {}

    def run(self) -> None:
        """Choose learning rates where there is a choice, then run every reported seed."""
        config = self.surroundings.config
        cells = [
            (arm, filler, width)
            for filler in config.fillers
            for width in config.widths
            for arm in config.arms
        ]
        rates = self._choose_rates(cells)
        if self.left:
            return
        self._run_all(
            [
                Run(arm, filler, config.layout, width, seed, rates[arm.name, filler, width])
                for seed in config.seeds
                for filler in config.fillers
                for width in config.widths
                for arm in config.arms
            ]
        )

    def _choose_rates(
        self, cells: Sequence[tuple[ArmConfig, Filler, int]]
    ) -> dict[tuple[str, str, int], float]:
        """The learning rate of each arm, filler and width with the best accuracy in tuning."""
        config = self.surroundings.config
        if len(config.learning_rates) == 1:
            return {(arm.name, f, width): config.learning_rates[0] for arm, f, width in cells}
        runs = [
            Run(arm, filler, config.layout, width, config.tuning_seed, rate, tuning=True)
            for arm, filler, width in cells
            for rate in config.learning_rates
        ]
        best: dict[tuple[str, str, int], tuple[float, float]] = {}
        for run, rows in zip(runs, self._run_all(runs), strict=True):
            values = [r.value for r in rows if r.metric == "accuracy" and r.value is not None]
            score = mean(values) if values else -1.0
            key = (run.arm.name, run.filler, run.width)
            best[key] = max(best.get(key, (-2.0, 0.0)), (score, run.learning_rate))
        return {key: rate for key, (_, rate) in best.items()}

    def _run_all(self, runs: Sequence[Run]) -> list[list[Row]]:
        """Rows of every run in order; unfinished ones are run, `jobs` at a time."""
        done = {run.name: self.surroundings.finished(run) for run in runs}
        waiting = [run for run in runs if done[run.name] is None]
        for run in runs:
            if done[run.name] is not None:
                self.report(f"{run.name}: finished earlier")
        for start in range(0, len(waiting), self.jobs):
            if time.perf_counter() >= self._deadline:
                self.left += len(waiting) - start
                break
            group = waiting[start : start + self.jobs]
            for run, rows in zip(group, self._run_group(group), strict=True):
                done[run.name] = rows
        return [done[run.name] or [] for run in runs]

    def _run_group(self, group: Sequence[Run]) -> list[list[Row]]:
        """Train runs side by side, then evaluate one after another."""
        begin = time.perf_counter()
        trainers = [_attempt(lambda run=run: self._trainer(run)) for run in group]
        ready = time.perf_counter()
        for _ in range(self.surroundings.config.train.steps):
            for index, trainer in enumerate(trainers):
                if isinstance(trainer, Trainer):
                    failure = _attempt(trainer.advance)
                    trainers[index] = trainer if failure is None else failure
        losses = [
            _attempt(trainer.losses) if isinstance(trainer, Trainer) else trainer
            for trainer in trainers
        ]
        trained = time.perf_counter()
        step_ms = 1e3 * (trained - ready) / self.surroundings.config.train.steps / len(group)
        made = [
            self._finish(run, trainer, loss, step_ms, len(group))
            for run, trainer, loss in zip(group, trainers, losses, strict=True)
        ]
        self.report(
            f"{len(group)} side by side: set up {ready - begin:.1f} s, trained "
            f"{trained - ready:.1f} s ({step_ms:.2f} ms a step and run), evaluated "
            f"{time.perf_counter() - trained:.1f} s"
        )
        return made

    def _trainer(self, run: Run) -> Trainer:
        config, device = self.surroundings.config, self.surroundings.device
        key = (run.filler, run.seed)
        if key not in self._data:
            # Arms of one seed are neighbours; batches of earlier seeds are not needed again.
            while len(self._data) > 1:
                self._data.pop(next(iter(self._data)))
            self._data[key] = TrainingData(config, run.filler, run.seed, device)
        torch.manual_seed(generator(torch.device("cpu"), "weights", run.seed).initial_seed())
        model = RecallModel(config, run.seeded_arm, run.width).to(device)
        graphs = not self.surroundings.eager
        trainer = Trainer(model, self._data[key], config.train, run.learning_rate, graphs)
        trainer.start()
        return trainer

    def _finish(
        self,
        run: Run,
        trainer: Trainer | _Failure,
        losses: list[float] | _Failure,
        step_ms: float,
        together: int,
    ) -> list[Row]:
        """Evaluate, write the rows and their manifest."""
        config = self.surroundings.config
        writer = self._writer(run, trainer.model if isinstance(trainer, Trainer) else None)
        results: Any = losses
        if isinstance(losses, list):
            results = _attempt(lambda: self._evaluate(run, trainer.model))
        if isinstance(results, _Failure):
            self.failed += 1
            add_failure(writer, run, config.evaluate.sizes, results.message)
            self.report(f"{run.name}: failed: {results.message}")
        else:
            for result in results:
                add_result(writer, run, result)
            add_training(writer, run, losses, step_ms, together)
            words = ", ".join(f"{result.size} {result.accuracy:.3f}" for result in results)
            self.report(f"{run.name}: loss {mean(losses[-LAST_STEPS:]):.3f}; {words}")
        path = self.surroundings.rows_path(run)
        write_manifest(manifest_path(path), self.surroundings.manifest)
        writer.write(path)
        return writer.rows

    def _evaluate(self, run: Run, model: RecallModel) -> list[SizeResult]:
        config = self.surroundings.config
        purpose = "tuning" if run.tuning else "test"
        results = []
        for size in config.evaluate.sizes:
            key = (run.filler, purpose, str(size))
            if key not in self._held_out:
                self._held_out[key] = held_out(
                    config, size, run.filler, self.surroundings.device, purpose
                )
            examples = self._held_out[key]
            with precision_context(self.surroundings.device, config.train.precision):
                results.append(evaluate_size(model, examples, size, config.evaluate.batch_size))
        return results

    def _writer(self, run: Run, model: RecallModel | None) -> RowWriter:
        around = self.surroundings
        return RowWriter(
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


@dataclass(frozen=True)
class _Failure:
    """Why a run gave nothing."""

    message: str


def _attempt(work: Callable[[], Any]) -> Any:
    """The result of `work`, or a `_Failure` with what it raised; a defect is printed too."""
    try:
        return work()
    except Exception as error:
        if not isinstance(error, HamError | ArithmeticError):
            traceback.print_exc()
        words = " ".join(str(error).split())
        return _Failure(f"{type(error).__name__}: {words}"[:300])
