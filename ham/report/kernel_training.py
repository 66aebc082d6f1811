"""Loss curves of one training run with several providers: figure, table and a sentence."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ham.report.formats import byte_size, count, join_words, reason, significant
from ham.report.kernel_plots import color_of
from ham.report.loss_curves import WINDOW, absolute_differences, smoothed
from ham.report.plots_axes import log_y_plain
from ham.report.plots_base import (
    WIDTH_INCHES,
    Drawing,
    legend_lines,
    new_figure,
)
from ham.report.rows import Row
from ham.report.tables_base import Column, Record, Table

EXPERIMENT = "kernel_training"
BASE = "torch"
OTHER_ROUNDING = "torch-other-rounding"
# The order of tables and of lines; names that are not listed follow.
ORDER = (BASE, OTHER_ROUNDING, "triton", "reference")
# The base is a broad band, so that lines upon it stay visible.
LINES = {BASE: ("-", 5.0), OTHER_ROUNDING: ("--", 1.6)}
OTHER_COLOR = "#0072b2"

NOTE = (
    "One arm trained with each variant from the same weights, on the same batches and learning "
    "rates. `torch-other-rounding` is the torch provider with other matrix products (reductions of "
    "split products in the other precision, the other BLAS library): what it differs by is the "
    f"noise of the arithmetic. Final loss: mean of the last {WINDOW} steps. Differences are "
    "absolute, in nats per token, from torch: mean over the last half of the steps, and largest of "
    f"running means over {WINDOW} steps. Tokens per second leave out the first steps, in which "
    "kernels are compiled, and those with frozen thresholds."
)
COLUMNS = [
    Column("variant", "variant"),
    Column("provider", "provider"),
    Column("tokens_per_second", "tokens/s", count),
    Column("times_faster", "× torch", significant),
    Column("peak_memory_bytes", "peak memory", byte_size),
    Column("final_loss_nats", "final loss, nats", lambda value, like=None: f"{value:.4f}"),
    Column("loss_difference_nats", "mean difference, nats", significant),
    Column("smoothed_loss_difference_nats", "largest smoothed difference, nats", significant),
    Column("note", "result"),
]
METRICS = (
    "tokens_per_second",
    "peak_memory_bytes",
    "final_loss_nats",
    "loss_difference_nats",
    "smoothed_loss_difference_nats",
)


class TrainingRun:
    """Rows of one arm and seed.

    Attributes:
        model: Name of the arm.
        seed: Its seed.
        name: Name of its files.
        variants: Those with rows, in the order of tables.
    """

    def __init__(self, model: str, seed: int | None, rows: Iterable[Row]):
        self.model = model
        self.seed = seed
        self.name = f"training-{model}-seed{seed}"
        self.rows = list(rows)
        names = {_variant(row) for row in self.rows}
        self.variants = [name for name in ORDER if name in names] + sorted(names.difference(ORDER))
        self.devices = sorted({row.device for row in self.rows})

    def find(self, variant: str, metric: str) -> Row | None:
        """The row of one number that is not a step, or of a failure."""
        for row in self.rows:
            if _variant(row) == variant and row.metric == metric and row.x_value is None:
                return row
        return None

    def value(self, variant: str, metric: str) -> float | None:
        """The number of `find`, if there is one."""
        row = self.find(variant, metric)
        return None if row is None else row.value

    def losses(self, variant: str) -> dict[int, float]:
        """Loss of each step, in the order of steps; empty where the variant failed."""
        found = {
            int(row.x_value): row.value
            for row in self.rows
            if _variant(row) == variant
            and row.metric == "loss_nats"
            and row.x_value is not None
            and row.value is not None
        }
        return dict(sorted(found.items()))


def training_runs(rows: Iterable[Row]) -> list[TrainingRun]:
    """The runs among `rows`, by arm and seed."""
    groups: dict[tuple[str, int | None], list[Row]] = {}
    for row in rows:
        if row.experiment == EXPERIMENT:
            groups.setdefault((row.model, row.seed), []).append(row)
    keys = sorted(groups, key=lambda key: (key[0], -1 if key[1] is None else key[1]))
    return [TrainingRun(*key, groups[key]) for key in keys]


def training_table(run: TrainingRun) -> Table:
    """Speed, loss and distance to torch of each variant."""
    title = f"Training of {run.model}, seed {run.seed}, with each provider"
    records = [_record(run, variant) for variant in run.variants]
    shown = [
        column
        for column in COLUMNS
        if column.key != "peak_memory_bytes" or any(r[column.key] is not None for r in records)
    ]
    return Table(run.name, title, NOTE, shown, records, legend="A dash: no number.")


def comparison_sentences(run: TrainingRun) -> list[str]:
    """How far each other provider lies from torch, measured by the noise of the arithmetic."""
    noise = run.value(OTHER_ROUNDING, "loss_difference_nats")
    sentences = []
    for variant in run.variants:
        distance = run.value(variant, "loss_difference_nats")
        if variant in (BASE, OTHER_ROUNDING) or distance is None:
            continue
        start = (
            f"Over the last half of the steps the losses of {variant} differ from those of torch "
            f"by {significant(distance)} nats on average"
        )
        if noise is None:
            sentences.append(f"{start}; other rounding was not measured.")
        elif noise == 0.0:
            sentences.append(f"{start}; other rounding changed no loss at all here.")
        else:
            times = significant(distance / noise)
            sentences.append(
                f"{start}: the difference of {variant} is {times} times that of the other rounding "
                f"({significant(noise)} nats)."
            )
    return sentences


def training_figure(run: TrainingRun) -> Drawing | None:
    """Loss against step above, smoothed distance to torch below; None without any loss."""
    curves = {variant: run.losses(variant) for variant in run.variants}
    curves = {variant: losses for variant, losses in curves.items() if losses}
    if not curves:
        return None
    distances = _distances(curves)
    figure, panels = new_figure(
        f"Training of {run.model} with each provider",
        "same weights, batches and learning rates; nats per token",
        rows=2 if distances else 1,
        panel_height=2.6,
        left=0.85,
        row_gap=0.85,
        legend=legend_lines(curves),
        titled=True,
        footer=" · ".join([f"seed {run.seed}", *run.devices]),
    )
    panels[0].set_title(f"loss, mean of {WINDOW} steps")
    for variant, losses in curves.items():
        panels[0].plot(*_smooth_line(list(losses), list(losses.values())), **_line(variant))
    if distances:
        _draw_distances(panels[1], distances)
    for axes in panels:
        axes.set_xlabel("optimiser step")
        axes.set_ylabel("nats per token")
        axes.margins(x=0.02)
    panels[-1].set_xlim(panels[0].get_xlim())
    _legend(figure, list(curves))
    return Drawing(
        figure,
        f"Losses of {join_words(list(curves))}.",
        "A provider that is right lies about as far from torch as other rounding does.",
        " ".join(["Line charts of loss against optimiser step.", *comparison_sentences(run)]),
    )


def _record(run: TrainingRun, variant: str) -> Record:
    failure = next(
        (row for row in run.rows if _variant(row) == variant and row.error is not None), None
    )
    provider = next(row.provider for row in run.rows if _variant(row) == variant)
    record: Record = {metric: run.value(variant, metric) for metric in METRICS}
    speed, base = record["tokens_per_second"], run.value(BASE, "tokens_per_second")
    known = isinstance(speed, float) and base
    return record | {
        "variant": variant,
        "provider": provider,
        "times_faster": speed / base if known else None,
        "note": f"failed: {reason(failure.error or '')}" if failure is not None else None,
    }


def _distances(curves: dict[str, dict[int, float]]) -> dict[str, tuple[list[int], list[float]]]:
    """Steps and |loss - loss of torch| of each other variant that has all steps of torch."""
    base = curves.get(BASE, {})
    return {
        variant: (list(losses), absolute_differences(list(losses.values()), list(base.values())))
        for variant, losses in curves.items()
        if variant != BASE and list(losses) == list(base)
    }


def _draw_distances(axes: Axes, distances: dict[str, tuple[list[int], list[float]]]) -> None:
    positive = False
    for variant, (steps, values) in distances.items():
        xs, means = _smooth_line(steps, values)
        # A logarithmic axis has no place for steps that are equal to the last bit.
        shown = [mean if mean > 0.0 else math.nan for mean in means]
        positive = positive or any(mean > 0.0 for mean in means)
        axes.plot(xs, shown, **_line(variant))
    axes.set_title(f"absolute difference from torch, mean of {WINDOW} steps")
    if positive:
        log_y_plain(axes)


def _smooth_line(steps: Sequence[int], values: Sequence[float]) -> tuple[list[int], list[float]]:
    """Running means, each at the last step of its window."""
    means = smoothed(values)
    return list(steps)[len(steps) - len(means) :], means


def _line(variant: str) -> dict:
    dash, width = LINES.get(variant, ("-", 1.4))
    color = OTHER_COLOR if variant == OTHER_ROUNDING else color_of(variant)
    return {"color": color, "linestyle": dash, "linewidth": width}


def _legend(figure: Figure, variants: Sequence[str]) -> None:
    handles = [Line2D([], [], label=variant, **_line(variant)) for variant in variants]
    height = figure.get_figheight()
    figure.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(0.08 / WIDTH_INCHES, 1 - 0.57 / height),
        ncol=math.ceil(len(handles) / legend_lines(variants)),
        handlelength=2.2,
        columnspacing=1.4,
        borderpad=0.2,
        labelspacing=0.35,
    )


def _variant(row: Row) -> str:
    return str(row.labels.get("variant", row.provider))
