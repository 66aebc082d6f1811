"""Timing and peak memory of a callable, on a CPU or a CUDA device.

Method: `warmup` calls are not counted; every counted call is timed alone, between device
synchronisations; the median and the 20th and 80th percentiles are reported. Peak memory is taken
in a separate call, because recording it slows the call down.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """Milliseconds of repeated calls."""

    samples_ms: tuple[float, ...]

    @property
    def median_ms(self) -> float:
        """The median."""
        return statistics.median(self.samples_ms)

    def interval(self) -> dict[str, float | str | int]:
        """The 20th and 80th percentiles as fields of a result row; nothing for one sample."""
        n = len(self.samples_ms)
        if n < 2:
            return {"n": n}
        ordered = sorted(self.samples_ms)
        low = ordered[round(0.2 * (n - 1))]
        high = ordered[round(0.8 * (n - 1))]
        return {"n": n, "low": low, "high": high, "interval": "p20_p80"}


def time_calls(
    function: Callable[[], object], device: torch.device, warmup: int, repeats: int
) -> Timing:
    """Time `repeats` calls after `warmup` uncounted ones."""
    for _ in range(warmup):
        function()
    samples = []
    for _ in range(repeats):
        _synchronise(device)
        begin = time.perf_counter()
        function()
        _synchronise(device)
        samples.append((time.perf_counter() - begin) * 1e3)
    return Timing(tuple(samples))


def peak_extra_bytes(function: Callable[[], object], device: torch.device) -> int:
    """Largest amount of tensor memory held at once during a call, beyond what was held before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before
    return _peak_cpu_bytes(function)


def _peak_cpu_bytes(function: Callable[[], object]) -> int:
    """Running sum of the profiler's allocation records; resident memory would only ever rise."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        function()
    held = peak = 0
    for event in sorted(_allocations(profile), key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def _allocations(profile: torch.profiler.profile) -> list:
    events = profile.profiler.kineto_results.events()
    return [event for event in events if event.name() == "[memory]"]


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
