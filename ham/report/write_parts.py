"""What the smaller reports share: files of a table and a figure, ceilings, origin lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ham.files import atomic_writer, write_text
from ham.report import table_format
from ham.report.formats import significant
from ham.report.plots_base import save_png, save_svg
from ham.report.provenance import commit_and_changes
from ham.report.tables_base import Column, Table


def write_table(out: Path, folder: str, table: Table, numbers: Table) -> list[str]:
    """Write a table as Markdown and LaTeX, and `numbers`, its columns for programs, as CSV.

    Returns:
        The names of the files below `out`.
    """
    texts = {
        "md": table_format.to_markdown(table, smoke=False),
        "csv": table_format.to_csv(numbers),
        "tex": table_format.to_latex(table, smoke=False),
    }
    names = []
    for suffix, text in texts.items():
        names.append(f"{folder}/{table.name}.{suffix}")
        write_text(out / names[-1], text)
    return names


def write_figure(out: Path, name: str, figure: Figure) -> list[str]:
    """Write `out/name.png` and `.svg`, within the style; returns their names below `out`."""
    png, svg = f"{name}.png", f"{name}.svg"
    with atomic_writer(out / png, "wb") as handle:
        handle.write(save_png(figure))
    write_text(out / svg, save_svg(figure))
    return [png, svg]


def ceilings_table(devices: Sequence[str], rates: Mapping[str, float], product: str) -> Table:
    """What the device reached on copying, reading and one large product.

    Args:
        devices: Of the rows.
        rates: Medians by metric.
        product: The product in words.
    """
    words = {
        "copy_gb_per_second": "copy, GB/s (read and written)",
        "read_gb_per_second": "read only, GB/s",
        "matmul_tflop_per_second": f"{product}, TFLOP/s",
    }
    return Table(
        "ceilings",
        "Ceilings measured in the same run",
        f"Device: {', '.join(devices) or 'unknown'}.",
        [Column("what", "what"), Column("value", "median", significant)],
        [{"what": text, "value": rates.get(metric)} for metric, text in words.items()],
        legend="",
    )


def origin_lines(manifest: Mapping[str, Any], further: Sequence[str]) -> list[str]:
    """Commit and versions of a manifest, `further` lines, and its commands."""
    versions = manifest.get("versions", {})
    known = [f"{name} {versions[name]}" for name in ("torch", "triton") if name in versions]
    commands = manifest.get("measured", {}).get("commands") or [manifest.get("command", [])]
    return [
        f"- Commit {commit_and_changes(manifest)}; {', '.join(known)}",
        *further,
        *(f"- Command: `{' '.join(command)}`" for command in commands),
    ]
