"""The report of a kernel speed run: tables, figures, targets. Equal rows give equal bytes.

Rows of `ham kernels train` add a section on training with each provider; they may also stand alone.

kernels.md                     summary: device, ceilings, targets, every table
kernels/NAME.{md,csv,tex}      tables: operations, training runs, ceilings, targets, accuracy
kernels/NAME.{png,svg}         a figure for each operation and training run
kernels.json                   what was made
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ham.files import write_json, write_text
from ham.report import table_format
from ham.report.kernel_accuracy import accuracy_table
from ham.report.kernel_cells import OPERATION_WORDS, SpeedRows
from ham.report.kernel_plots import operation_figure
from ham.report.kernel_tables import speed_tables
from ham.report.kernel_targets import targets_table
from ham.report.kernel_training import (
    TrainingRun,
    comparison_sentences,
    training_figure,
    training_runs,
    training_table,
)
from ham.report.plots_base import style_context
from ham.report.rows import Row
from ham.report.tables_base import Table
from ham.report.write_parts import ceilings_table, origin_lines, write_figure, write_table

FOLDER = "kernels"
SUMMARY = "kernels.md"
LISTING = "kernels.json"
PRODUCT = "bfloat16 product of 8192 × 8192 matrices"


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
    runs = training_runs(rows)
    trained = [row for run in runs for row in run.rows]
    used = [*found.rows, *trained]
    tables = []
    if found.rows or not runs:
        accuracy = accuracy_table(found)
        tables = [
            ceilings_table(found.devices, found.rates, PRODUCT),
            targets_table(found),
            *speed_tables(rows),
        ]
        tables += [] if accuracy is None else [accuracy]
    tables += [training_table(run) for run in runs]
    numbers = {table.name: table for table in speed_tables(rows, numbers=True)}
    files = []
    for table in tables:
        files += write_table(out, FOLDER, table, numbers.get(table.name, table))
    figures = _write_figures(out, found, runs)
    files += [name for names in figures.values() for name in names]
    write_text(out / SUMMARY, _summary(used, tables, figures, runs, manifests))
    listing = {
        "files": [SUMMARY, *files],
        "devices": _devices(used),
        "rows": len(used),
        "failed_rows": sum(row.error is not None for row in used),
        "wrong_rows": sum(row.correct is False for row in used),
        "manifests": sorted({row.manifest_id for row in used}),
    }
    write_json(out / LISTING, listing)
    return listing


def _write_figures(out: Path, rows: SpeedRows, runs: Sequence[TrainingRun]) -> dict[str, list[str]]:
    """Files of each operation and training run that has a figure."""
    written = {}
    with style_context():
        drawings = {name: operation_figure(rows, name) for name in rows.operations()}
        drawings |= {run.name: training_figure(run) for run in runs}
        for name, drawing in drawings.items():
            if drawing is not None:
                written[name] = write_figure(out, f"{FOLDER}/{name}", drawing.figure)
    return written


def _summary(
    rows: Sequence[Row],
    tables: Sequence[Table],
    figures: Mapping[str, Sequence[str]],
    runs: Sequence[TrainingRun],
    manifests: Sequence[Mapping[str, Any]],
) -> str:
    trained = {run.name: run for run in runs}
    lines = ["# Kernel speed", "", *_provenance(rows, manifests), ""]
    for table in tables:
        lines += [f"## {table.title}", ""]
        if table.name in figures:
            words = f"{OPERATION_WORDS.get(table.name, table.name)}: time of a call"
            if table.name in trained:
                words = f"{table.title}: loss against step, and its distance from torch"
            lines += [f"![{words}]({figures[table.name][0]})", ""]
        if table.name in trained:
            for sentence in comparison_sentences(trained[table.name]):
                lines += [sentence, ""]
        lines += [*table_format.markdown_grid(table), ""]
        note = " ".join(part for part in (table.note, table.legend) if part)
        lines += [note, ""]
    return "\n".join(lines)


def _devices(rows: Sequence[Row]) -> list[str]:
    return sorted({row.device for row in rows})


def _provenance(rows: Sequence[Row], manifests: Sequence[Mapping[str, Any]]) -> list[str]:
    """Device, commit, versions and the command that made the rows."""
    lines = [f"- Device: {', '.join(_devices(rows)) or 'unknown'}"]
    for manifest in manifests:
        peers = manifest.get("extra", {}).get("peers", {})
        names = ", ".join(f"{name} {version}" for name, version in sorted(peers.items()))
        lines += origin_lines(manifest, [f"- Peers: {names}"] if peers else [])
    failed = sum(row.error is not None for row in rows)
    lines.append(f"- {len(rows)} rows, {failed} of them failed or skipped, with the reason")
    return lines
