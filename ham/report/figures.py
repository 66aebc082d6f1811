"""The figures of the report, in the order of the page."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ham.report import (
    plots_cost,
    plots_dial,
    plots_gates,
    plots_language,
    plots_needle,
    plots_position,
    plots_recall,
    plots_tradeoff,
    plots_training,
)
from ham.report.aggregate import Results
from ham.report.plots_base import Drawing, Look


@dataclass(frozen=True)
class FigureSpec:
    """One figure of the report.

    Attributes:
        name: File name without suffix.
        title: Heading on the page.
        experiment: Whose rows it needs.
        metrics: Metrics of that experiment that it draws.
        draw: Makes the drawing, or None when nothing was run.
        part_of: A figure that already says that nothing was run; this one adds detail to it, where
            there is detail, and is left out without a word where there is none.
    """

    name: str
    title: str
    experiment: str
    metrics: tuple[str, ...]
    draw: Callable[[Results, Look], Drawing | None]
    part_of: str | None = None

    def missing(self, results: Results) -> str:
        """Why there is no drawing: not run, or every cell failed."""
        rows = [row for metric in self.metrics for row in results.find(self.experiment, metric)]
        failed = [row for row in rows if row.error is not None]
        if failed:
            return f"all {len(failed)} cells failed, e.g. {failed[0].error}"
        return "not run"


FIGURES = (
    FigureSpec(
        "bits_per_byte",
        "Bits per byte",
        "language_modelling",
        ("bits_per_byte",),
        plots_language.bits_per_byte,
    ),
    FigureSpec(
        "pareto",
        "Quality against memory",
        "memory",
        ("cache_bytes_allocated",),
        plots_tradeoff.pareto,
        part_of="memory",
    ),
    FigureSpec("dial", "The dial", "dial", ("bits_per_byte",), plots_dial.dial),
    FigureSpec(
        "dial_page",
        "The dial on one page",
        "dial",
        ("bits_per_byte",),
        plots_dial.dial_page,
        part_of="dial",
    ),
    FigureSpec(
        "loss_by_position",
        "Loss by position",
        "language_modelling",
        ("loss_nats",),
        plots_position.loss_by_position,
    ),
    FigureSpec(
        "token_classes",
        "Bits per byte by class of word",
        "language_modelling",
        ("class_bits_per_byte",),
        plots_language.token_classes,
        part_of="bits_per_byte",
    ),
    FigureSpec(
        "needle", "Needle in a haystack", "needle", ("accuracy",), plots_recall.needle_accuracy
    ),
    FigureSpec(
        "needle_tasks",
        "Needles by task",
        "needle",
        ("accuracy",),
        plots_needle.needle_tasks,
        part_of="needle",
    ),
    FigureSpec(
        "needle_kept",
        "Was the needle kept?",
        "needle",
        ("kept_fraction",),
        plots_recall.needle_kept,
    ),
    FigureSpec("recall", "Associative recall", "recall", ("accuracy",), plots_recall.recall_pairs),
    FigureSpec("lm_eval", "lm-eval tasks", "lm_eval", ("accuracy",), plots_language.lm_eval_tasks),
    FigureSpec(
        "throughput",
        "Throughput",
        "throughput",
        ("tokens_per_second", *plots_cost.SPEED_TASKS.values()),
        plots_cost.throughput,
    ),
    FigureSpec(
        "memory",
        "Memory",
        "memory",
        ("cache_bytes_allocated", "peak_memory_bytes"),
        plots_cost.memory,
    ),
    FigureSpec("kv_growth", "KV growth", "memory", ("kv_bytes",), plots_cost.kv_growth),
    FigureSpec(
        "training_loss", "Training loss", "train", ("loss_nats",), plots_training.training_loss
    ),
    FigureSpec(
        "validation_loss",
        "Validation loss",
        "train",
        ("loss_nats",),
        plots_training.validation_loss,
    ),
    FigureSpec(
        "recall_loss",
        "Loss on recall documents",
        "train",
        ("loss_nats",),
        plots_training.recall_loss,
        part_of="validation_loss",
    ),
    FigureSpec(
        "routed_fraction",
        "Routing over training",
        "train",
        ("kv_fraction",),
        plots_training.routed_fraction,
    ),
    FigureSpec(
        "gates",
        "Gates of both memories",
        "gates",
        ("gate_mean",),
        plots_gates.gates,
        part_of="routed_fraction",
    ),
)
