"""The report of a kernel speed run: tables, figures, targets. Equal rows give equal bytes.

kernels.md                     summary: device, ceilings, targets, every table
kernels/NAME.{md,csv,tex}      a table for each operation, the ceilings, the targets
kernels/NAME.{png,svg}         a figure for each operation
kernels.json                   what was made
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ham.files import atomic_writer, write_json, write_text
from ham.report import table_format
from ham.report.kernel_cells import OPERATION_WORDS, SpeedRows
from ham.report.kernel_plots import operation_figure
from ham.report.kernel_tables import ceilings_table, speed_tables
from ham.report.kernel_targets import targets_table
from ham.report.plots_base import save_png, save_svg, style_context
from ham.report.rows import Row
from ham.report.tables_base import Table

FOLDER = "kernels"
SUMMARY = "kernels.md"
LISTING = "kernels.json"


def build_kernel_report(
    rows: Sequence[Row], out: Path, manifests: Sequence[Mapping[str, Any]] = ()
) -> dict[str, Any]:
    """Write the report of the kernel rows among `rows`.

    Args:
        rows: Result rows; those of other experiments are left alone.
        out: Folder to write to; other files in it stay.
        manifests: Manifests behind the rows.

    Returns:
        The content of `kernels.json`.
    """
    found = SpeedRows(rows)
    tables = [ceilings_table(found), targets_table(found), *speed_tables(rows)]
    numbers = {table.name: table for table in speed_tables(rows, numbers=True)}
    files = []
    for table in tables:
        files += _write_table(out, table, numbers.get(table.name, table))
    figures = _write_figures(out, found)
    files += [name for names in figures.values() for name in names]
    write_text(out / SUMMARY, _summary(found, tables, figures, manifests))
    listing = {
        "files": [SUMMARY, *files],
        "devices": found.devices,
        "rows": len(found.rows),
        "failed_rows": sum(row.error is not None for row in found.rows),
        "wrong_rows": sum(row.correct is False for row in found.rows),
        "manifests": sorted({row.manifest_id for row in found.rows}),
    }
    write_json(out / LISTING, listing)
    return listing


def _write_table(out: Path, table: Table, numbers: Table) -> list[str]:
    texts = {
        "md": table_format.to_markdown(table, smoke=False),
        "csv": table_format.to_csv(numbers),
        "tex": table_format.to_latex(table, smoke=False),
    }
    names = []
    for suffix, text in texts.items():
        name = f"{FOLDER}/{table.name}.{suffix}"
        write_text(out / name, text)
        names.append(name)
    return names


def _write_figures(out: Path, rows: SpeedRows) -> dict[str, list[str]]:
    """Files of each operation that has a figure."""
    written = {}
    with style_context():
        for operation in rows.operations():
            drawing = operation_figure(rows, operation)
            if drawing is None:
                continue
            png, svg = (f"{FOLDER}/{operation}.{suffix}" for suffix in ("png", "svg"))
            with atomic_writer(out / png, "wb") as handle:
                handle.write(save_png(drawing.figure))
            write_text(out / svg, save_svg(drawing.figure))
            written[operation] = [png, svg]
    return written


def _summary(
    rows: SpeedRows,
    tables: Sequence[Table],
    figures: Mapping[str, Sequence[str]],
    manifests: Sequence[Mapping[str, Any]],
) -> str:
    lines = ["# Kernel speed", "", *_provenance(rows, manifests), ""]
    for table in tables:
        lines += [f"## {table.title}", ""]
        if table.name in figures:
            words = OPERATION_WORDS.get(table.name, table.name)
            lines += [f"![{words}: time of a call]({figures[table.name][0]})", ""]
        lines += [*table_format.markdown_grid(table), ""]
        note = " ".join(part for part in (table.note, table.legend) if part)
        lines += [note, ""]
    return "\n".join(lines)


def _provenance(rows: SpeedRows, manifests: Sequence[Mapping[str, Any]]) -> list[str]:
    """Device, commit, versions and the command that made the rows."""
    lines = [f"- Device: {', '.join(rows.devices) or 'unknown'}"]
    for manifest in manifests:
        versions = manifest.get("versions", {})
        known = ", ".join(
            f"{name} {versions[name]}" for name in ("torch", "triton") if name in versions
        )
        peers = manifest.get("extra", {}).get("peers", {})
        lines.append(f"- Commit {manifest.get('commit')}; {known}")
        if peers:
            lines.append(f"- Peers: {', '.join(f'{k} {v}' for k, v in sorted(peers.items()))}")
        commands = manifest.get("measured", {}).get("commands") or [manifest.get("command", [])]
        lines += [f"- Command: `{' '.join(command)}`" for command in commands]
    failed = sum(row.error is not None for row in rows.rows)
    lines.append(f"- {len(rows.rows)} rows, {failed} of them failed or skipped, with the reason")
    return lines
