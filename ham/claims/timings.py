"""Timings: what both sides measured in one run, launched alike and right, as factors by cell.

Repeats are no seeds, so a timing is judged in cells (places of a sweep that were measured apart).
What was timed, and what memory it took, is said beside every verdict: it is made from the rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ham.claims.config import Test, Where
from ham.claims.evidence import Observation
from ham.claims.query import coordinate, timing_fault, value_of
from ham.measure.sweep.grid import UNSTRUCTURED
from ham.report.formats import byte_size, join_words, parameters
from ham.report.rows import Row
from ham.report.statistics import Estimate

PEAK = "peak_bytes"
Key = tuple


@dataclass(frozen=True)
class Cell:
    """One place of a sweep.

    Attributes:
        name: In words.
        factor: How many times less the arm takes there.
        place: Its numeric coordinates by name, the horizontal one as `x`.
    """

    name: str
    factor: Estimate
    place: dict[str, float]


@dataclass(frozen=True)
class Factors:
    """The cells that count, the runs they are from, and why others do not count."""

    cells: list[Cell]
    runs: list[str]
    notes: list[str]


def factors(test: Test, found: Sequence[Sequence[Observation]]) -> Factors:
    """One factor for each cell that both sides of a timing have."""
    where = test.where
    arm, theirs = ({_key(one, where): one.row for one in rows} for rows in found)
    notes: list[str] = []
    # A cell that was measured in several runs counts once: the last run given.
    cells: dict[Key, tuple[Cell, str]] = {}
    rows: dict[Key, tuple[Row, Row]] = {}
    for key in (key for key in arm if key in theirs):
        factor = _factor(arm[key], theirs[key], where)
        if isinstance(factor, str):
            notes.append(f"{_words(key, where)}: {factor}")
        else:
            cells[key[1:]] = Cell(_words(key, where), factor, _place(key, where)), key[0]
            rows[key[1:]] = arm[key], theirs[key]
    alone = len(arm.keys() - theirs.keys())
    if alone:
        notes.append(f"{alone} cells lack {test.reference[0].name}")
    runs = sorted({run for _, run in cells.values()})
    counted = [cell for cell, _ in cells.values()]
    notes = [*what_was_timed(test, counted, list(rows.values())), *dict.fromkeys(notes)]
    return Factors(counted, runs, notes)


def what_was_timed(test: Test, cells: Sequence[Cell], rows: Sequence[tuple[Row, Row]]) -> list[str]:
    """Sizes, providers, coordinates and peak memory behind the factors."""
    if not cells:
        return []
    sides = [*test.arms, *test.reference]
    words = [
        f"{side.name} is {_model(own)}"
        for side, own in zip(sides, zip(*rows, strict=True), strict=True)
    ]
    places = {place for cell in cells if (place := cell.place.get("x")) is not None}
    if places:
        words.append(f"at x {join_words([f'{x:,.10g}' for x in sorted(places)])}")
    if any(side.labels.get("routing") == UNSTRUCTURED for side in sides):
        words.append(f"routing={UNSTRUCTURED}: tokens are kept as told, no trained score decides")
    return [*words, *_peak(cells, rows)]


def _model(rows: Sequence[Row]) -> str:
    sizes = sorted({parameters(row.parameters) for row in rows if row.parameters is not None})
    size = f"{join_words(sizes)} parameters, " if sizes else ""
    return f"{size}provider {join_words(sorted({row.provider for row in rows}))}"


def _peak(cells: Sequence[Cell], rows: Sequence[tuple[Row, Row]]) -> list[str]:
    """Peak memory of both sides at the last horizontal coordinate."""
    both = [
        (cell, *(row.labels.get(PEAK) for row in pair))
        for cell, pair in zip(cells, rows, strict=True)
    ]
    known = [one for one in both if all(isinstance(peak, int | float) for peak in one[1:])]
    if not known:
        return []
    cell, ours, theirs = max(known, key=lambda one: one[0].place.get("x", 0.0))
    return [f"{PEAK} at {cell.name}: {byte_size(ours)} against {byte_size(theirs)}"]


def _key(one: Observation, where: Where) -> Key:
    return (one.run, one.row.device, *coordinate(one.row, where))


def _words(key: Key, where: Where) -> str:
    _, _, task, x, *labels = key
    parts = [str(task)] if task is not None else []
    parts += [f"x {x:g}"] if x is not None else []
    return ", ".join(parts + [f"{name} {value}" for name, value in labels]) or where.experiment


def _place(key: Key, where: Where) -> dict[str, float]:
    _, _, _, x, *labels = key
    named: list[tuple[str, Any]] = [("x", x), *labels]
    return {name: float(value) for name, value in named if isinstance(value, int | float)}


def _factor(ours: Row, theirs: Row, where: Where) -> Estimate | str:
    """How many times less ours is, from the least to the most favourable ends of both ranges.

    Labels, such as bytes, are exact and have no range.
    """
    fault = timing_fault(ours) or timing_fault(theirs)
    if fault:
        return fault
    if where.label is not None:
        mine, other = value_of(ours, where), value_of(theirs, where)
        if mine is None or other is None or mine <= 0:
            return f"no {where.label}"
        return Estimate(other / mine, 1, other / mine, other / mine, "exact")
    if ours.launch_mode != theirs.launch_mode:
        return f"launched differently: {ours.launch_mode}, {theirs.launch_mode}"
    if ours.low is None or theirs.low is None or ours.low <= 0:
        return "no 20th to 80th percentile"
    low, high = theirs.low / ours.high, theirs.high / ours.low
    return Estimate(theirs.value / ours.value, min(ours.n, theirs.n), low, high, "p20_p80")
