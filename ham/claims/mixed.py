"""Timings that hold in some cells and not in others: from where on they hold.

No repeat of a measurement settles such a test, as each cell has its answer. What can be said is the
smallest value of a coordinate from which on every cell lies beyond the bound.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ham.claims.timings import Cell
from ham.report.formats import join_words
from ham.report.inference import MIN_SEEDS

HoldsFrom = dict[str, float]


def holds_from(cells: Sequence[Cell], asked: float) -> HoldsFrom:
    """By coordinate, the smallest value from which on every cell is wholly beyond.

    Left out are coordinates without such a value, and those where fewer cells lie there than a
    decision needs.
    """
    found = {}
    for name in set.intersection(*(set(cell.place) for cell in cells)):
        last = max((c.place[name] for c in cells if c.factor.low <= asked), default=float("-inf"))
        above = [cell.place[name] for cell in cells if cell.place[name] > last]
        if len(above) >= MIN_SEEDS:
            found[name] = min(above)
    return {name: found[name] for name in cells[0].place if name in found}


def mixed_words(cells: Sequence[Cell], short: Sequence[Cell], held: Mapping[str, float]) -> str:
    """`mixed: it holds in each of the 10 cells from x 16,384 on; short in …`."""
    parts = []
    for name, start in held.items():
        count = sum(cell.place[name] >= start for cell in cells)
        parts.append(f"in each of the {count} cells from {name} {start:,.10g} on")
    holds = f"it holds {join_words(parts)}" if parts else "it holds from no place of the grid on"
    where = join_words([f"({cell.name})" for cell in short])
    return f"mixed, which no repeat settles: {holds}; short at {where}"
