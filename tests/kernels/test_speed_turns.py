"""Timing in turns: how often, in which order, and what a failure leaves."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch

from ham.errors import DeviceError
from ham.kernels.speed.clock import Task, Timing, WallClock, plan_rounds, take_turns


def test_tasks_take_turns_and_leave_when_they_fail() -> None:
    calls: list[str] = []

    def task(name: str, fail_at: int = -1) -> Task:
        def run() -> None:
            calls.append(name)
            if calls.count(name) == fail_at:
                raise ValueError("broken")

        return Task(run, contextlib.nullcontext)

    timings = take_turns(
        WallClock(),
        {"a": task("a"), "b": task("b", fail_at=3)},
        min_rounds=2,
        max_rounds=2,
        budget_ms=0.0,
    )
    assert calls[:5] == ["a", "b", "a", "b", "a"]
    assert timings["b"].error == "ValueError: broken" and timings["b"].estimate is None
    assert len(timings["a"].samples_ms) == 2


def test_a_slow_task_stops_after_its_least_rounds() -> None:
    class Slow:
        def start(self, task: Task) -> Any:
            return lambda: 100.0

        def wait(self) -> None:
            pass

    nothing = Task(lambda: None, contextlib.nullcontext)
    timing = take_turns(Slow(), {"a": nothing}, min_rounds=5, max_rounds=50, budget_ms=10)["a"]
    assert timing.samples_ms == [100.0] * 5
    assert timing.estimate.value == 100.0
    assert Timing(error="x").estimate is None


def test_rounds_follow_from_the_time_of_a_call() -> None:
    assert plan_rounds(1.0, least=5, most=40, budget_ms=600.0) == 40
    assert plan_rounds(50.0, least=5, most=40, budget_ms=600.0) == 12
    assert plan_rounds(90.0, least=5, most=40, budget_ms=60.0) == 5
    assert plan_rounds(900.0, least=5, most=40, budget_ms=600.0) == 3
    assert plan_rounds(0.0, least=5, most=40, budget_ms=600.0) == 40


def test_a_lost_gpu_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(*args: Any) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    failing = Task(lost, contextlib.nullcontext)
    with pytest.raises(DeviceError, match="finished cells are kept"):
        take_turns(WallClock(), {"a": failing})
