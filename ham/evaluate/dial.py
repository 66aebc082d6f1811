"""The HAM dial: one trained model, several cache sizes, no retraining.

For each target fraction the thresholds are set on the calibration split, layer by layer, frozen,
and the model is scored on the test split: bits per byte, needles, recall. The trained thresholds
come back afterwards. Bytes and times at the same fractions are measured apart, on a machine that
does nothing else (`ham.measure.dial`).
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Sequence

import numpy as np
import torch

from ham.config import DialConfig
from ham.errors import HamError
from ham.evaluate import needle, recall
from ham.evaluate.language_modelling import ratio_fields
from ham.evaluate.part import Cell, Fields, Subject
from ham.evaluate.scoring import RoutingCount
from ham.evaluate.segments import Segment, draw_segments
from ham.evaluate.threshold_dial import calibration_batches, coordinates, dialled, has_dial
from ham.report.statistics import Estimate, pooled_share


def cells(subject: Subject) -> list[Cell]:
    """One cell per target fraction; none for a model whose cache no threshold decides."""
    settings = subject.config.evaluate.dial
    if settings is None or not has_dial(subject.model):
        return []
    context = subject.config.data.context
    segments = draw_segments(subject.test.documents(), context, settings.tokens)
    batches = calibration_batches(subject)
    questions = _questions(subject, settings)

    def cell(fraction: float) -> Cell:
        return Cell(
            f"dial at {fraction:g}",
            [
                coordinates(fraction, metric)
                for metric in ("bits_per_byte", *(f"{name}_accuracy" for name in questions))
            ],
            lambda: measure_fraction(subject, segments, batches, fraction, questions),
        )

    return [cell(fraction) for fraction in settings.fractions]


def _questions(subject: Subject, settings: DialConfig) -> dict[str, list[Cell]]:
    """Fewer needles and recall documents than in their own parts, one set for all fractions."""
    parts = {"needle": needle.cells, "recall": recall.cells}
    evaluate = subject.config.evaluate
    if not settings.samples:
        return {}
    fewer = {
        name: getattr(evaluate, name).model_copy(update={"samples": settings.samples})
        for name in parts
        if getattr(evaluate, name) is not None
    }
    if "needle" in fewer:
        fewer["needle"] = fewer["needle"].model_copy(update={"generate": False})
    config = subject.config.model_copy(update={"evaluate": evaluate.model_copy(update=fewer)})
    smaller = dataclasses.replace(subject, config=config)
    return {name: parts[name](smaller) for name in fewer}


def measure_fraction(
    subject: Subject,
    segments: Sequence[Segment],
    batches: Sequence[torch.Tensor],
    fraction: float,
    questions: dict[str, list[Cell]],
) -> list[Fields]:
    """The rows of one target; `kv_fraction` is what was realised on the text of each.

    Args:
        subject: The model.
        segments: Held-out text.
        batches: What the thresholds are set on.
        fraction: The target.
        questions: By name of a part, its cells; their accuracies become one row.
    """
    routing = RoutingCount()
    with dialled(subject.model, batches, fraction):
        scores = subject.score([segment.tokens for segment in segments], routing)
        answers = {name: _ask(parts) for name, parts in questions.items()}
    bits = np.array([score.nats.sum() for score in scores]) / math.log(2)
    sizes = np.array([subject.tokenizer.count_bytes(segment.tokens[1:]) for segment in segments])
    documents = np.array([segment.document for segment in segments])
    text = {**ratio_fields(bits, sizes, documents), "kv_fraction": routing.fraction()}
    rows = [{**coordinates(fraction), **text}]
    for name, fields in answers.items():
        rows.append({**coordinates(fraction, f"{name}_accuracy"), **fields})
    return rows


def _ask(parts: Sequence[Cell]) -> Fields:
    """The accuracy of all cells together; a failure of one must not take the loss with it."""
    try:
        made = [row for part in parts for row in part.run()]
    except HamError:
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        print(f"ham: warning: a question of the dial failed: {reason}", file=sys.stderr)
        return {"value": None, "error": reason}
    return pooled_accuracy([row for row in made if row["metric"] == "accuracy"])


def pooled_accuracy(rows: Sequence[Fields]) -> Fields:
    """One accuracy with Wilson's interval from several, and their mean realised fraction.

    Rows with an error, e.g. of samples beyond the model's range, are left out; if nothing is left
    the error is that of the first.
    """
    good = [row for row in rows if row["value"] is not None]
    if not good:
        return {"value": None, "error": rows[0]["error"] if rows else "no sample was asked"}
    pooled = pooled_share(
        [Estimate(row["value"], row["n"], effective_n=row.get("effective_n")) for row in good]
    )
    kept = sum((row["kv_fraction"] or 0.0) * row["n"] for row in good) / pooled.n
    return {**pooled.row_fields(), "kv_fraction": kept}
