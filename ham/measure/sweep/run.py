"""The sweep itself: cell by cell in order of importance, until all are done or time is up."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from ham.kernels.speed import ceilings as ceiling_module
from ham.kernels.speed.ceilings import COPY, measure_ceilings
from ham.kernels.speed.clock import Clock, GpuLostError, Task, make_clock, recover, take_turns
from ham.measure.sweep.budget import free_bytes, predicted_bytes, refusal
from ham.measure.sweep.causes import whole_cause
from ham.measure.sweep.cells import CellResult, measure_cell
from ham.measure.sweep.grid import MODEL_TRAIN, Cell, Scale
from ham.measure.sweep.models import ModelShelf, arm_name, release
from ham.measure.sweep.parts import PartTime
from ham.measure.sweep.store import CEILING_EXPERIMENT, PART_TIME, TIME, SweepStore, cell_key
from ham.report.row_store import DEVICE
from ham.report.rows import Row
from ham.report.statistics import Estimate

OUT_OF_MEMORY = "out of memory"
CPU_CEILINGS = {"buffer_bytes": 64 << 20, "size": 512}
"""The sizes for GPUs would take a CPU a minute."""

ROUNDS = {"min_rounds": 5, "max_rounds": 30, "budget_ms": 150.0}
"""How often a cell is timed: a sixth of a second, beyond the first five calls."""


@dataclass
class Sweep:
    """One run.

    Attributes:
        device: Where it runs.
        dtype: Of inference weights, activations and caches.
        store: Where rows go.
        budget_seconds: No cell is begun later than this; None for no limit.
        rounds: Arguments of `take_turns`.
        say: Told what happens, a line at a time.
        fuse: Fuse the small operations of decode steps with torch.compile.
        free: Bytes that tensors can still get on a device; None where that is not limited.
    """

    device: torch.device
    dtype: torch.dtype
    scale: Scale
    store: SweepStore
    budget_seconds: float | None = None
    rounds: Mapping[str, float] = field(default_factory=lambda: dict(ROUNDS))
    say: Callable[[str], None] = lambda line: None
    fuse: bool = False
    free: Callable[[torch.device], int | None] = free_bytes

    def __post_init__(self) -> None:
        self.shelf = ModelShelf(self.scale, self.device, self.dtype)
        self.clock: Clock = make_clock(self.device)
        self.layouts: dict[tuple[int, int], str] = {}

    def run(self, cells: Sequence[Cell], **ceiling_sizes: int) -> int:
        """Measure what is missing; returns how many cells are left for a later run.

        Args:
            cells: The cells, in the order in which they are measured.
            ceiling_sizes: Further arguments of `measure_ceilings`.

        Raises:
            GpuLostError: If the GPU can no longer be used; the cell that lost it is a row.
        """
        begin = time.monotonic()
        self._ceilings(**ceiling_sizes)
        missing = [cell for cell in cells if not self.store.has(cell_key(cell))]
        for done, cell in enumerate(missing):
            elapsed = time.monotonic() - begin
            if self.budget_seconds is not None and elapsed > self.budget_seconds:
                return len(missing) - done
            if cell.experiment != MODEL_TRAIN:
                self.shelf.drop_trained()
            self._one(cell)
        self.shelf.drop_trained()
        return 0

    def _ceilings(self, **sizes: int) -> None:
        if len(self.store.rates()) == len(ceiling_module.RATES):
            return
        usual = CPU_CEILINGS if self.device.type == "cpu" else {}
        for name, rate in measure_ceilings(self.device, **{**usual, **sizes}).items():
            self.say(f"{name} {rate.value:.1f}")
            fields = {"model": DEVICE, "mixer": DEVICE, **_spread(rate)}
            self.store.put([self.store.make(CEILING_EXPERIMENT, name, rate.value, **fields)])
        release()

    def _one(self, cell: Cell) -> None:
        """Measure a cell or find out why not; either way it is a row, and nothing stays behind."""
        parameters = self.shelf.parameters(cell.model)
        needed = predicted_bytes(cell, self.scale, self.dtype.itemsize, parameters)
        why = refusal(needed, self.free(self.device))
        if why is not None:
            self._failed(cell, why)
            return
        try:
            result = measure_cell(cell, self)
        except torch.OutOfMemoryError as error:
            self._failed(cell, f"{OUT_OF_MEMORY}: {whole_cause(error)}")
        except GpuLostError as error:
            self._failed(cell, str(error))
            raise
        except Exception as error:
            # One cell that cannot be measured must not cost the others.
            self._failed(cell, whole_cause(error))
        else:
            self._finished(cell, result, parameters)
            return
        # Outside of the handlers, whose exceptions hold the frames and with them the tensors.
        release()
        recover(cell.name)

    def time(self, function: Callable[[], object]) -> Estimate:
        """Median milliseconds of a call with its spread; raises what the call raises."""
        task = Task(function, contextlib.nullcontext)
        timing = take_turns(self.clock, {"cell": task}, **self.rounds)["cell"]
        if timing.estimate is not None:
            return timing.estimate
        if "OutOfMemoryError" in str(timing.error):
            raise torch.OutOfMemoryError(timing.error)
        raise RuntimeError(timing.error)

    def _finished(self, cell: Cell, result: CellResult, parameters: int) -> None:
        rate = self.store.rates().get(COPY)
        labels = {**self._labels(cell), **result.labels(cell, rate)}
        common = {
            **self._place(cell, parameters),
            "kv_fraction": result.kv_fraction,
            "provider": result.provider,
            "launch_mode": result.launch_mode,
        }
        rows = [
            self.store.make(
                cell.experiment,
                TIME,
                result.time.value,
                labels=labels,
                **common,
                **_spread(result.time),
            )
        ]
        rows += [self._part_row(cell, name, part, common) for name, part in result.parts.items()]
        self.store.put(rows)
        self.say(f"{cell.name}: {result.time.value:.4f} ms ({result.provider})")

    def _part_row(self, cell: Cell, name: str, part: PartTime, common: dict) -> Row:
        return self.store.make(
            cell.experiment,
            PART_TIME,
            None if part.time is None else part.time.value,
            task=name,
            labels={**self._labels(cell), **part.labels()},
            error=part.error,
            **{**common, "launch_mode": part.launch_mode},
            **({} if part.time is None else _spread(part.time)),
        )

    def _failed(self, cell: Cell, reason: str) -> None:
        row: Row = self.store.make(
            cell.experiment,
            TIME,
            None,
            labels=self._labels(cell),
            error=reason,
            kv_fraction=None,
            **self._place(cell, None),
        )
        self.store.put([row])
        self.say(f"{cell.name}: {reason}")

    def _place(self, cell: Cell, parameters: int | None) -> dict:
        whole = cell.head_dim == self.scale.head_dims[0]
        return {
            "model": arm_name(cell.model),
            "mixer": cell.model,
            "parameters": parameters if whole else None,
            "x_name": "context",
            "x_value": cell.context,
        }

    def _labels(self, cell: Cell) -> dict[str, str | int | float]:
        routed = (
            {} if cell.fraction is None else {"fraction": cell.fraction, "routing": cell.routing}
        )
        return {"batch": cell.batch, "head_dim": cell.head_dim, "heads": self.scale.heads, **routed}


def _spread(estimate: Estimate) -> dict:
    return {
        "n": estimate.n,
        "low": estimate.low,
        "high": estimate.high,
        "interval": estimate.interval,
    }
