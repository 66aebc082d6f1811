"""The report of a sweep: targets, tables, figures. Equal rows give equal bytes.

sweep.md                     summary: device, commit, targets, every table and figure
sweep/NAME.{md,csv,tex}      tables: targets, ceilings, one for each experiment
sweep/NAME.{png,svg}         figures
sweep.json                   what was made
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ham.errors import MissingDataError
from ham.files import write_json, write_text
from ham.report import table_format
from ham.report.plots_base import Drawing, style_context
from ham.report.rows import Row
from ham.report.sweep_cells import SweepRows
from ham.report.sweep_parts import parts_figure
from ham.report.sweep_plots import sweep_figures
from ham.report.sweep_tables import sweep_tables
from ham.report.sweep_targets import targets_table
from ham.report.tables_base import Table
from ham.report.write_parts import ceilings_table, origin_lines, write_figure, write_table

FOLDER = "sweep"
SUMMARY = "sweep.md"
LISTING = "sweep.json"
PRODUCT = "bfloat16 matrix product"


def build_sweep_report(
    rows: Sequence[Row], out: Path, manifests: Sequence[Mapping[str, Any]] = ()
) -> dict[str, Any]:
    """Write the report of the sweep rows among `rows`.

    Args:
        rows: Result rows; those of other experiments are left alone.
        out: Folder to write to; other files in it stay.
        manifests: Manifests behind the rows.

    Returns:
        The content of `sweep.json`.

    Raises:
        MissingDataError: If there is no row of a sweep.
    """
    found = SweepRows(rows)
    if not found.rows:
        raise MissingDataError("no row of a sweep among the rows; `ham sweep run` makes them")
    tables = [
        targets_table(found),
        ceilings_table(found.devices, found.rates, PRODUCT),
        *sweep_tables(found),
    ]
    numbers = {table.name: table for table in sweep_tables(found, numbers=True)}
    files = []
    for table in tables:
        files += write_table(out, FOLDER, table, numbers.get(table.name, table))
    figures, drawings = _write_figures(out, found)
    files += [name for names in figures.values() for name in names]
    write_text(out / SUMMARY, _summary(found, tables, figures, drawings, manifests))
    listing = {
        "files": [SUMMARY, *files],
        "devices": found.devices,
        "rows": len(found.rows),
        "failed_rows": sum(row.error is not None for row in found.rows),
        "manifests": sorted({row.manifest_id for row in found.rows}),
    }
    write_json(out / LISTING, listing)
    return listing


def _write_figures(out: Path, rows: SweepRows) -> tuple[dict[str, list[str]], dict[str, Drawing]]:
    written = {}
    with style_context():
        drawings = sweep_figures(rows)
        parts = parts_figure(rows)
        if parts is not None:
            drawings["parts"] = parts
        for name, drawing in drawings.items():
            written[name] = write_figure(out, f"{FOLDER}/{name}", drawing.figure)
    return written, drawings


def _summary(
    rows: SweepRows,
    tables: Sequence[Table],
    figures: Mapping[str, Sequence[str]],
    drawings: Mapping[str, Drawing],
    manifests: Sequence[Mapping[str, Any]],
) -> str:
    lines = ["# Decoding, prefill and training over context", "", *_provenance(rows, manifests), ""]
    for table in tables[:1]:
        lines += _section(table)
    for name, files in figures.items():
        drawing = drawings[name]
        lines += [f"![{drawing.alt}]({files[0]})", "", f"{drawing.shown} {drawing.note}", ""]
    for table in tables[1:]:
        lines += _section(table)
    return "\n".join(lines)


def _section(table: Table) -> list[str]:
    note = " ".join(part for part in (table.note, table.legend) if part)
    return [f"## {table.title}", "", *table_format.markdown_grid(table), "", note, ""]


def _provenance(rows: SweepRows, manifests: Sequence[Mapping[str, Any]]) -> list[str]:
    """Device, commit, versions and the commands that made the rows."""
    lines = [f"- Device: {', '.join(rows.devices)}"]
    for manifest in manifests:
        scale, models = manifest.get("config", {}).get("scale", {}), []
        if scale:
            models.append(
                f"- Whole models: {scale['layers']} layers, {scale['heads']} heads of "
                f"{scale['head_dims'][0]}, vocabulary {scale['vocabulary']:,}, "
                f"{manifest['config'].get('dtype')}, parameters within 1 %; window "
                f"{scale['window']:,}"
            )
        lines += origin_lines(manifest, models)
    failed = sum(row.error is not None for row in rows.rows)
    lines.append(f"- {len(rows.rows)} rows, {failed} of them failed, with the reason")
    return lines
