"""Cells of a speed run: which there are, and the rows that their results become."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ham.kernels.speed.ceilings import Floor
from ham.kernels.speed.checks import Check
from ham.kernels.speed.clock import Timing
from ham.kernels.speed.problems import COMPONENTS, Problem
from ham.kernels.speed.store import EXPERIMENT, Key, SpeedStore
from ham.report.rows import Row

MODES = ("forward", "forward_saving", "forward_backward")
EAGER = "eager"
GRAPH = "cuda_graph"
# Most milliseconds of an eager call whose graph is still recorded.
LONGEST_GRAPH_MS = 150.0


def modes_of(problem: Problem) -> tuple[str, ...]:
    """The modes of a problem; parts of routing have no backward."""
    return MODES[:1] if problem.operation in COMPONENTS else MODES


@dataclass(frozen=True)
class CellWriter:
    """Makes and stores the rows of one problem.

    Attributes:
        store: Where rows go.
        problem: The problem.
        dtype: Name of the dtype of its inputs.
        time: Sequence length.
        kv_fraction: Realised share of routed tokens, or None.
        launch_modes: Launch modes that are timed on this device.
    """

    store: SpeedStore
    problem: Problem
    dtype: str
    time: int
    kv_fraction: float | None
    launch_modes: tuple[str, ...]

    def key(self, provider: str, metric: str, launch_mode: str) -> Key:
        """The key of a number of this problem."""
        problem = self.problem
        fraction = problem.fraction
        return (
            problem.operation,
            problem.shape,
            None if fraction is None else float(fraction),
            provider,
            metric,
            launch_mode,
            self.dtype,
        )

    def pending(self, provider: str) -> Iterator[tuple[str, str]]:
        """Mode and launch mode of the times that a provider lacks."""
        for mode in modes_of(self.problem):
            for launch_mode in self.launch_modes:
                if not self.store.has(self.key(provider, f"{mode}_ms", launch_mode)):
                    yield mode, launch_mode

    def failed(
        self, provider: str, cells: list[tuple[str, str]], reason: str, **fields: Any
    ) -> None:
        """Store a row with the reason for each of a provider's cells."""
        self.store.put(
            [
                self._row(provider, f"{mode}_ms", None, mode, launch_mode, error=reason, **fields)
                for mode, launch_mode in cells
            ]
        )

    def checked(self, provider: str, check: Check, labels: dict[str, str]) -> None:
        """Store what the comparison found."""
        rows = []
        largest = check.worst()
        if largest is not None:
            errors = {f"error {name}": value for name, value in check.errors().items()}
            name, worst = largest
            number = math.isfinite(worst)
            rows.append(
                self._row(
                    provider,
                    "max_relative_error",
                    worst if number else None,
                    "check",
                    EAGER,
                    correct=not check.faults(),
                    error=None if number else f"{name} is {worst}",
                    labels={**labels, **errors, "tolerance": check.tolerance},
                )
            )
        for metric, value in (
            ("score_mean_absolute_error", check.score_error),
            ("decisions_flipped", check.decisions_flipped),
        ):
            if value is not None:
                row = self._row(
                    provider,
                    metric,
                    value,
                    "check",
                    EAGER,
                    correct=not check.faults(),
                    labels=labels,
                )
                rows.append(row)
        self.store.put(rows)

    def timed(
        self,
        provider: str,
        mode: str,
        launch_mode: str,
        timing: Timing,
        floor: Floor,
        check: Check,
        labels: dict[str, str],
        peak_bytes: int | None,
    ) -> None:
        """Store a time, or the reason why there is none, and the peak memory of the call."""
        faults = "; ".join(check.faults(mode))
        said = {
            **labels,
            "floor_ms": floor.milliseconds,
            "floor_bound": floor.bound,
            "compared_shape": self.problem.shape,
            **({"comparison_error": faults} if faults else {}),
        }
        if mode != "forward_backward" and check.refusal is not None:
            said["gradients"] = f"not compared: {check.refusal}"
        largest = check.worst(mode)
        if largest is not None:
            said["worst_tensor"], said["max_relative_error"] = largest
        fields: dict[str, Any] = {"labels": said, "correct": not faults}
        estimate = timing.estimate
        if estimate is None:
            fields["error"] = timing.error
        else:
            fields |= {
                "n": estimate.n,
                "low": estimate.low,
                "high": estimate.high,
                "interval": estimate.interval,
            }
        value = None if estimate is None else estimate.value
        rows = [self._row(provider, f"{mode}_ms", value, mode, launch_mode, **fields)]
        if peak_bytes is not None:
            fields = {"labels": labels, "correct": not faults}
            rows.append(
                self._row(provider, f"{mode}_peak_bytes", peak_bytes, mode, launch_mode, **fields)
            )
        self.store.put(rows)

    def _row(
        self,
        provider: str,
        metric: str,
        value: float | None,
        mode: str,
        launch_mode: str,
        labels: dict[str, Any] | None = None,
        **fields: Any,
    ) -> Row:
        said: dict[str, Any] = {"dtype": self.dtype, "mode": mode, "timing": "cold_l2"}
        if self.problem.fraction is not None:
            said["fraction"] = self.problem.fraction
        # JSON has no NaN.
        finite = {
            name: str(label) if isinstance(label, float) and not math.isfinite(label) else label
            for name, label in (labels or {}).items()
        }
        return self.store.make(
            EXPERIMENT,
            metric,
            value,
            model=self.problem.operation,
            mixer=self.problem.operation,
            task=self.problem.shape,
            x_name="context",
            x_value=self.time,
            labels={**said, **finite},
            kv_fraction=self.kv_fraction,
            provider=provider,
            launch_mode=launch_mode,
            **fields,
        )
