"""What the study found: tables, figures and paired comparison from its rows."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from matplotlib.figure import Figure

from ham.errors import MissingDataError
from ham.files import write_text
from ham.report.aggregate import Cell, Results, difference
from ham.report.formats import cell_text, join_words, share
from ham.report.manifest import manifest_path, read_manifest
from ham.report.plots_base import style_context
from ham.report.rows import Row, read_rows
from ham.report.table_format import to_csv, to_markdown
from ham.report.tables_base import Table
from ham.report.write_parts import write_figure
from ham.study.report_figures import accuracy_figure, routing_figure
from ham.study.report_tables import (
    COMPARED,
    Setting,
    accuracy_table,
    comparison_table,
    completed,
    families,
    kind_words,
    mean_over_sizes,
    routing_table,
    settings_of,
    signed_share,
    version_table,
    words_for,
)
from ham.study.runs import EXPERIMENT, TUNING

BETTER = "is better"
RULE = (
    "The score with the higher mean over all settings and all sizes no longer than trained is the "
    "better default if the interval of the paired difference leaves out 0."
)


def read_study(files: Sequence[Path]) -> list[Row]:
    """The rows of files of the study; what old ones lack is read from the manifest beside them.

    Raises:
        CorruptFileError: If a file is damaged.
    """
    rows = []
    for path in files:
        beside = manifest_path(path)
        manifest = read_manifest(beside) if beside.is_file() else None
        rows += completed(read_rows(path), manifest)
    return rows


def build_report(rows: Sequence[Row], out: Path) -> list[Path]:
    """Write `mqar.md`, a CSV file of every table, and the figures; returns their paths.

    Raises:
        MissingDataError: If there is no row of the study.
    """
    rows = completed(rows, None)
    results = Results([row for row in rows if row.experiment == EXPERIMENT])
    if not results.rows:
        raise MissingDataError(f"no rows of experiment {EXPERIMENT!r} among {len(rows)} rows")
    texts = ["# Multi-query associative recall\n"]
    texts += [to_markdown(table, smoke=False) for table in page_tables(results)]
    texts.append("\n".join([*verdicts(results), "", *chosen_rates(rows)]))
    paths = [out / "mqar.md"]
    write_text(paths[0], "\n".join(texts).replace("\n# ", "\n## ") + "\n")
    for table in data_tables(results):
        paths.append(out / f"{table.name.replace('_', '-')}.csv")
        write_text(paths[-1], to_csv(table))
    with style_context():
        for name, figure in figures(results):
            paths += [out / file for file in write_figure(out, name, figure)]
    return paths


def page_tables(results: Results) -> Iterator[Table]:
    """The tables of the page: settings of the same sizes share one."""
    groups = families(results)
    for settings in groups:
        kinds = dict.fromkeys(kind_words(setting) for setting in settings)
        end = f": {'; '.join(kinds)}" if len(groups) > 1 else ""
        for table in _family_tables(results, settings):
            yield replace(table, title=table.title + end)
    versions = version_table(results, every_size=False)
    if versions.records:
        yield versions


def _family_tables(results: Results, settings: list[Setting]) -> Iterator[Table]:
    yield accuracy_table(results, settings)
    longer = accuracy_table(results, settings, longer=True)
    if longer.records:
        yield longer
    yield comparison_table(results, settings)
    routing = routing_table(results, settings, every_size=False)
    if routing.records:
        yield routing


def data_tables(results: Results) -> Iterator[Table]:
    """The tables for programs: every setting and size."""
    settings = settings_of(results)
    yield accuracy_table(results, settings)
    longer = accuracy_table(results, settings, longer=True)
    if longer.records:
        yield longer
    yield comparison_table(results, settings)
    yield routing_table(results, settings, every_size=True)
    versions = version_table(results, every_size=True)
    if versions.records:
        yield versions


def figures(results: Results) -> Iterator[tuple[str, Figure]]:
    """Name and figure of each; those of routing only where something routed."""
    yield "mqar", accuracy_figure(results)
    if results.find(EXPERIMENT, "pairs_kept_fraction"):
        yield (
            "mqar-recall",
            routing_figure(
                results,
                "pairs_kept_fraction",
                "Routing recall",
                "share of pairs kept, in any copy; thresholds frozen",
            ),
        )
        yield (
            "mqar-precision",
            routing_figure(
                results,
                "routed_precision",
                "Routing precision",
                "pairs held per token kept; thresholds frozen",
            ),
        )


def verdicts(results: Results) -> list[str]:
    """Sentences on the mean over settings and trained sizes of every two scores."""
    lines = ["# Which score?", "", RULE, ""]
    means = _means(results)
    lines += [f"- {model}: {cell_text(cell, share)}" for model, cell in means.items()]
    return [*lines, "", *(f"- {line}" for line in compare_scores(results))]


def compare_scores(results: Results) -> list[str]:
    """The difference of every two scores and what the seeds say of it, a line each."""
    means, lines = _means(results), []
    for ours, theirs in itertools.combinations(means, 2):
        cell = difference(means[ours], means[theirs])
        estimate = cell.estimate
        if estimate is None or estimate.low is None or estimate.n < 3:
            verdict = "not decided: fewer than three common seeds"
        elif estimate.low > 0:
            verdict = f"{ours} {BETTER}"
        elif estimate.high < 0:
            verdict = f"{theirs} {BETTER}"
        else:
            verdict = "not decided: the interval holds 0"
        lines.append(f"{ours} − {theirs}: {cell_text(cell, signed_share)}; {verdict}")
    return lines


def _means(results: Results) -> dict[str, Cell]:
    present = [model for model in COMPARED if model in results.models]
    return {model: mean_over_sizes(results, model) for model in present}


def chosen_rates(rows: Sequence[Row]) -> list[str]:
    """Which learning rate each arm used in each setting, and among how many."""
    tried = sorted({row.labels["learning_rate"] for row in rows if row.experiment == TUNING})
    used = {
        (row.model, words_for(row.labels)): row.labels["learning_rate"]
        for row in rows
        if row.experiment == EXPERIMENT
    }
    lines = [
        "# Learning rates",
        "",
        f"Chosen among {join_words([f'{rate:g}' for rate in tried])}, the same for every arm."
        if tried
        else "One rate for all; it was not tuned.",
        "",
    ]
    edges = tried[:1] + tried[-1:] if len(tried) > 1 else []
    return lines + [
        f"- {model}, {setting}: {rate:g}"
        + (" (at the edge of the range: a better one may lie outside)" if rate in edges else "")
        for (model, setting), rate in sorted(used.items())
    ]
