"""Programs side by side: set up, train, evaluate their runs, write the rows.

Runs of one arm that differ in seed, rate or task alone train in one program, whose kernels carry
all of them (`ham.study.program`). Where that cannot be done for an arm, a line says so, and each of
its runs is a program of its own, which the label `in_one_program` of its rows shows.

On a GPU the programs of a group share it in one process: each has a stream of its own and only
queues its graphs there, so that the small kernels of one fill the gaps of another. A run that fails
is a file of error rows, and the others go on.
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
from ham.study.program import JointData, Program
from ham.study.runs import (
    LAST_STEPS,
    GroupTimes,
    Run,
    Surroundings,
    add_failure,
    add_result,
    add_training,
)
from ham.study.training import Steps, Trainer, TrainingData


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


@dataclass(frozen=True)
class Failure:
    """Why a run gave nothing."""

    message: str


@dataclass(frozen=True)
class Launched:
    """Runs that train in one program, or one that could not be set up."""

    runs: list[Run]
    steps: Steps | Failure


class GroupRunner:
    """Runs groups one after another; keeps the examples that the next group may need.

    Args:
        surroundings: Configuration, folder, device.
    """

    def __init__(self, surroundings: Surroundings):
        self.surroundings = surroundings
        self._data: dict[tuple, TrainingData] = {}
        self._joint: dict[tuple, JointData] = {}
        self._held_out: dict[tuple[str, str, str], Examples] = {}

    def run(self, group: Sequence[Sequence[Run]]) -> GroupResult:
        """Train the programs of a group side by side, then evaluate run by run; write the rows.

        Args:
            group: The runs of each program.
        """
        lines: list[str] = []
        begin = time.perf_counter()
        programs = [made for runs in group for made in self._launch(runs, lines)]
        ready = time.perf_counter()
        losses = train_together([program.steps for program in programs])
        trained = time.perf_counter()
        results = [
            [
                _attempt(lambda run=run, model=model: self._evaluate(run, model))
                if isinstance(loss, list)
                else loss
                for run, model, loss in _each(program, of_program)
            ]
            for program, of_program in zip(programs, losses, strict=True)
        ]
        evaluated = time.perf_counter()
        count = sum(len(runs) for runs in group)
        steps = max((p.steps.settings.steps for p in programs if _trains(p.steps)), default=1)
        overhead = evaluated - trained + ready - begin
        times = GroupTimes(count, 1e3 * (trained - ready) / steps / count, overhead / count)
        rows: dict[str, list[Row]] = {}
        for program, of_program, found in zip(programs, losses, results, strict=True):
            for (run, model, loss), result in zip(_each(program, of_program), found, strict=True):
                rows[run.name] = self._write(run, model, loss, result, times, len(program.runs))
                lines.append(f"{run.name}: {_outcome(loss, result)}")
        lines.append(
            f"{count} in {len(programs)} programs side by side: set up {ready - begin:.1f} s, "
            f"trained {trained - ready:.1f} s ({times.step_ms:.2f} ms a step and run), evaluated "
            f"{evaluated - trained:.1f} s; {(evaluated - begin) / count:.1f} s a run"
        )
        ordered = [rows[run.name] for runs in group for run in runs]
        failed = sum(isinstance(result, Failure) for found in results for result in found)
        return GroupResult(ordered, failed, lines)

    def _launch(self, runs: Sequence[Run], lines: list[str]) -> list[Launched]:
        """Set runs up as one program; alone where that fails, which `lines` then says."""
        if len(runs) > 1:
            models = [_attempt(lambda run=run: self._model(run)) for run in runs]
            sound = [run for run, one in zip(runs, models, strict=True) if _works(one)]
            refused = [
                Launched([run], one)
                for run, one in zip(runs, models, strict=True)
                if not _works(one)
            ]
            if refused:
                return refused + (self._launch(sound, lines) if sound else [])
            program = _attempt(lambda: self._program(runs, models))
            if _works(program):
                return [Launched(list(runs), program)]
            lines.append(
                f"{runs[0].name} and {len(runs) - 1} runs like it are trained each alone, not in "
                f"one program: {program.message}"
            )
        return [Launched([run], _attempt(lambda run=run: self._trainer(run))) for run in runs]

    def _model(self, run: Run) -> RecallModel:
        around = self.surroundings
        torch.manual_seed(generator(torch.device("cpu"), "weights", run.seed).initial_seed())
        return RecallModel(around.config, run.seeded_arm, run.task, run.width).to(around.device)

    def _trainer(self, run: Run) -> Trainer:
        around = self.surroundings
        settings = around.training(run)
        key = (run.task.key, run.seed, settings.steps)
        # Arms of one seed are neighbours; batches of earlier seeds are not needed again.
        data = _kept(self._data, key, lambda: self._draw(run, settings.steps))
        trainer = Trainer(self._model(run), data, settings, run.learning_rate, around.graphs)
        trainer.start()
        return trainer

    def _program(self, runs: Sequence[Run], models: Sequence[RecallModel]) -> Program:
        around = self.surroundings
        settings = around.training(runs[0])
        # Runs of one task and seed read the same batches.
        drawn = {(run.task.key, run.seed): run for run in runs}
        data = _kept(
            self._joint,
            (*drawn, settings.steps),
            lambda: JointData([self._draw(run, settings.steps) for run in drawn.values()]),
        )
        places = {key: place for place, key in enumerate(drawn)}
        program = Program(
            models,
            data,
            [places[run.task.key, run.seed] for run in runs],
            settings,
            [run.learning_rate for run in runs],
            around.graphs,
        )
        program.start()
        return program

    def _draw(self, run: Run, steps: int) -> TrainingData:
        around = self.surroundings
        return TrainingData(around.config, run.task, run.seed, steps, around.device)

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
        in_one_program: int,
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
            add_training(writer, run, around.config, losses, times, in_one_program)
        path = around.rows_path(run)
        write_manifest(manifest_path(path), around.manifest)
        writer.write(path)
        return writer.rows


def train_together(programs: list[Steps | Failure]) -> list[list[list[float] | Failure]]:
    """Advance every program in turns to its last step; for each run its losses, or why none."""
    state = list(programs)
    steps = max((one.settings.steps for one in state if _trains(one)), default=0)
    for _ in range(steps):
        for index, program in enumerate(state):
            if _trains(program):
                failure = _attempt(program.advance)
                state[index] = program if failure is None else failure
    return [
        [
            _attempt(lambda run=run, end=end: end.losses_of(run)) if _trains(end) else end
            for run in range(len(begun.models) if _trains(begun) else 1)
        ]
        for begun, end in zip(programs, state, strict=True)
    ]


def _each(
    program: Launched, losses: list[list[float] | Failure]
) -> list[tuple[Run, RecallModel | None, list[float] | Failure]]:
    """Runs of a program, their models and what training gave."""
    steps = program.steps
    models = steps.models if _trains(steps) else [None] * len(program.runs)
    return [*zip(program.runs, models, losses, strict=True)]


def _trains(steps: Steps | Failure) -> bool:
    return isinstance(steps, Steps)


def _works(made: Any) -> bool:
    return not isinstance(made, Failure)


def _kept(cache: dict[tuple, Any], key: tuple, make: Callable[[], Any]) -> Any:
    """What a cache holds or `make` gives; the cache keeps the last two."""
    if key not in cache:
        while len(cache) > 1:
            cache.pop(next(iter(cache)))
        cache[key] = make()
    return cache[key]


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
