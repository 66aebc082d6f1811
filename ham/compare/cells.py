"""Which rows of two runs measure the same: keys, and what distinguishes rows of one run.

A key holds what was asked for. What was found out, or surrounds the measurement, does not belong to
it, or no two runs would ever match: the provider and launch mode count only where a run has several
of them at the same coordinates, and of the labels only coordinates count.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ham.report.rows import Row

# Labels that say what a measurement found, what it was compared with, or what surrounded it.
FOUND = frozenset(
    {
        "compared_shape",
        "comparison_error",
        "floor_bound",
        "gradients",
        "guard",
        "includes",
        "note",
        "peer_version",
        "threads",
        "tolerance",
        "truncated",
        "worst_tensor",
    }
)
FOUND_ENDS = ("_bytes", "_ms", "_per_s", "_per_token", "_bandwidth", "_waste", "_error", "_moved")
FOUND_STARTS = ("error ",)

Variant = tuple[str, str]


class Key(NamedTuple):
    """What a number measures, seeds apart."""

    experiment: str
    model: str
    metric: str
    task: str | None
    x_name: str | None
    x_value: float | None
    labels: tuple[tuple[str, str | int | float], ...]
    variant: Variant | None = None

    @property
    def words(self) -> str:
        """The key in one line."""
        parts = [f"{self.experiment}: {self.metric}"]
        if self.task is not None:
            parts.append(self.task)
        if self.x_name is not None:
            parts.append(f"{self.x_name} {self.x_value:g}")
        parts += [f"{name} {value}" for name, value in self.labels]
        parts += self.variant or ()
        return ", ".join(parts)


@dataclass(frozen=True)
class Pair:
    """The rows of one key on both sides, one a seed; empty where a side has none."""

    key: Key
    one: Sequence[Row]
    other: Sequence[Row]


class Matching(NamedTuple):
    """Every key of two runs, and how many rows repeat the key and seed of another."""

    pairs: list[Pair]
    repeated: tuple[int, int]


def match(one: Sequence[Row], other: Sequence[Row]) -> Matching:
    """Pair the rows of two runs by what they measure; of repeated rows the last counts."""
    split = _several_variants(one) | _several_variants(other)
    sides = [_by_key(rows, split) for rows in (one, other)]
    keys = dict.fromkeys([*sides[0], *sides[1]])
    pairs = [Pair(key, *(list(side.get(key, {}).values()) for side in sides)) for key in keys]
    repeated = [
        len(rows) - sum(len(seeds) for seeds in side.values())
        for rows, side in zip((one, other), sides, strict=True)
    ]
    return Matching(pairs, (repeated[0], repeated[1]))


def key_of(row: Row) -> Key:
    """The key of a row without its provider and launch mode."""
    labels = tuple((name, value) for name, value in sorted(row.labels.items()) if is_asked(name))
    return Key(row.experiment, row.model, row.metric, row.task, row.x_name, row.x_value, labels)


def is_asked(label: str) -> bool:
    """Whether a label is a coordinate and not something that was found out."""
    return not (label in FOUND or label.endswith(FOUND_ENDS) or label.startswith(FOUND_STARTS))


def variant_of(row: Row) -> Variant:
    """The provider and launch mode of a row."""
    return (row.provider, row.launch_mode)


def _several_variants(rows: Iterable[Row]) -> set[Key]:
    found: dict[Key, set[Variant]] = defaultdict(set)
    for row in rows:
        found[key_of(row)].add(variant_of(row))
    return {key for key, variants in found.items() if len(variants) > 1}


def _by_key(rows: Iterable[Row], split: set[Key]) -> dict[Key, dict[int | None, Row]]:
    cells: dict[Key, dict[int | None, Row]] = defaultdict(dict)
    for row in rows:
        key = key_of(row)
        if key in split:
            key = key._replace(variant=variant_of(row))
        cells[key][row.seed] = row
    return cells
