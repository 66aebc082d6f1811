"""The grid of the study: choosing learning rates, then every reported seed, in groups of runs.

A run's rows stand in a file of its own with a manifest beside it; a run whose file is complete,
from the same configuration and code, is not run again. `ham.study.groups` says what a group is;
with several processes each works on a group of its own, so that one sets up and captures graphs
while another keeps the GPU busy.
"""

from __future__ import annotations

import itertools
import math
import multiprocessing
import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager

import torch

from ham.errors import HamError
from ham.report.rows import Row
from ham.report.statistics import mean
from ham.study.config import MqarConfig
from ham.study.groups import GroupResult, GroupRunner
from ham.study.runs import Run, Surroundings

# Mean accuracies that near count as equal when a learning rate is chosen; that of a failed run.
EQUALLY_GOOD = 0.01
FAILED = -1.0

# The runs of each program.
Group = Sequence[Sequence[Run]]
Submit = Callable[[Group], Future[GroupResult]]


class Grid:
    """Runs of one command.

    Args:
        surroundings: Configuration, folder, device.
        jobs: Programs side by side in a process.
        report: Called with one line about each finished run.
        seconds: After them no further runs are started.
        processes: Processes that work on groups at the same time.

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
        processes: int = 1,
    ):
        self.surroundings, self.jobs, self.report = surroundings, jobs, report
        self.processes = processes
        self.failed = self.left = 0
        self._deadline = time.perf_counter() + seconds

    def run(self) -> None:
        """Choose learning rates where there is a choice, then run every reported seed.

        Raises:
            HamError: If a process of the grid died; what it had finished is kept.
        """
        config = self.surroundings.config
        with self._workers() as submit:
            tuned = self._run_all(tuning_runs(config), submit)
            if not self.left:
                self._run_all(reported_runs(config, chosen_rates(config, tuned)), submit)

    def _run_all(self, runs: Sequence[Run], submit: Submit) -> list[tuple[Run, list[Row]]]:
        """Rows of every run; of unfinished ones `jobs` programs run at a time in each process."""
        done: dict[str, list[Row]] = {}
        waiting: list[Run] = []
        for run in runs:
            rows = self.surroundings.finished(run)
            if rows is None:
                waiting.append(run)
            else:
                done[run.name] = rows
                self.report(f"{run.name}: finished earlier")
        programs = self.surroundings.programs(waiting)
        groups = [programs[i : i + self.jobs] for i in range(0, len(programs), self.jobs)]
        for group, result in self._in_turn(groups, submit):
            for run, rows in zip(itertools.chain(*group), result.rows, strict=True):
                done[run.name] = rows
        return [(run, done.get(run.name, [])) for run in runs]

    def _in_turn(self, groups: list[Group], submit: Submit) -> Iterator[tuple[Group, GroupResult]]:
        """Results as they come; no group is started after the deadline."""
        running: dict[Future[GroupResult], Group] = {}
        queue = list(groups)
        while queue or running:
            while queue and len(running) < self.processes:
                if time.perf_counter() >= self._deadline:
                    self.left += sum(len(runs) for group in queue for runs in group)
                    queue = []
                    break
                group = queue.pop(0)
                running[submit(group)] = group
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                group = running.pop(future)
                result = future.result()
                self.failed += result.failed
                for line in result.lines:
                    self.report(line)
                yield group, result

    @contextmanager
    def _workers(self) -> Iterator[Submit]:
        """A way to have a group run: here, or in processes of their own."""
        if self.processes == 1:
            runner = GroupRunner(self.surroundings)
            yield lambda group: _finished_future(runner.run(group))
            return
        with ProcessPoolExecutor(
            self.processes,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_start_process,
            initargs=(self.surroundings,),
        ) as pool:
            try:
                yield lambda group: pool.submit(_run_in_process, group)
            except BrokenProcessPool as error:
                raise HamError(
                    "a process of the grid ended before its runs did (memory?); finished runs are "
                    "kept and the same command goes on with the others"
                ) from error


def tuning_runs(config: MqarConfig) -> list[Run]:
    """The runs that choose learning rates; none where there is no choice."""
    if len(config.learning_rates) == 1:
        return []
    return [
        Run(arm, task, width, config.tuning_seed, rate, tuning=True)
        for task in config.tuned_tasks
        for width in config.widths
        for arm in config.arms
        for rate in config.learning_rates
    ]


def chosen_rates(
    config: MqarConfig, tuned: Sequence[tuple[Run, list[Row]]]
) -> dict[tuple[str, str, int], float]:
    """The smallest rate of each arm, task and width whose mean accuracy in tuning is near the best.

    Of rates that do equally well on the tuning seed the largest is the first to fail on another:
    the gated delta rule on random filler had 0.03 and 0 of 64 pairs in five seeds
    (commit 7f201fa, results/published/2026-11-26-h100-mqar). A run that failed counts as worse than
    any other.
    """
    scores: dict[tuple[str, str, int], dict[float, float]] = defaultdict(dict)
    for run, rows in tuned:
        values = [row.value for row in rows if row.metric == "accuracy" and row.value is not None]
        score = mean(values) if values else FAILED
        scores[run.arm.name, str(run.task), run.width][run.learning_rate] = score
    best = {
        key: min(rate for rate, score in of.items() if score >= max(of.values()) - EQUALLY_GOOD)
        for key, of in scores.items()
    }
    only = config.learning_rates[0]
    return {
        (arm.name, str(task), width): best[arm.name, task.rates_from or str(task), width]
        if best
        else only
        for task in config.reported_tasks
        for width in config.widths
        for arm in config.arms
    }


def reported_runs(config: MqarConfig, rates: dict[tuple[str, str, int], float]) -> list[Run]:
    """Every reported run; seeds are the slowest axis.

    Where seeds train in one program, arms follow one another instead, each with all of its seeds.
    """
    return [
        Run(arm, task, width, seed, rates[arm.name, str(task), width])
        for seed in config.seeds
        for task in config.reported_tasks
        for width in config.widths
        for arm in config.arms
    ]


def _finished_future(result: GroupResult) -> Future[GroupResult]:
    future: Future[GroupResult] = Future()
    future.set_result(result)
    return future


# The runner of a process, so that examples and compiled kernels outlive a group.
_RUNNERS: list[GroupRunner] = []


def _start_process(surroundings: Surroundings) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if surroundings.device.type == "cpu":
        torch.set_num_threads(1)
    _RUNNERS.append(GroupRunner(surroundings))


def _end_with_parent() -> None:
    """End this process when the command does: killed, it could not, and the GPU would stay full.

    Files are written atomically, so nothing half done is left.
    """
    multiprocessing.parent_process().join()
    os._exit(1)


def _run_in_process(group: Group) -> GroupResult:
    return _RUNNERS[0].run(group)
