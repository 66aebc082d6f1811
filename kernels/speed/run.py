"""The speed run: problem by problem, compare, time, store."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ham.errors import HamError
from ham.kernels.speed import ceilings as ceiling_module
from ham.kernels.speed.ceilings import Ceilings, ceilings_of, floor_of, measure_ceilings
from ham.kernels.speed.cells import EAGER, GRAPH, LONGEST_GRAPH_MS, CellWriter, modes_of
from ham.kernels.speed.checks import Check, check_subject, describe
from ham.kernels.speed.clock import (
    Clock,
    GpuLostError,
    Task,
    Timing,
    make_clock,
    recover,
    take_turns,
)
from ham.kernels.speed.problems import COMPONENTS, Inputs, Problem
from ham.kernels.speed.routing_parts import providers
from ham.kernels.speed.store import EXPERIMENT, SpeedStore
from ham.kernels.speed.subjects import Subject, choose_names, make_subject, refusal
from ham.kernels.speed.tasks import capture_checked, make_task
from ham.kernels.speed.tiles import recorded_tiles
from ham.kernels.speed.truth import Truth, check_truth, compute_truth, weight_for
from ham.kernels.verify import SEED
from ham.measure.timing import peak_extra_bytes
from ham.report.row_store import DEVICE
from ham.report.rows import Row
from ham.report.statistics import Estimate

Say = Callable[[str], None]


@dataclass
class Bench:
    """One speed run.

    Attributes:
        device: Where it runs.
        dtype: Of the inputs.
        store: Where rows go.
        providers: Names to time, or None for all.
        time_wrong: Time providers whose result is wrong, and peers that refuse, marked as such.
        rounds: Further arguments of `take_turns`.
        say: Told what happens, a line at a time.
        truth_faults: What is wrong with the truth of each operation, as far as it was checked.
        tiles: Tiles that Triton launchers chose, by operation and shape.
    """

    device: torch.device
    dtype: torch.dtype
    store: SpeedStore
    providers: Sequence[str] | None = None
    time_wrong: bool = False
    rounds: Mapping[str, float] = field(default_factory=dict)
    say: Say = lambda line: None
    truth_faults: dict[str, str | None] = field(default_factory=dict)
    tiles: dict[str, list[str]] = field(default_factory=dict)

    @property
    def launch_modes(self) -> tuple[str, ...]:
        """Graphs exist on GPUs only."""
        return (EAGER, GRAPH) if self.device.type == "cuda" else (EAGER,)

    def ceilings(self, **sizes: int) -> Ceilings:
        """The measured rates, from the file if an earlier part of this run measured them."""
        if len(self.store.rates()) < len(ceiling_module.RATES):
            rates = measure_ceilings(self.device, **sizes)
            for name, rate in rates.items():
                self.say(f"{name} {rate.value:.1f}")
            self.store.put(self._ceiling_row(name, rate) for name, rate in rates.items())
        return ceilings_of(self.store.rates())

    def _ceiling_row(self, metric: str, rate: Estimate) -> Row:
        return self.store.make(
            EXPERIMENT,
            metric,
            rate.value,
            model=DEVICE,
            mixer=DEVICE,
            n=rate.n,
            low=rate.low,
            high=rate.high,
            interval=rate.interval,
        )

    def run(self, problem: Problem, ceilings: Ceilings) -> None:
        """Everything that is still missing of one problem."""
        names = choose_names(problem, self.providers)
        writer = CellWriter(
            self.store,
            problem,
            str(self.dtype).removeprefix("torch."),
            0,
            None,
            self.launch_modes,
        )
        missing = [name for name in names if any(writer.pending(name))]
        if not missing:
            return
        try:
            _Part(self, problem, ceilings, missing).run()
        except HamError:
            raise
        except Exception as error:
            # Inputs or truth did not fit: the cells say so, and the run goes on.
            reason = describe(error)
            for name in missing:
                writer.failed(name, list(writer.pending(name)), reason)
            recover()
        finally:
            # FlexAttention is compiled anew for every shape; without this, the limit of 8 versions
            # of one function would be reached.
            torch.compiler.reset()
            _free()


class _Part:
    """One problem of a run, with the tensors that its subjects share."""

    def __init__(self, bench: Bench, problem: Problem, ceilings: Ceilings, names: list[str]):
        self.bench = bench
        self.problem = problem
        self.ceilings = ceilings
        self.inputs = problem.inputs(bench.dtype, bench.device, SEED)
        routed = self.inputs.get("routed_BT")
        self.writer = CellWriter(
            bench.store,
            problem,
            str(bench.dtype).removeprefix("torch."),
            next(iter(self.inputs.values())).shape[1],
            None if routed is None else routed.double().mean().item(),
            bench.launch_modes,
        )
        self.weight = _weight(problem, self.inputs)
        self.clock: Clock = make_clock(bench.device)
        self.checks: dict[str, Check] = {}
        self.subjects = self._willing(names)

    def _willing(self, names: list[str]) -> dict[str, Subject]:
        """Subjects that can do the problem; the others get rows with the reason."""
        subjects = {}
        for name in names:
            subject = make_subject(self.problem, name)
            reason = refusal(subject, self.problem, self.inputs)
            if reason is None:
                subjects[name] = subject
            else:
                self._skip(subject, f"skipped: {reason}")
        return subjects

    def _skip(self, subject: Subject, reason: str, correct: bool | None = None) -> None:
        """Leave a subject out, with a row that says why for each of its cells."""
        name = subject.name
        cells = list(self.writer.pending(name))
        self.writer.failed(name, cells, reason, labels=subject.labels, correct=correct)
        self._say(f"{name}: {reason}")

    def _say(self, line: str) -> None:
        fraction = "" if self.problem.fraction is None else f" f{self.problem.fraction:g}"
        self.bench.say(f"{self.problem.operation} {self.problem.shape}{fraction} {line}")

    def run(self) -> None:
        if not self.subjects:
            return
        fault = self._truth_fault()
        if fault is not None:
            for subject in self.subjects.values():
                self._skip(subject, fault)
            return
        with recorded_tiles(self.problem.operation) as chosen:
            self._compare()
        if chosen:
            self.bench.tiles[f"{self.problem.operation} {self.problem.shape}"] = sorted(chosen)
        for mode in modes_of(self.problem):
            self._time_mode(mode)

    def _truth_fault(self) -> str | None:
        operation = self.problem.operation
        if operation in COMPONENTS:
            return None
        faults = self.bench.truth_faults
        if operation not in faults:
            faults[operation] = check_truth(operation, self.bench.device)
        return faults[operation]

    def _compare(self) -> None:
        """Check every subject; those that may not be timed leave with a row for each cell."""
        truth = _truth(self.problem, self.inputs, self.weight)
        for name, subject in list(self.subjects.items()):
            check = check_subject(subject, self.problem, self.inputs, self.weight, truth)
            if check.refusal is not None and subject.has_guard and self.bench.time_wrong:
                recover()
                subject = subject.without_guard()
                check = check_subject(subject, self.problem, self.inputs, self.weight, truth)
            if check.failure is not None:
                self._skip(subject, check.failure, correct=False)
                recover(name)
                del self.subjects[name]
                continue
            self.subjects[name], self.checks[name] = subject, check
            self.writer.checked(name, check, subject.labels)
            self._say(f"{name}: {_verdict(check)}")
            faults = check.faults()
            if faults and not self.bench.time_wrong:
                self._skip(subject, f"wrong result: {'; '.join(faults)}", correct=False)
                del self.subjects[name]
        del truth
        _free()

    def _time_mode(self, mode: str) -> None:
        tasks: dict[str, Task] = {}
        for name, subject in self.subjects.items():
            cells = [cell for cell in self.writer.pending(name) if cell[0] == mode]
            refused = self.checks[name].refusal
            if cells and mode == "forward_backward" and refused is not None:
                reason = f"backward refused: {refused}"
                self.writer.failed(name, cells, reason, labels=subject.labels)
            elif cells:
                try:
                    tasks[name] = make_task(subject, self.inputs, self.weight, mode)
                except Exception as error:
                    self.writer.failed(name, cells, describe(error), labels=subject.labels)
                    recover()
        timings = self._take_turns(mode, EAGER, tasks)
        for name, timing in timings.items():
            self._store(name, mode, EAGER, timing, self._peak_bytes(tasks[name], timing))
        if GRAPH in self.bench.launch_modes:
            self._time_graphs(mode, tasks, timings)

    def _take_turns(self, mode: str, launch_mode: str, tasks: dict[str, Task]) -> dict[str, Timing]:
        """Time tasks; should the GPU be lost, that leaves rows, so that no later run loses it."""
        try:
            return take_turns(self.clock, tasks, **self.bench.rounds)
        except GpuLostError as error:
            for name in tasks if error.task is None else (error.task,):
                self.writer.failed(name, [(mode, launch_mode)], str(error))
            raise

    def _time_graphs(self, mode: str, tasks: dict[str, Task], eager: dict[str, Timing]) -> None:
        graphs: dict[str, Task] = {}
        failed: dict[str, Timing] = {}
        for name, task in tasks.items():
            estimate = eager[name].estimate
            try:
                if estimate is None:
                    failed[name] = eager[name]
                elif estimate.value > LONGEST_GRAPH_MS:
                    reason = f"not recorded: a call takes {estimate.value:.0f} ms"
                    failed[name] = Timing(error=f"{reason}, above {LONGEST_GRAPH_MS:.0f}")
                else:
                    graphs[name] = _replaying(task)
            except Exception as error:
                failed[name] = Timing(error=f"no CUDA graph: {describe(error)}")
                self._recover(name, mode, GRAPH, failed[name].error)
        timings = {**failed, **self._take_turns(mode, GRAPH, graphs)}
        for name, timing in timings.items():
            self._store(name, mode, GRAPH, timing, None)
        del graphs
        _free()

    def _recover(self, name: str, mode: str, launch_mode: str, reason: str | None) -> None:
        try:
            recover(name)
        except GpuLostError:
            self.writer.failed(name, [(mode, launch_mode)], reason or "GPU lost")
            raise

    def _peak_bytes(self, task: Task, timing: Timing) -> int | None:
        if timing.error is not None or self.bench.device.type != "cuda":
            return None
        with task.setting():
            return peak_extra_bytes(task.run, self.bench.device)

    def _store(
        self, name: str, mode: str, launch_mode: str, timing: Timing, peak_bytes: int | None
    ) -> None:
        self.writer.timed(
            name,
            mode,
            launch_mode,
            timing,
            floor_of(self.problem, mode, self.bench.dtype, self.ceilings),
            self.checks[name],
            self.subjects[name].labels,
            peak_bytes,
        )
        estimate = timing.estimate
        result = timing.error if estimate is None else f"{estimate.value:.4f} ms"
        self._say(f"{name} {mode} {launch_mode}: {result}")


def _replaying(task: Task) -> Task:
    graph = capture_checked(task)

    def run() -> object:
        graph.replay()
        return graph.result

    return Task(run, task.setting)


def _weight(problem: Problem, inputs: Inputs) -> Tensor | None:
    return None if problem.operation in COMPONENTS else weight_for(problem, inputs)


def _truth(problem: Problem, inputs: Inputs, weight: Tensor | None) -> Truth:
    if weight is not None:
        return compute_truth(problem, inputs, weight)
    # Integers and copies: the plain torch form is the definition.
    return Truth(providers(problem.operation)["torch"](inputs))


def _verdict(check: Check) -> str:
    words = []
    largest = check.worst()
    if largest is not None:
        words.append(f"largest error {largest[1]:.1e} ({largest[0]})")
    if check.score_error is not None and check.decisions_flipped is not None:
        words.append(
            f"score off by {check.score_error:.1e} on average, "
            f"{check.decisions_flipped:.2%} of decisions flipped at a quarter"
        )
    if check.refusal is not None:
        words.append(f"backward refused: {check.refusal}")
    return "; ".join([*words, "WRONG" if check.faults() else "right"])


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
