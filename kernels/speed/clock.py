"""Timing of tasks that take turns, by CUDA events or by wall clock, and of CUDA graphs.

Each round runs every task once; how many rounds a task takes part in follows from its time when
warm. On a GPU the L2 cache is overwritten before every call. The host waits for the device only
after several rounds, so that launching runs ahead of the device as it does in a training step.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from ham.errors import DeviceError
from ham.kernels.speed.checks import describe
from ham.report.statistics import Estimate, p20_p80

MIN_ROUNDS = 5
ROUNDS_AT_ONCE = 5
MAX_ROUNDS = 40
WARM_UP = 2
# A call that takes longer than SLOW_MS is timed SLOW_ROUNDS times.
SLOW_MS = 100.0
SLOW_ROUNDS = 3
# Milliseconds that one task may be timed, beyond its first MIN_ROUNDS.
TASK_BUDGET_MS = 600.0
# Five times the L2 cache of an H100.
FLUSH_BYTES = 256 << 20


@dataclass(frozen=True)
class Task:
    """Something to time: `run` under `setting`; what it returns is dropped after the timing."""

    run: Callable[[], Any]
    setting: Callable[[], AbstractContextManager]


@dataclass
class Timing:
    """Samples of one task, or why there are none."""

    samples_ms: list[float] = field(default_factory=list)
    error: str | None = None

    @property
    def estimate(self) -> Estimate | None:
        """Median with p20 and p80."""
        return None if self.error is not None else p20_p80(self.samples_ms)


class Clock(Protocol):
    """How one call is timed on a device."""

    def start(self, task: Task) -> Callable[[], float]:
        """Run a task; the function returned gives its milliseconds after `wait`."""

    def wait(self) -> None:
        """Wait for the device."""


class WallClock:
    """Wall time, for tasks that are done when they return."""

    def start(self, task: Task) -> Callable[[], float]:
        """Run and time a task."""
        with task.setting():
            begin = time.perf_counter()
            task.run()
            elapsed = (time.perf_counter() - begin) * 1e3
        return lambda: elapsed

    def wait(self) -> None:
        """Nothing to wait for."""


class CudaClock:
    """CUDA events around each call, after the L2 cache has been overwritten."""

    def __init__(self, device: torch.device, flush_bytes: int = FLUSH_BYTES):
        self.device = device
        self.buffer = torch.empty(flush_bytes // 4, dtype=torch.int32, device=device)

    def start(self, task: Task) -> Callable[[], float]:
        """Queue a task between two events."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with task.setting():
            self.buffer.zero_()
            begin.record()
            kept = task.run()
            end.record()
        del kept
        return lambda: begin.elapsed_time(end)

    def wait(self) -> None:
        """Wait until everything queued has run."""
        torch.cuda.synchronize(self.device)


def make_clock(device: torch.device) -> Clock:
    """The clock of a device."""
    return CudaClock(device) if device.type == "cuda" else WallClock()


def take_turns(
    clock: Clock,
    tasks: Mapping[str, Task],
    *,
    min_rounds: int = MIN_ROUNDS,
    max_rounds: int = MAX_ROUNDS,
    budget_ms: float = TASK_BUDGET_MS,
) -> dict[str, Timing]:
    """Time tasks round by round; one that raises gets its error and leaves.

    Raises:
        GpuLostError: If the GPU can no longer be used by this process.
    """
    warm = {name: Timing() for name in tasks}
    _rounds(clock, tasks, warm, WARM_UP)
    timings = {name: Timing(error=one.error) for name, one in warm.items()}
    left = {
        name: plan_rounds(one.samples_ms[-1], min_rounds, max_rounds, budget_ms)
        for name, one in warm.items()
        if one.error is None
    }
    while left:
        rounds = min(ROUNDS_AT_ONCE, *left.values())
        _rounds(clock, {name: tasks[name] for name in left}, timings, rounds)
        left = {
            name: count - rounds
            for name, count in left.items()
            if count > rounds and timings[name].error is None
        }
    return timings


def plan_rounds(milliseconds: float, least: int, most: int, budget_ms: float) -> int:
    """How often a call that takes so long is timed: as its budget allows, within bounds."""
    if milliseconds > SLOW_MS:
        least = min(least, SLOW_ROUNDS)
    affordable = int(budget_ms / milliseconds) if milliseconds > 0 else most
    return max(least, min(most, affordable))


def _rounds(
    clock: Clock, tasks: Mapping[str, Task], timings: Mapping[str, Timing], rounds: int
) -> None:
    readings: list[tuple[str, Callable[[], float]]] = []
    for _ in range(rounds):
        for name, task in tasks.items():
            if timings[name].error is not None:
                continue
            try:
                readings.append((name, clock.start(task)))
            except Exception as error:
                timings[name].error = describe(error)
                recover(name)
    try:
        clock.wait()
    except RuntimeError as error:
        raise GpuLostError(error) from error
    for name, read in readings:
        timings[name].samples_ms.append(read())


class GpuLostError(DeviceError):
    """A failure took this process's access to the GPU with it.

    Attributes:
        task: The task that failed, or None if that is not known.
    """

    def __init__(self, error: BaseException, task: str | None = None):
        super().__init__(
            f"the GPU is lost to this process ({describe(error)}); run the command again with the "
            "same --rows: finished cells are kept"
        )
        self.task = task


def recover(task: str | None = None) -> None:
    """Free what a failed call left behind.

    Raises:
        GpuLostError: If the GPU can no longer be used by this process.
    """
    if not torch.cuda.is_available():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        raise GpuLostError(error, task) from error
    torch.cuda.empty_cache()


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    """Raise where torch would wait for the device."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@dataclass(frozen=True)
class Graph:
    """A captured call.

    Attributes:
        replay: Runs it.
        result: What the captured call returned; every replay writes it anew.
    """

    replay: Callable[[], None]
    result: Any


def capture(task: Task) -> Graph:
    """Record a task as a CUDA graph; raises what the capture raises.

    A task that waits for the device cannot be captured; it is found out in an ordinary run, because
    a capture that breaks off may harm later ones. Warm-up runs on a stream of its own, as torch
    asks for.
    """
    with task.setting(), no_waiting():
        task.run()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with task.setting():
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                task.run()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            result = task.run()
    return Graph(graph.replay, result)
