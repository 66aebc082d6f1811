"""Tables as Markdown, CSV, LaTeX (booktabs) and as entries for the HTML page.

Markdown, LaTeX and HTML carry what a reader needs in the cell: value, interval, n, `failed: why`,
`not run`. The CSV carries plain numbers in further columns (`_low`, `_high`, `_interval`, `_n`,
`_observations`, `_status`) for programs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd

from ham.report.aggregate import Cell
from ham.report.formats import (
    NOT_APPLICABLE,
    cell_text,
    plain,
    reason,
    sample_size,
    spread,
)
from ham.report.tables_base import Column, Entry, Table

LEGEND = (
    "n counts seeds. ± is half of the 95 % t interval over seeds; with n=1, brackets are the "
    "interval of the one run (Wilson for shares, bootstrap over documents, 20th to 80th percentile "
    "over repetitions). A dash: does not apply to this model."
)
SMOKE_NOTE = (
    "Smoke run: these numbers show that the pipeline runs, not which architecture is better."
)

# pdflatex knows these only with extra packages.
LATEX_SYMBOLS = {
    "±": r"$\pm$",
    "−": r"$-$",
    "Δ": r"$\Delta$",
    "δ": r"$\delta$",
    "×": r"$\times$",
    "–": "--",
    "…": r"\ldots{}",
    "“": "``",
    "”": "''",
    "≥": r"$\geq$",
    "β": r"$\beta$",
}


@dataclass(frozen=True)
class HtmlEntry:
    """One cell of the page: number, spread and n below it, a class for its look, a tooltip."""

    main: str
    small: tuple[str, ...] = ()
    kind: str = "number"
    tip: str = ""


def entry_text(entry: Entry, column: Column) -> str:
    """An entry in one line of plain text."""
    if isinstance(entry, Cell):
        return cell_text(entry, column.write or plain)
    if entry is None:
        return NOT_APPLICABLE
    if isinstance(entry, str) or column.write is None:
        return str(entry)
    return column.write(entry)


def caption_notes(table: Table, smoke: bool) -> str:
    """What stands below a table."""
    return " ".join([*([SMOKE_NOTE] if smoke else []), table.note, _legend(table)])


def _legend(table: Table) -> str:
    return LEGEND if table.legend is None else table.legend


def to_markdown(table: Table, smoke: bool) -> str:
    """A Markdown table with its title and notes."""
    lines = [f"# {table.title}", ""]
    if smoke:
        lines += [f"**{SMOKE_NOTE}**", ""]
    lines += markdown_grid(table)
    lines += ["", f"{table.note} {_legend(table)}", ""]
    return "\n".join(lines)


def markdown_grid(table: Table) -> list[str]:
    """The lines of the table alone."""
    header = [_markdown(column.title) for column in table.columns]
    marks = ["---" if column.write is None else "---:" for column in table.columns]
    lines = [f"| {' | '.join(header)} |", f"| {' | '.join(marks)} |"]
    for record in table.records:
        texts = [_markdown(entry_text(record.get(c.key), c)) for c in table.columns]
        lines.append(f"| {' | '.join(texts)} |")
    return lines


def to_csv(table: Table) -> str:
    """Plain numbers, one column for each part of a cell."""
    records = []
    for record in table.records:
        flat: dict[str, object] = {}
        for column in table.columns:
            flat |= _flat(column.key, record.get(column.key), _holds_cells(table, column))
        records.append(flat)
    return pd.DataFrame.from_records(records).to_csv(index=False, lineterminator="\n")


def to_latex(table: Table, smoke: bool) -> str:
    """A floating table with booktabs rules; everything escaped."""
    texts = [
        [entry_text(record.get(column.key), column) for column in table.columns]
        for record in table.records
    ]
    frame = pd.DataFrame(texts, columns=[column.title for column in table.columns])
    latex = frame.to_latex(
        index=False,
        escape=True,
        column_format="".join("l" if column.write is None else "r" for column in table.columns),
        position="htbp",
        caption=latex_escape(f"{table.title}. {caption_notes(table, smoke)}"),
        label=f"tab:{table.name.replace('_', '-')}",
    )
    header = "% Needs \\usepackage{booktabs}; wide tables: \\resizebox or landscape.\n"
    return header + latex_symbols(latex)


def latex_escape(text: str) -> str:
    """Escape the characters that are special in LaTeX."""
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    escaped = "".join(special.get(c, f"\\{c}" if c in "&%$#_{}" else c) for c in text)
    return escaped


def latex_symbols(text: str) -> str:
    """Write the symbols of the report in commands that every LaTeX knows."""
    for symbol, command in LATEX_SYMBOLS.items():
        text = text.replace(symbol, command)
    return text


def html_rows(table: Table, command: Callable[[Cell], str] | None = None) -> list[list[HtmlEntry]]:
    """The entries of the page, with tooltips that tell how each number was made."""
    return [
        [_html_entry(record.get(column.key), column, command) for column in table.columns]
        for record in table.records
    ]


def _html_entry(entry: Entry, column: Column, command: Callable[[Cell], str] | None) -> HtmlEntry:
    if not isinstance(entry, Cell):
        kind = "text" if column.write is None else "number"
        return HtmlEntry(entry_text(entry, column), kind="none" if entry is None else kind)
    tip = _tip(entry, command)
    if entry.status == "failed":
        return HtmlEntry(f"failed: {reason(entry.errors[0])}", kind="failed", tip=tip)
    if entry.value is None:
        return HtmlEntry("not run", kind="none")
    write = column.write or plain
    small = tuple(part for part in (spread(entry, write), sample_size(entry)) if part)
    kind = "partial" if entry.status == "partial" else "number"
    return HtmlEntry(write(entry.value), small, kind, tip)


def _tip(cell: Cell, command: Callable[[Cell], str] | None) -> str:
    """Everything a row says about its number, in a few lines."""
    lines = []
    if cell.estimate is not None:
        lines.append(f"value {cell.estimate.value!r}")
        if cell.estimate.interval:
            name = cell.estimate.interval
            lines.append(f"{name}: {cell.estimate.low!r} to {cell.estimate.high!r}")
        lines.append(f"{cell.estimate.n} seed(s), {cell.observations} observation(s)")
    variants = {(row.provider, row.launch_mode, row.device) for row in cell.rows}
    lines += [f"{p}, {mode}, {device}" for p, mode, device in sorted(variants)]
    fractions = [row.kv_fraction for row in cell.rows if row.kv_fraction is not None]
    if fractions:
        lines.append(f"realised KV fraction {sum(fractions) / len(fractions):.4f}")
    lines += [f"failed: {error}" for error in cell.errors]
    if command is not None and cell.rows:
        lines.append(command(cell))
    return "\n".join(lines)


def _holds_cells(table: Table, column: Column) -> bool:
    return any(isinstance(record.get(column.key), Cell) for record in table.records)


def _flat(key: str, entry: Entry, cells: bool) -> dict[str, object]:
    if not cells:
        return {key: entry}
    cell = entry if isinstance(entry, Cell) else None
    estimate = cell.estimate if cell is not None else None
    status = "does not apply" if cell is None else cell.status
    if cell is not None and cell.errors:
        status = f"{status}: {reason(cell.errors[0], 200)}"
    return {
        key: estimate.value if estimate else None,
        f"{key}_low": estimate.low if estimate else None,
        f"{key}_high": estimate.high if estimate else None,
        f"{key}_interval": estimate.interval if estimate else None,
        f"{key}_n": estimate.n if estimate else 0,
        f"{key}_observations": cell.observations if cell is not None else 0,
        f"{key}_status": status,
    }


def _markdown(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ")
