"""The study of associative recall on the page of a run: its tables, figures and missing runs.

The study (`ham mqar`) has models, sizes and tasks of its own, so its rows never enter the tables of
the run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from ham.claims.evidence import Evidence
from ham.report.aggregate import Results
from ham.report.formats import join_words
from ham.report.html import PageFigure
from ham.report.plots_base import save_png, save_svg, style_context
from ham.report.provenance import Manifest, commit_and_changes
from ham.report.rows import Row
from ham.report.tables_base import Table

EXPERIMENT = "mqar"
TUNING = "mqar_tuning"
STUDY_EXPERIMENTS = (EXPERIMENT, TUNING)
TITLE = "Multi-query associative recall"
# Title, what is shown, and text for those who cannot see it, by the name of the figure.
FIGURES = {
    "mqar": (
        "accuracy by routing score",
        "Share of queried keys whose value is right against the number of pairs.",
    ),
    "mqar-recall": (
        "pairs kept",
        "Share of pairs that the routed cache holds against the number of pairs, by layer.",
    ),
    "mqar-precision": (
        "pairs held per token kept",
        "Pairs that the routed cache holds per token kept against the number of pairs, by layer.",
    ),
}


def study_rows(evidence: Evidence) -> list[Row]:
    """The rows of the study among those beside a run."""
    return [one.row for one in evidence.observations if one.row.experiment in STUDY_EXPERIMENTS]


def study_tables(rows: Sequence[Row]) -> list[Table]:
    """The tables of the study, each with a name of its own; none without rows."""
    reported = _reported(rows)
    if not reported.rows:
        return []
    from ham.study.report import page_tables

    tables, seen = [], dict[str, int]()
    for table in page_tables(reported):
        seen[table.name] = seen.get(table.name, 0) + 1
        number = "" if seen[table.name] == 1 else f"_{seen[table.name]}"
        title = f"{TITLE}: {table.title[0].lower()}{table.title[1:]}"
        tables.append(replace(table, name=f"{table.name}{number}", title=title))
    return tables


def study_figures(rows: Sequence[Row]) -> Iterator[tuple[PageFigure, bytes]]:
    """The figures of the study as the page shows them, and as PNG; none without rows."""
    reported = _reported(rows)
    if not reported.rows:
        return
    from ham.study.report import figures

    with style_context():
        for name, figure in figures(reported):
            words, shown = FIGURES[name]
            svg = save_svg(figure)
            alt = f"{shown} One line for each arm, one panel for each setting."
            note = "Bars: 95 % t interval over seeds. Thresholds are frozen."
            page = PageFigure(name, f"{TITLE}: {words}", svg, shown, note, alt)
            yield page, save_png(figure)


def study_sentence(rows: Sequence[Row], manifests: Sequence[Manifest]) -> list[tuple[str, str]]:
    """Topic and text: what was run, by which code, and which scores the seeds tell apart."""
    reported = _reported(rows)
    if not reported.rows:
        return []
    from ham.study.report import BETTER, compare_scores
    from ham.study.report_tables import settings_of

    used = {row.manifest_id for row in reported.rows}
    commits = {commit_and_changes(one) for one in manifests if one.get("manifest_id") in used}
    told = [line for line in compare_scores(reported) if line.endswith(BETTER)]
    text = (
        f"Arms: {len(reported.models)}, settings: {len(settings_of(reported))}, seeds: "
        f"{len(reported.seeds())}, on {join_words(reported.devices())}, at commit "
        f"{join_words(sorted(commits)) or 'unknown'}. Over all settings and trained sizes: "
        f"{'; '.join(told) or 'the seeds tell no two scores apart'}."
    )
    return [(TITLE, text)]


def missing_runs(rows: Sequence[Row], manifests: Sequence[Manifest]) -> list[str]:
    """Arms and seeds of the study that a setting has no row of, in words.

    Settings are those that occur in rows; arms and seeds also those that the manifests name.
    """
    reported = _reported(rows)
    if not reported.rows:
        return []
    from ham.study.report_tables import SETTING, settings_of, words_for

    given = [one.get("config") or {} for one in manifests]
    # Other manifests beside a run, of sweeps, have no grid.
    configs = [config for config in given if {"arms", "tasks", "widths"} <= config.keys()]
    named = [arm["name"] for config in configs for arm in config["arms"]]
    models = dict.fromkeys([*named, *reported.models])
    seeds = sorted({*reported.seeds(), *(seed for config in configs for seed in config["seeds"])})
    there = {
        (row.model, row.seed, *(row.labels.get(name) for name in SETTING)) for row in reported.rows
    }
    return [
        f"study {model}, {words_for(setting)}, seed {seed}"
        for setting in settings_of(reported)
        for model in models
        for seed in seeds
        if (model, seed, *setting.values()) not in there
    ]


def _reported(rows: Sequence[Row]) -> Results:
    """Rows of reported runs, with the labels that rows of earlier versions lack."""
    reported = [row for row in rows if row.experiment == EXPERIMENT]
    if not reported:
        return Results([])
    # The study trains models, so importing it loads torch.
    from ham.study.report_tables import completed

    return Results(completed(reported, None))
