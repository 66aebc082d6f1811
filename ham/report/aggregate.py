"""From rows to cells: what one table entry or one point of a plot knows.

Rows of the same coordinates and different seeds make one cell. With two or more seeds its interval
is Student's t over the seeds; with one seed it is the interval that the measurement itself gave
(Wilson over needles, bootstrap over documents, 20th to 80th percentile over repetitions), and n is
printed as 1. A cell whose rows all failed keeps the reasons; a cell without rows was not run.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from ham.report.palette import order_models
from ham.report.rows import Row
from ham.report.statistics import (
    Estimate,
    mean,
    paired_difference,
    pooled_share,
    t_interval,
)

Status = Literal["ok", "partial", "failed", "not run"]


UNREPORTED = ("tuning", "mqar_tuning")
SHARED = "gpu_processes"
SHARED_TIMES = "What evaluation timed is left out: processes shared the GPU."


@dataclass(frozen=True)
class Cell:
    """One number of the report.

    Attributes:
        estimate: Mean over seeds with its interval; None where nothing succeeded. `estimate.n`
            counts seeds.
        errors: Reasons of the seeds that failed.
        rows: Every row behind the cell, failed ones included.
        by_seed: The value of each seed that succeeded.
    """

    estimate: Estimate | None
    errors: tuple[str, ...] = ()
    rows: tuple[Row, ...] = ()
    by_seed: tuple[tuple[int | None, float], ...] = ()

    @property
    def value(self) -> float | None:
        """The point estimate, or None."""
        return None if self.estimate is None else self.estimate.value

    @property
    def observations(self) -> int:
        """Documents, needles or repetitions behind the cell, over all seeds."""
        return sum(row.n for row in self.rows if row.value is not None)

    @property
    def status(self) -> Status:
        """`ok`, `partial` (some seeds failed), `failed` or `not run`."""
        if self.estimate is None:
            return "failed" if self.errors else "not run"
        return "partial" if self.errors else "ok"


NOT_RUN = Cell(None)


@dataclass(frozen=True)
class Point:
    """A cell at its horizontal coordinate."""

    x: float
    cell: Cell


class Results:
    """All rows of a report, indexed for questions.

    Args:
        rows: Result rows in any order; for repeated coordinates the last row counts. A value that
            is not finite (a run that diverged) is a failure.
    """

    def __init__(self, rows: Iterable[Row]):
        self.rows = [_finite(row) for row in rows]
        self.models = order_models({row.model for row in self.rows})
        # By model too: a study has tens of thousands of rows and a thousand cells.
        self._index: dict[tuple[str, str, str | None], list[Row]] = defaultdict(list)
        for row in self.rows:
            self._index[row.experiment, row.metric, None].append(row)
            self._index[row.experiment, row.metric, row.model].append(row)

    def find(
        self,
        experiment: str,
        metric: str,
        *,
        model: str | None = None,
        task: str | None = None,
        x: float | None = None,
        keep: Callable[[Row], bool] | None = None,
        **labels: Any,
    ) -> list[Row]:
        """Rows of one metric; every argument that is given must match."""
        found = []
        for row in self._index.get((experiment, metric, model), ()):
            if task is not None and row.task != task:
                continue
            if x is not None and row.x_value != x:
                continue
            if any(row.labels.get(name) != value for name, value in labels.items()):
                continue
            if keep is None or keep(row):
                found.append(row)
        return found

    def cell(self, experiment: str, metric: str, **where: Any) -> Cell:
        """The cell of the matching rows, which must differ in nothing but their seed."""
        return summarise(self.find(experiment, metric, **where))

    def pooled_cell(self, experiment: str, metric: str, **where: Any) -> Cell:
        """One cell of a whole grid: per seed the mean weighted by n, then over seeds."""
        return summarise_pooled(self.find(experiment, metric, **where))

    def series(self, experiment: str, metric: str, **where: Any) -> list[Point]:
        """Cells by rising horizontal coordinate; rows of one x differ in nothing but seed."""
        by_x: dict[float, list[Row]] = defaultdict(list)
        for row in self.find(experiment, metric, **where):
            if row.x_value is not None:
                by_x[row.x_value].append(row)
        return [Point(x, summarise(by_x[x])) for x in sorted(by_x)]

    def x_values(self, experiment: str, metric: str, **where: Any) -> list[float]:
        """Every horizontal coordinate of a metric, failed cells included."""
        found = self.find(experiment, metric, **where)
        return sorted({row.x_value for row in found if row.x_value is not None})

    def label_values(self, experiment: str, metric: str, label: str, **where: Any) -> list[Any]:
        """Every value of a label that occurs."""
        found = self.find(experiment, metric, **where)
        return sorted({row.labels[label] for row in found if label in row.labels})

    def tasks(self, experiment: str, metric: str | None = None) -> list[str]:
        """Every task of an experiment."""
        return sorted(
            {
                row.task
                for row in self.rows
                if row.experiment == experiment
                and row.task is not None
                and (metric is None or row.metric == metric)
            }
        )

    def failures(self) -> list[Row]:
        """Every failed row."""
        return [row for row in self.rows if row.error is not None]

    def seeds(self, model: str | None = None) -> list[int]:
        """Every seed that is reported, of a model or of all; not those that chose a rate."""
        of_model = self.rows if model is None else [row for row in self.rows if row.model == model]
        reported = [row for row in of_model if row.experiment not in UNREPORTED]
        return sorted({row.seed for row in reported if row.seed is not None})

    @property
    def reported_models(self) -> list[str]:
        """Models with results; those of which only learning rates were tried have none."""
        return [model for model in self.models if self.seeds(model)]

    @property
    def tuned_only(self) -> list[str]:
        """Models of which only learning rates were tried."""
        rest = {row.model for row in self.rows if row.experiment in UNREPORTED}
        return [model for model in self.models if model in rest and not self.seeds(model)]

    def seed_counts(self) -> list[int]:
        """How many seeds models have, each number once, ascending; those without any left out."""
        return sorted({len(self.seeds(model)) for model in self.models} - {0})

    def shared_gpu(self) -> list[int]:
        """How many processes shared a GPU while models trained; empty where none did.

        Evaluation ran in the same processes, so what it timed says nothing. `ham measure` runs
        alone.
        """
        rows = self.find("train", "tokens_per_second")
        return sorted({row.labels[SHARED] for row in rows if SHARED in row.labels})

    def devices(self) -> list[str]:
        """Every device that occurs."""
        return sorted({row.device for row in self.rows})

    def parameters(self, model: str) -> int | None:
        """Parameters of a model, as its rows give them."""
        for row in self.rows:
            if row.model == model and row.parameters is not None:
                return row.parameters
        return None


def summarise(rows: Sequence[Row]) -> Cell:
    """One cell from the rows of one set of coordinates, one row per seed."""
    latest = {row.seed: row for row in rows}
    good = {seed: row for seed, row in latest.items() if row.value is not None}
    errors = tuple(row.error for row in latest.values() if row.error is not None)
    if not good:
        return Cell(None, errors, tuple(latest.values()))
    by_seed = tuple(sorted(((s, r.value) for s, r in good.items()), key=_seed_order))
    if len(good) == 1:
        (row,) = good.values()
        estimate = Estimate(row.value, 1, row.low, row.high, row.interval)
    else:
        estimate = t_interval([value for _, value in by_seed])
    return Cell(estimate, errors, tuple(latest.values()), by_seed)


def summarise_pooled(rows: Sequence[Row]) -> Cell:
    """One cell from a grid of rows: per seed the mean weighted by n, then over seeds.

    With one seed and shares (Wilson intervals) the interval is Wilson's over all observations, or
    over as many as they are worth (`effective_n`).
    """
    good = [row for row in rows if row.value is not None]
    errors = tuple(row.error for row in rows if row.error is not None)
    if not good:
        return Cell(None, errors, tuple(rows))
    grouped: dict[int | None, list[Row]] = defaultdict(list)
    for row in good:
        grouped[row.seed].append(row)
    by_seed = tuple(
        sorted(((seed, _weighted_mean(group)) for seed, group in grouped.items()), key=_seed_order)
    )
    if len(by_seed) > 1:
        estimate = t_interval([value for _, value in by_seed])
    elif all(row.interval == "wilson95" for row in good):
        pooled = pooled_share(
            [Estimate(row.value, row.n, effective_n=row.effective_n) for row in good]
        )
        estimate = Estimate(by_seed[0][1], 1, pooled.low, pooled.high, pooled.interval)
    else:
        estimate = Estimate(by_seed[0][1], 1)
    return Cell(estimate, errors, tuple(rows), by_seed)


def kv_fraction_cell(rows: Sequence[Row]) -> Cell | None:
    """The realised KV fraction that rows carry beside their value; None where there is none."""
    carried = [row for row in rows if row.value is not None and row.kv_fraction is not None]
    if not carried:
        return None if any(row.value is not None for row in rows) else summarise(rows)
    plain = {"low": None, "high": None, "interval": None}
    return summarise(
        [row.model_copy(update={"value": row.kv_fraction, **plain}) for row in carried]
    )


def difference(cell: Cell, reference: Cell) -> Cell:
    """`cell - reference`, paired by seed; failed or not run when either side is."""
    ours, theirs = dict(cell.by_seed), dict(reference.by_seed)
    shared = [seed for seed in ours if seed in theirs]
    rows = cell.rows + reference.rows
    if not shared:
        return Cell(None, cell.errors or reference.errors, rows)
    estimate = paired_difference([ours[s] for s in shared], [theirs[s] for s in shared])
    return Cell(
        estimate,
        cell.errors + reference.errors,
        rows,
        tuple((seed, ours[seed] - theirs[seed]) for seed in shared),
    )


def or_failure(cell: Cell, *related: Cell) -> Cell:
    """`cell`, or where it was not run the failure of a cell of the same measurement."""
    if cell.status != "not run":
        return cell
    return next((other for other in related if other.status == "failed"), cell)


def with_spread_of_time(rate: Cell, time: Cell) -> Cell:
    """A rate of one run with the interval of its time.

    Percentiles survive a monotone map: where rate = c / time, the interval of the rate is
    c / high to c / low.
    """
    ours, theirs = rate.estimate, time.estimate
    if ours is None or theirs is None or ours.low is not None or theirs.low is None:
        return rate
    if ours.n != 1 or theirs.n != 1 or theirs.low <= 0 or theirs.high is None:
        return rate
    scale = ours.value * theirs.value
    spread = replace(
        ours, low=scale / theirs.high, high=scale / theirs.low, interval=theirs.interval
    )
    return replace(rate, estimate=spread)


def most_common(values: Iterable[Any]) -> Any:
    """The most frequent value, the last in sorted order among equals; None without values."""
    counts = Counter(values)
    return max(counts, key=lambda value: (counts[value], str(value))) if counts else None


def _finite(row: Row) -> Row:
    if row.value is None or math.isfinite(row.value):
        return row
    error = f"not finite: {row.metric} is {row.value}"
    return row.model_copy(
        update={"value": None, "low": None, "high": None, "interval": None, "error": error}
    )


def _weighted_mean(rows: Sequence[Row]) -> float:
    total = sum(row.n for row in rows)
    if total == 0:
        return mean([row.value for row in rows])
    return sum(row.value * row.n for row in rows) / total


def _seed_order(item: tuple[int | None, float]) -> tuple[bool, int]:
    seed = item[0]
    return (seed is not None, seed or 0)
