"""A comparison for readers: the same tables in a terminal and in Markdown."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from ham.compare.cells import Pair
from ham.compare.judge import PERCENTILES, Difference
from ham.compare.manifests import shorten
from ham.compare.runs import Comparison
from ham.compare.sides import Side
from ham.report.formats import byte_size, join_words, reason, share, significant
from ham.report.table_format import markdown_grid
from ham.report.tables_base import Column, Table

WORDS = {
    "worse": "worse",
    "better": "better",
    "changed": "changed",
    "unjudged": "times and rates without a spread, not judged",
    "noise": "within noise",
    "small": "below the threshold",
    "same": "equal",
}
# Columns of text where there is no terminal to fit into.
WIDTH_OF_FILES = 160
COLORS = {"worse": "red", "better": "green", "changed": "yellow"}


class Section(NamedTuple):
    """A title, a head and lines; `left_out` lines are not shown."""

    title: str
    head: tuple[str, ...]
    lines: list[tuple[str, ...]]
    left_out: int = 0


def sections(found: Comparison, limit: int) -> list[Section]:
    """The tables of a comparison that have a line, each with at most `limit` of them (0: all).

    What made the runs stands first, then what differs, then what could not be compared.
    """

    def cut(title: str, head: tuple[str, ...], items: Sequence, line: Callable) -> Section:
        shown = items[:limit] if limit else items
        return Section(title, head, [line(item) for item in shown], len(items) - len(shown))

    numbers = ("model", "what", "A", "B", "change", "noise by", "note")
    of = {name: [d for d in found.differences if d.verdict == name] for name in WORDS}
    made = [
        cut(
            "What made them differs",
            ("fact", "A", "B"),
            found.facts,
            lambda fact: (fact.name, shorten(fact.one), shorten(fact.other)),
        ),
        *(cut(name.capitalize(), numbers, of[name], _line) for name in COLORS),
        cut(
            "Failed",
            ("model", "what", "A", "B"),
            found.failures,
            lambda failure: (
                *_what(failure.pair),
                *(reason(errors[0]) if errors else "–" for errors in failure.errors),
            ),
        ),
        cut("Only in A", ("model", "what"), found.only_one, _what),
        cut("Only in B", ("model", "what"), found.only_other, _what),
        cut("Not judged: a time without a spread", numbers, of["unjudged"], _line),
    ]
    return [section for section in made if section.lines]


def head_lines(found: Comparison) -> list[str]:
    """What was compared."""
    return [f"{name}: {_side(side)}" for name, side in (("A", found.one), ("B", found.other))]


def summary_lines(found: Comparison) -> list[str]:
    """How many keys came to what, and how to read it."""
    counts = found.counts
    words = [f"{counts[name]} {text}" for name, text in WORDS.items() if counts[name]]
    lines = [
        f"{len(found.differences)} numbers compared, threshold {share(found.threshold)}: "
        f"{join_words(words)}."
        if words
        else "No number has a value on both sides."
    ]
    by_interval = sum(
        difference.noise.low is not None and difference.verdict != "same"
        for difference in found.differences
    )
    if by_interval:
        lines.append(
            f"{by_interval} of them were judged by 95 % intervals: without any change about "
            f"{by_interval / 20:.1f} would lie outside by chance."
        )
    for name, repeated in zip("AB", found.repeated, strict=True):
        if repeated:
            lines.append(f"{repeated} rows of {name} repeat another's key; the last counts.")
    return lines


def to_markdown(found: Comparison, limit: int) -> str:
    """The comparison as Markdown."""
    lines = ["# Two runs compared", "", *(f"- {line}" for line in head_lines(found)), ""]
    for section in sections(found, limit):
        columns = [Column(title, title) for title in section.head]
        records = [dict(zip(section.head, line, strict=True)) for line in section.lines]
        table = Table("diff", section.title, "", columns, records)
        lines += [f"## {section.title}", "", *markdown_grid(table), ""]
        if section.left_out:
            lines += [f"{section.left_out} more.", ""]
    return "\n".join([*lines, *summary_lines(found)]) + "\n"


def print_tables(found: Comparison, limit: int) -> None:
    """The comparison as tables in the terminal."""
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=WIDTH_OF_FILES)
    for line in head_lines(found):
        console.print(Text(line))
    for section in sections(found, limit):
        style = COLORS.get(section.title.lower(), "bold")
        table = RichTable(title=Text(section.title, style=style), title_justify="left")
        for title in section.head:
            table.add_column(title, overflow="fold")
        for line in section.lines:
            table.add_row(*map(Text, line))
        console.print(table)
        if section.left_out:
            console.print(f"{section.left_out} more; --limit 0 shows all")
    for line in summary_lines(found):
        console.print(Text(line))


def _side(side: Side) -> str:
    missing = f", {side.unexplained} manifests missing" if side.unexplained else ""
    return f"{side.path}, {len(side.rows):,} numbers{missing}"


def _what(pair: Pair) -> tuple[str, str]:
    return (pair.key.model, pair.key.words)


def _line(found: Difference) -> tuple[str, ...]:
    metric = found.pair.key.metric
    relative = "from 0" if math.isinf(found.relative) else f"{100 * found.relative:+.1f} %"
    values = (_value(cell.estimate, metric) for cell in (found.one, found.other))
    return (*_what(found.pair), *values, relative, found.noise.rule, "; ".join(found.notes))


def _value(estimate, metric: str) -> str:
    write = byte_size if metric.endswith("_bytes") else significant
    text = write(estimate.value)
    if estimate.low is not None:
        ends = f"{write(estimate.low, estimate.value)}, {write(estimate.high, estimate.value)}"
        text = f"{text} [{ends}]"
    seeds = "" if estimate.interval in (None, PERCENTILES) else f" (n={estimate.n})"
    return text + seeds
