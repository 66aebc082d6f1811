"""Rows of a sweep, found by what they measure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ham.measure.sweep.grid import EXPERIMENTS, UNSTRUCTURED
from ham.measure.sweep.store import CEILING_EXPERIMENT, PART_TIME, TIME
from ham.report.palette import KNOWN_STYLES, Style, shades
from ham.report.rows import Row

HAM = "ham"
TRANSFORMER = "transformer"
MODELS = (HAM, TRANSFORMER, "gated-delta-rule", "mamba2", "sliding-window")
EXPERIMENT_WORDS = {
    "mixer_decode": "Decode step of one mixer",
    "model_decode": "Decode step of a whole model",
    "model_decode_part": "Where the time of a decode step goes",
    "model_prefill": "Prefill: time to the first token",
    "model_train": "Training step",
}
# Parts of the mixer first; a recurrent layer has its core in one piece.
PARTS = (
    "recurrent",
    "core",
    "score",
    "append",
    "attention",
    "gates",
    "projections",
    "mlp",
    "norms",
    "head",
)
HAM_STYLE = KNOWN_STYLES["ham-cosine"]
SHARE_MARKERS = ("*", "p", "v", "<", "d", "h")


@dataclass(frozen=True, order=True)
class Series:
    """One line of a figure: a model, and the routed share where it routes (-1 where not)."""

    model: str
    fraction: float = -1.0

    @property
    def name(self) -> str:
        """For legends and tables."""
        return self.model if self.fraction < 0 else f"{self.model} {100 * self.fraction:g} %"


@dataclass(frozen=True, order=True)
class Place:
    """What a row measures, its model aside."""

    experiment: str
    context: int
    batch: int
    head_dim: int
    routing: str = UNSTRUCTURED


class SweepRows:
    """Rows of sweeps by place and series.

    Attributes:
        rows: All rows of sweeps, ceilings included.
        rates: Measured ceilings by metric.
        devices: Names of the devices, sorted.
    """

    def __init__(self, rows: Iterable[Row]):
        wanted = {*EXPERIMENTS, CEILING_EXPERIMENT}
        self.rows = [row for row in rows if row.experiment in wanted]
        self.rates = {
            row.metric: row.value
            for row in self.rows
            if row.experiment == CEILING_EXPERIMENT and row.value is not None
        }
        self.devices = sorted({row.device for row in self.rows})
        self._cells: dict[tuple[Place, Series], Row] = {}
        self._parts: dict[tuple[Place, Series], dict[str, Row]] = {}
        for row in self.rows:
            if row.metric not in (TIME, PART_TIME):
                continue
            key = place_of(row), series_of(row)
            if row.metric == TIME:
                self._cells[key] = row
            else:
                self._parts.setdefault(key, {})[row.task or ""] = row

    def find(self, place: Place, series: Series) -> Row | None:
        """The row of a cell, or None if it was not run."""
        return self._cells.get((place, series))

    def parts(self, place: Place, series: Series) -> dict[str, Row]:
        """Times of the parts of a step by name, in the order of `PARTS`."""
        found = self._parts.get((place, series), {})
        return {name: found[name] for name in order_parts(found)}

    def cells(self, experiment: str) -> list[tuple[Place, Series, Row]]:
        """All cells of an experiment in the order of tables."""
        found = [(*key, row) for key, row in self._cells.items() if key[0].experiment == experiment]
        return sorted(found, key=lambda cell: (cell[0], _rank(cell[1])))

    def places(self, experiment: str) -> list[Place]:
        """Places with cells, in order."""
        return sorted({place for place, _, _ in self.cells(experiment)})

    def series(self, experiment: str) -> list[Series]:
        """Lines with cells, in the order of legends."""
        return sorted({series for _, series, _ in self.cells(experiment)}, key=_rank)

    def usual_batch(self, experiment: str) -> int | None:
        """The middle one of the batches that have the most contexts."""
        contexts: dict[int, set[int]] = {}
        for place in self.places(experiment):
            contexts.setdefault(place.batch, set()).add(place.context)
        most = max((len(found) for found in contexts.values()), default=0)
        batches = sorted(batch for batch, found in contexts.items() if len(found) == most)
        return batches[len(batches) // 2] if batches else None

    def model_head_dim(self) -> int | None:
        """Head size of the whole models."""
        sizes = {
            place.head_dim
            for experiment in EXPERIMENTS
            if experiment.startswith("model")
            for place in self.places(experiment)
        }
        return min(sizes, default=None)


def place_of(row: Row) -> Place:
    """Where a row belongs."""
    labels = row.labels
    return Place(
        row.experiment,
        int(row.x_value or 0),
        int(labels.get("batch", 0)),
        int(labels.get("head_dim", 0)),
        str(labels.get("routing", UNSTRUCTURED)),
    )


def series_of(row: Row) -> Series:
    """Which line a row is a point of."""
    fraction = row.labels.get("fraction")
    return Series(row.model, -1.0 if fraction is None else float(fraction))


def order_parts(names: Iterable[str]) -> list[str]:
    """Known parts in their order, then the others by name."""
    present = set(names)
    return [name for name in PARTS if name in present] + sorted(present.difference(PARTS))


def number(row: Row | None, label: str | None = None) -> float | None:
    """The value of a row, or one of its labels if that is a number; None if there is none."""
    if row is None or row.value is None:
        return None
    value = row.value if label is None else row.labels.get(label)
    return float(value) if isinstance(value, int | float) else None


def series_styles(series: Sequence[Series]) -> dict[Series, Style]:
    """A style for each line: shades and markers for HAM's shares, the largest in full colour."""
    routed = sorted((one for one in series if one.fraction >= 0), reverse=True)
    colors = shades(HAM_STYLE.color, max(1, len(routed)))
    drawn = {
        one: Style(color, SHARE_MARKERS[index % len(SHARE_MARKERS)], HAM_STYLE.dash)
        for index, (one, color) in enumerate(zip(routed, colors, strict=False))
    }
    return {one: drawn.get(one) or KNOWN_STYLES.get(one.model, HAM_STYLE) for one in series}


def _rank(series: Series) -> tuple[int, str, float]:
    known = MODELS.index(series.model) if series.model in MODELS else len(MODELS)
    return (known, series.model, series.fraction)
