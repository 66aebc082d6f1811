"""Rows of a kernel speed run, found by what they measure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ham.kernels.speed.targets import OURS
from ham.report.rows import Row

EXPERIMENT = "kernel_speed"
CEILING = "device"
EAGER = "eager"
GRAPH = "cuda_graph"
MODES = ("forward", "forward_saving", "forward_backward")
MODE_WORDS = {
    "forward": "forward",
    "forward_saving": "forward, saving",
    "forward_backward": "forward + backward",
}
# The order of tables and of bars; names that are not listed follow.
PROVIDERS = (
    OURS,
    "torch",
    "reference",
    "flash_qla",
    "fla",
    "mamba_ssm",
    "flex_prepacked",
    "flex",
    "flex_masked",
    "sdpa_cudnn",
    "sdpa_flash",
    "argsort",
)
OPERATIONS = ("gated_delta_rule", "ssd", "routed_attention", "route_index", "route_pack")
OPERATION_WORDS = {
    "gated_delta_rule": "Gated delta rule",
    "ssd": "SSD (Mamba-2)",
    "routed_attention": "Routed attention",
    "route_index": "Index of routed tokens",
    "route_pack": "Index and packing of keys and values",
}


@dataclass(frozen=True, order=True)
class Place:
    """What is computed: operation, size and nominal routed share (-1 where there is none)."""

    operation: str
    shape: str
    fraction: float = -1.0

    @property
    def routed(self) -> float | None:
        """The nominal routed share, or None."""
        return None if self.fraction < 0 else self.fraction


class SpeedRows:
    """Rows of speed runs by place, provider, metric and launch mode.

    Attributes:
        places: Every place that has rows, in the order of tables.
        rates: The measured ceilings by metric.
        devices: Names of the devices, sorted.
    """

    def __init__(self, rows: Iterable[Row]):
        self.rows = [row for row in rows if row.experiment == EXPERIMENT]
        self.rates = {
            row.metric: row.value
            for row in self.rows
            if row.model == CEILING and row.value is not None
        }
        self.devices = sorted({row.device for row in self.rows})
        self._by_key: dict[tuple, Row] = {}
        found: dict[Place, None] = {}
        for row in self.rows:
            if row.model == CEILING or row.task is None:
                continue
            place = place_of(row)
            found[place] = None
            self._by_key[(place, row.provider, row.metric, row.launch_mode)] = row
        self.places = sorted(found, key=lambda one: (_rank(OPERATIONS, one.operation), one))

    def find(
        self, place: Place, provider: str, metric: str, launch_mode: str = EAGER
    ) -> Row | None:
        """The row of one number, or None if there is none."""
        return self._by_key.get((place, provider, metric, launch_mode))

    def providers(self, place: Place) -> list[str]:
        """Providers with rows at a place, ours first."""
        names = {key[1] for key in self._by_key if key[0] == place}
        return sorted(names, key=lambda name: (_rank(PROVIDERS, name), name))

    def operations(self) -> list[str]:
        """Operations with rows, in the order of tables."""
        names = {place.operation for place in self.places}
        return sorted(names, key=lambda name: (_rank(OPERATIONS, name), name))

    def modes(self, place: Place) -> list[str]:
        """Modes with rows at a place."""
        metrics = {key[2] for key in self._by_key if key[0] == place}
        return [mode for mode in MODES if f"{mode}_ms" in metrics]


def place_of(row: Row) -> Place:
    """Where a row belongs."""
    fraction = row.labels.get("fraction")
    return Place(row.model, row.task or "", -1.0 if fraction is None else float(fraction))


def number(row: Row | None) -> float | None:
    """The value of a row, if there is one."""
    return None if row is None else row.value


def label(row: Row | None, name: str) -> float | None:
    """A label that is a number, if there is one."""
    value = None if row is None else row.labels.get(name)
    return float(value) if isinstance(value, int | float) else None


def is_right(row: Row) -> bool:
    """Whether a time stands for a right result; a row that does not say so counts as wrong."""
    return row.value is not None and row.correct is True


def _rank(order: Sequence[str], name: str) -> int:
    return order.index(name) if name in order else len(order)
