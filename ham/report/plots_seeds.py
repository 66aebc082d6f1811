"""How many seeds a figure rests on: small print, and models of one seed beside others.

The interval of one seed is over documents or questions, that of several over seeds. Side by side
they would be read as the same thing, so a figure with both draws the points of one seed hollow and
without a bar.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from ham.report.aggregate import Cell, Point, Results
from ham.report.formats import join_words
from ham.report.plots_base import Look

HOLLOW_WORDS = "hollow: one seed, no interval over seeds"
INTERVAL_WORDS = {
    "t95": "95 % t interval over seeds",
    "bootstrap95": "95 % bootstrap over documents",
    "wilson95": "95 % Wilson interval",
    "p20_p80": "20th to 80th percentile",
}


def line_cells(lines: Mapping[str, Sequence[Point]]) -> list[Cell]:
    """The cells of all points of a figure."""
    return [point.cell for points in lines.values() for point in points]


def seed_counts(cells: Iterable[Cell]) -> list[int]:
    """How many seeds the cells have, each number once, ascending."""
    return sorted({cell.estimate.n for cell in cells if cell.estimate is not None})


def mixed_seeds(cells: Iterable[Cell]) -> bool:
    """Whether cells of one seed stand beside cells of several."""
    counts = seed_counts(cells)
    return len(counts) > 1 and counts[0] == 1


def interval_words(cells: Iterable[Cell]) -> str:
    """What the bars of these cells are, and which cells have none; empty without bars."""
    cells = list(cells)
    mixed = mixed_seeds(cells)
    estimates = [cell.estimate for cell in cells if cell.estimate is not None]
    names = {one.interval for one in estimates if one.interval and not (mixed and one.n == 1)}
    bars = join_words(sorted(INTERVAL_WORDS.get(name, name) for name in names))
    words = [f"bar: {bars}"] if bars else []
    return " · ".join([*words, HOLLOW_WORDS] if mixed else words)


def footer_text(
    results: Results, look: Look, *parts: str, cells: Iterable[Cell] | None = None
) -> str:
    """Small print: smoke run, seeds, and what else the figure wants to say.

    Seeds are those of `cells`, of everything that was run when None.
    """
    counts = results.seed_counts() if cells is None else seed_counts(cells)
    ends = [counts[0], counts[-1]] if counts else [0]
    seeds = " to ".join(str(count) for count in dict.fromkeys(ends))
    first = ["smoke run: proves nothing about the architectures"] if look.smoke else []
    return " · ".join(
        [*first, f"n={seeds} seed{'s' if seeds != '1' else ''}", *filter(None, parts)]
    )
