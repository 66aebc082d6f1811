"""Speed and memory against context on the page of a run, from sweeps that lie beside it.

A run measures its own models at one context or a few. A sweep (`ham sweep run`) measures larger,
untrained models over many; its rows never enter the tables of the run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime

from ham.claims.evidence import Evidence, Observation
from ham.measure.sweep.grid import MIXER_DECODE, MODEL_DECODE, MODEL_TRAIN
from ham.report.formats import join_words
from ham.report.html import PageFigure
from ham.report.plots_base import save_png, save_svg, style_context
from ham.report.rows import Row

MODELS = ("ham", "transformer", "gated-delta-rule")
EXPERIMENTS = (MODEL_DECODE, MIXER_DECODE, MODEL_TRAIN)
# By its name in a sweep's own report: name on the page, title, experiments that it draws.
FIGURES = {
    "decode": ("context_decode", "Decode speed against context", (MODEL_DECODE,)),
    "ratio": (
        "context_ratio",
        "Decode speed of HAM over the transformer",
        (MODEL_DECODE, MIXER_DECODE),
    ),
    "memory": ("context_memory", "Decoding memory against context", (MODEL_DECODE,)),
    "train": ("context_train", "Training step against context", (MODEL_TRAIN,)),
}
COST_FIGURES = ("throughput", "memory", "kv_growth")
"""Figures of the page that these follow."""


def newest_cells(evidence: Evidence) -> list[Row]:
    """Rows of sweeps, each cell from the newest of the sweeps that have it."""
    wanted = [
        one
        for one in sorted(evidence.observations, key=_age)
        if one.row.experiment in EXPERIMENTS and one.row.model in MODELS
    ]
    if not wanted:
        return []
    # Sweeps run kernels, so importing what reads their rows loads torch.
    from ham.report.sweep_cells import place_of, series_of

    keyed = {(place_of(one.row), series_of(one.row), one.row.metric): one.row for one in wanted}
    return list(keyed.values())


def sweep_page_figures(evidence: Evidence) -> Iterator[tuple[PageFigure, bytes]]:
    """The figures as the page shows them, and as PNG; none without rows of a sweep."""
    cells = newest_cells(evidence)
    if not cells:
        return
    from ham.report.sweep_cells import SweepRows
    from ham.report.sweep_plots import sweep_figures

    rows = SweepRows(cells)
    with style_context():
        drawings = sweep_figures(rows)
        for source, (name, title, experiments) in FIGURES.items():
            drawing = drawings.get(source)
            if drawing is not None:
                svg = save_svg(drawing.figure)
                drawn = [row for row in rows.rows if row.experiment in experiments]
                shown = f"{drawing.shown} {_origin_words(drawn)}"
                page = PageFigure(name, title, svg, shown, drawing.note, drawing.alt)
                yield page, save_png(drawing.figure)


def after_cost(figures: Sequence[PageFigure], added: Sequence[PageFigure]) -> list[PageFigure]:
    """The figures of a page with others behind those of cost, at the end where it has none."""
    places = [index for index, one in enumerate(figures) if one.name in COST_FIGURES]
    split = 1 + max(places, default=len(figures) - 1)
    return [*figures[:split], *added, *figures[split:]]


def _age(one: Observation) -> tuple[datetime, str]:
    started = one.started or datetime.min
    return (started if started.tzinfo else started.replace(tzinfo=UTC), one.run)


def _origin_words(rows: Sequence[Row]) -> str:
    """Size, device and launch mode of what was measured, and the models that were not."""
    sizes = sorted({round(row.parameters / 1e6) for row in rows if row.parameters})
    span = " to ".join(f"{size:,}" for size in dict.fromkeys([*sizes[:1], *sizes[-1:]]))
    modes = sorted({row.launch_mode.replace("_", " ") for row in rows if row.value is not None})
    words = (
        f"Untrained models{f' of {span} M parameters' if span else ''}, not those of this run, "
        f"on {join_words(sorted({row.device for row in rows}))} ({join_words(modes)})."
    )
    absent = [model for model in MODELS if all(row.model != model for row in rows)]
    return f"{words} Not measured: {join_words(absent)}." if absent else words
