"""Tables of what happens inside a layer: its gates, and decisions that decoding takes otherwise."""

from __future__ import annotations

from ham.report import formats
from ham.report.aggregate import Results
from ham.report.tables_base import MODEL, Column, Record, Table, models_of, optional

BRANCHES = {"recurrent": "recurrent", "attention": "attention"}
"""Branches of `ham.evaluate.gates` and their titles."""


def gates(results: Results) -> Table:
    """One line a model and layer: both gates over held-out text, and the size of the branches."""
    columns = [MODEL, Column("layer", "layer", formats.count)]
    for branch, title in BRANCHES.items():
        columns += [
            Column(f"{branch}_mean", f"{title} gate", formats.bits),
            Column(f"{branch}_p5", f"{title}, 5 %", formats.bits),
            Column(f"{branch}_p95", f"{title}, 95 %", formats.bits),
        ]
    columns.append(Column("ratio", "attention to recurrent", formats.bits))
    records: list[Record] = []
    for model in models_of(results, "gates", "gate_mean"):
        for layer in results.x_values("gates", "gate_mean", model=model):
            where = {"model": model, "x": layer}
            record: Record = {"model": model, "layer": layer}
            for branch in BRANCHES:
                for key, metric in (("mean", "gate_mean"), ("p5", "gate_p5"), ("p95", "gate_p95")):
                    cell = results.cell("gates", metric, branch=branch, **where)
                    record[f"{branch}_{key}"] = optional(cell)
            record["ratio"] = optional(results.cell("gates", "branch_norm_ratio", **where))
            records.append(record)
    note = (
        "Gates of both memories over held-out tokens and heads, 0 shut and 1 open: mean, and the "
        "values below which 5 % and 95 % of them lie. Attention to recurrent: root mean square of "
        "what attention adds to the output over that of the recurrent memory. A branch whose gate "
        "is shut is not used."
    )
    return Table("gates", "Gates of both memories", note, columns, records)


def agreement(results: Results) -> Table:
    """One line a pair of ways to read one text: decisions that differ, over all layers."""
    columns = [
        MODEL,
        Column("form", "read by"),
        Column("against", "against"),
        Column("precision", "in"),
        Column("decisions", "decisions", formats.count),
        Column("flips", "differ", formats.count),
        Column("distance", "farthest from the threshold", formats.significant),
        Column("near", "decisions near it", formats.count),
        Column("logits", "largest difference of logits", formats.significant),
    ]
    records: list[Record] = []
    for model in models_of(results, "agreement", "flips"):
        for form, against, precision in _pairs(results, model):
            where = {"model": model, "form": form, "against": against, "precision": precision}
            flips = results.find("agreement", "flips", **where)
            records.append(
                {
                    "model": model,
                    "form": form,
                    "against": against,
                    "precision": precision,
                    "decisions": sum(row.n for row in flips),
                    "flips": _values(results, "flips", sum, **where),
                    "distance": _values(results, "flip_distance", max, **where),
                    "near": _values(results, "near_threshold", sum, **where),
                    "logits": _values(results, "logit_difference", max, **where),
                }
            )
    note = (
        "One held-out text read at once, in pieces and step by step: whether a token is kept must "
        "not depend on that but for rounding at the threshold. Near it are scores within 0.01. The "
        "first seed of the inspected arm."
    )
    return Table("agreement", "Decisions in decoding", note, columns, records)


def _pairs(results: Results, model: str) -> list[tuple[str, str, str]]:
    """Ways of reading that were compared, in the order of the rows."""
    rows = results.find("agreement", "flips", model=model)
    keys = ("form", "against", "precision")
    return list(dict.fromkeys(tuple(str(row.labels[key]) for key in keys) for row in rows))


def _values(results: Results, metric: str, reduce, **where) -> float | None:
    found = [row.value for row in results.find("agreement", metric, **where)]
    known = [value for value in found if value is not None]
    return reduce(known) if known else None
