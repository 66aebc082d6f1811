"""Models side by side that decode with about the same number of bytes."""

from __future__ import annotations

from ham.report import formats
from ham.report.aggregate import Results, kv_fraction_cell
from ham.report.plots_base import Look
from ham.report.plots_language import quality_cell
from ham.report.plots_tradeoff import hardest_recall, memory_cell, memory_context, needle_mean
from ham.report.tables_base import MODEL, Column, Record, Table
from ham.report.tables_quality import kept_of

TOLERANCE = 0.15
"""How much more than the smallest of a group another may need: pages round HAM's bytes up."""


def equal_bytes(results: Results, look: Look) -> Table:
    """One line a model, in groups of equal decoding memory; a model alone stands in none."""
    context, pairs = memory_context(results), results.x_values("recall", "accuracy")
    columns = [
        Column("group", "group"),
        MODEL,
        Column("memory", f"decoding memory at {context or 0:,.0f}", formats.byte_size),
        Column("kv_fraction", "realised KV fraction of text", formats.share),
        Column("bits_per_byte", "bits per byte", formats.bits),
        Column("recall", f"recall, {max(pairs, default=0):g} pairs", formats.share),
        Column("recall_kept", "realised KV fraction of these pairs", formats.share),
        Column("needle", "needle accuracy", formats.share),
    ]
    records: list[Record] = []
    for number, models in enumerate(byte_groups(results, look), start=1):
        for model in models:
            quality = quality_cell(results, look, model)
            recall = hardest_recall(results, look, model)
            records.append(
                {
                    "group": number,
                    "model": model,
                    "memory": memory_cell(results, look, model),
                    "kv_fraction": kv_fraction_cell(quality.rows),
                    "bits_per_byte": quality,
                    "recall": recall,
                    "recall_kept": kept_of(recall),
                    "needle": needle_mean(results, look, model),
                }
            )
    note = (
        "Models of a group decode with the same memory, within "
        f"{TOLERANCE * 100:.0f} % of the smallest; needle accuracy is the mean over the whole grid."
    )
    return Table("equal_bytes", "At equal bytes", note, columns, records)


def byte_groups(results: Results, look: Look) -> list[list[str]]:
    """Models of equal decoding memory, ascending."""
    memory = {model: memory_cell(results, look, model).value for model in results.models}
    order = sorted((model for model in memory if memory[model]), key=lambda model: memory[model])
    groups: list[list[str]] = []
    for model in order:
        if groups and memory[model] <= (1 + TOLERANCE) * memory[groups[-1][0]]:
            groups[-1].append(model)
        else:
            groups.append([model])
    return [group for group in groups if len(group) > 1]
