"""Rows of one side of a test, gathered by seed over a complete grid, or why that cannot be done."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ham.claims.config import Side, Where
from ham.claims.evidence import Observation
from ham.report.formats import join_words, reason
from ham.report.kernel_cells import EXPERIMENT as KERNEL_SPEED
from ham.report.kernel_cells import is_right
from ham.report.rows import Row
from ham.report.statistics import mean

# Labels that say how a row came about and not what it measures.
CIRCUMSTANCES = ("learning_rate", "side_by_side", "in_one_program", "note")

Coordinate = tuple
SHOWN = 6


@dataclass
class Gathered:
    """One side of a test.

    Attributes:
        by_seed: Rows of each complete seed by coordinate.
        problems: What keeps the test from being decided.
        notes: What a reader should know besides.
    """

    name: str
    by_seed: dict[int, dict[Coordinate, Row]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def values(self, where: Where) -> dict[int, float]:
        """The mean over the grid of each seed."""
        return {
            seed: mean([value_of(row, where) for row in rows.values()])
            for seed, rows in self.by_seed.items()
        }

    def rows(self) -> list[Row]:
        """The rows of all seeds."""
        return [row for rows in self.by_seed.values() for row in rows.values()]

    def shares(self) -> dict[Coordinate, float] | None:
        """The realised share of tokens in the cache by coordinate, mean over seeds.

        None if there are no rows or one lacks it.
        """
        seeds = list(self.by_seed.values())
        if not seeds or any(row.kv_fraction is None for row in self.rows()):
            return None
        return {place: mean([rows[place].kv_fraction for rows in seeds]) for place in seeds[0]}

    def kv_fraction(self) -> float | None:
        """The realised share of tokens in the cache, mean over all rows; None if one lacks it."""
        shares = self.shares()
        return None if shares is None else mean(list(shares.values()))


def select(evidence: Iterable[Observation], where: Where, side: Side) -> list[Observation]:
    """Every row that a query and a side ask for, failed ones included."""
    found = list(evidence)
    for _, keep, _ in _filters(where, side):
        found = [one for one in found if keep(one)]
    xs = {one.row.x_value for one in found} - {None}
    if where.x in ("smallest", "largest") and xs:
        wanted = min(xs) if where.x == "smallest" else max(xs)
        found = [one for one in found if one.row.x_value == wanted]
    return found


def why_nothing(evidence: Iterable[Observation], where: Where, side: Side) -> str:
    """The first condition of a query that no row meets, and what there is instead."""
    found = list(evidence)
    if not found:
        return "there are no rows"
    conditions: list[str] = []
    for words, keep, known in _filters(where, side):
        left = [one for one in found if keep(one)]
        if not left:
            among = f" of {', '.join(conditions)}" if conditions else ""
            values = sorted({str(known(one)) for one in found})
            more = f" and {len(values) - SHOWN} more" if len(values) > SHOWN else ""
            return f"no rows{among} with {words}; there are: {', '.join(values[:SHOWN])}{more}"
        conditions.append(words)
        found = left
    return f"no rows with {join_words(conditions)}"


def gather(found: Sequence[Observation], where: Where, side: Side, grid: set) -> Gathered:
    """Rows of one side by seed; only seeds that have every coordinate of `grid` count.

    Args:
        found: What `select` gave, of one run.
        where: The query.
        side: The arm.
        grid: The coordinates of all sides together.
    """
    result = Gathered(side.name)
    cells: dict[int, dict[Coordinate, Row]] = {}
    for one in found:
        row = one.row
        if row.seed is None:
            result.problems.append(f"rows of {side.name} carry no seed")
            return result
        mine = cells.setdefault(row.seed, {})
        key = coordinate(row, where)
        differing = _differences(mine.get(key), row)
        if differing:
            result.problems.append(
                f"ambiguous: rows of {side.name} at one seed and coordinate differ in "
                f"{join_words(differing)}; name a label under `labels` or `over`"
            )
            return result
        mine[key] = row
    for seed, mine in sorted(cells.items()):
        _add_seed(result, seed, mine, where, grid)
    return result


def _add_seed(
    result: Gathered, seed: int, mine: dict[Coordinate, Row], where: Where, grid: set
) -> None:
    failed = [row for row in mine.values() if value_of(row, where) is None]
    if failed:
        why = reason(failed[0].error or f"no {where.quantity}")
        result.problems.append(f"{result.name}, seed {seed} failed: {why}")
    elif missing := grid - set(mine):
        words = "; ".join(sorted(map(_words, missing))[:2])
        result.notes.append(
            f"{result.name}, seed {seed} left out: {len(missing)} of {len(grid)} rows are missing "
            f"({words})"
        )
    else:
        result.by_seed[seed] = mine


def coordinate(row: Row, where: Where) -> Coordinate:
    """Where a row stands in the grid of a query, its seed aside."""
    return (row.task, row.x_value, *((name, row.labels.get(name)) for name in where.over))


def value_of(row: Row, where: Where) -> float | None:
    """The number that a query reads from a row; None where it failed or has no such label."""
    if row.value is None or where.label is None:
        return row.value
    number = row.labels.get(where.label)
    return float(number) if isinstance(number, int | float) else None


def timing_fault(row: Row) -> str | None:
    """Why the time in a row does not count, or None."""
    if row.value is None:
        return reason(row.error or "")
    wrong = row.correct is False or (row.experiment == KERNEL_SPEED and not is_right(row))
    return "the result was wrong or not compared" if wrong else None


def _filters(
    where: Where, side: Side
) -> list[tuple[str, Callable[[Observation], bool], Callable[[Observation], Any]]]:
    """Conditions in the order in which a reader would narrow down: words, test, what is there."""
    filters = [
        ("experiment", where.experiment, lambda one: one.row.experiment),
        ("metric", where.metric, lambda one: one.row.metric),
        ("configuration", where.config, lambda one: one.config),
        ("model", side.model, lambda one: one.row.model),
        ("provider", side.provider, lambda one: one.row.provider),
        ("task", where.task, lambda one: one.row.task),
    ]
    filters += [
        (f"label {name}", value, lambda one, name=name: one.row.labels.get(name))
        for name, value in {**where.labels, **side.labels}.items()
    ]
    found = [
        (f"{name} {value!r}", lambda one, value=value, read=read: read(one) == value, read)
        for name, value, read in filters
        if value is not None
    ]
    wanted = [where.x] if isinstance(where.x, float) else where.x
    if isinstance(wanted, list):
        words = f"x {join_words([f'{x:g}' for x in wanted])}"
        found.append((words, lambda one: one.row.x_value in wanted, _x_of))
    if where.from_x is not None:
        words = f"x from {where.from_x:g} on"
        found.append((words, lambda one: (one.row.x_value or 0) >= where.from_x, _x_of))
    return found


def _x_of(one: Observation) -> str:
    return "none" if one.row.x_value is None else f"{one.row.x_value:g}"


def _differences(first: Row | None, second: Row) -> list[str]:
    """Labels in which two rows of one place differ, or that other settings made them."""
    if first is None:
        return []
    names = sorted({*first.labels, *second.labels} - set(CIRCUMSTANCES))
    found = [name for name in names if first.labels.get(name) != second.labels.get(name)]
    if first.config_hash != second.config_hash:
        found.append("the hash of their configuration")
    return found


def _words(key: Coordinate) -> str:
    task, x, *labels = key
    parts = [] if task is None else [str(task)]
    parts += [] if x is None else [f"x {x:g}"]
    return ", ".join(parts + [f"{name} {value}" for name, value in labels]) or "the row"
