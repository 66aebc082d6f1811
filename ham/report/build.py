"""Build the report: tables, figures, one page, a summary, and a list of what was made.

Everything is made from rows; the same rows, configuration and manifests give the same bytes.

    index.html              one self-contained page
    summary.md              the summary and the comparison table
    tables/NAME.{md,csv,tex}
    figures/NAME.{png,svg}
    report.json             what was made, what was skipped and why
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ham.claims.config import Claims
from ham.claims.evidence import Evidence, observe
from ham.claims.judge import judge
from ham.claims.ledger import READER_COLUMNS, ledger_table
from ham.files import atomic_writer, write_json, write_text
from ham.report import table_format
from ham.report.aggregate import Results
from ham.report.figures import FIGURES
from ham.report.first_screen import first_screen, missing_jobs
from ham.report.html import INSPECTION_CAPTION, Page, PageFigure, failure_lines, render_page
from ham.report.plots_base import Look, save_png, save_svg, style_context
from ham.report.provenance import Manifest, gather
from ham.report.recall_words import length_note
from ham.report.rows import Row
from ham.report.speed_words import speed_note
from ham.report.study_section import (
    missing_runs,
    study_figures,
    study_rows,
    study_sentence,
    study_tables,
)
from ham.report.summary import summary_sentences
from ham.report.sweep_section import FIGURES as SWEEP_FIGURES
from ham.report.sweep_section import after_cost, sweep_page_figures
from ham.report.tables import PARTS_OF_TABLES, all_tables
from ham.report.tables_base import Table

REPORT_VERSION = 1
Progress = Callable[[str], None]


@dataclass
class Build:
    """What a build has made so far.

    Attributes:
        folder: Where it writes.
        files: Every file written, relative to the folder.
        skipped: Figures and tables without a number: name, title, reason.
    """

    folder: Path
    files: list[str] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)

    def text(self, name: str, content: str) -> None:
        """Write a text file."""
        write_text(self.folder / name, content)
        self.files.append(name)

    def binary(self, name: str, content: bytes) -> None:
        """Write a binary file."""
        with atomic_writer(self.folder / name, "wb") as handle:
            handle.write(content)
        self.files.append(name)

    def remove(self, *names: str) -> None:
        """Remove what an earlier report in the same folder had and this one has not."""
        for name in names:
            (self.folder / name).unlink(missing_ok=True)

    def skip(self, kind: str, name: str, title: str, reason: str) -> None:
        """Note what could not be made."""
        self.skipped.append({"kind": kind, "name": name, "title": title, "reason": reason})


def build_report(
    rows: Sequence[Row],
    out_dir: str | os.PathLike,
    config: Any = None,
    manifests: Sequence[Manifest] = (),
    progress: Progress | None = None,
    inspection: str | None = None,
    claims: Claims | None = None,
    source: str = "RESULTS",
    claims_file: str | None = None,
    evidence: Evidence | None = None,
    pieces: Sequence[str] = (),
) -> dict[str, Any]:
    """Write the whole report.

    Args:
        rows: Result rows of any experiments; missing ones leave gaps that the report names.
        out_dir: Folder to write to; other files in it are left alone.
        config: The `Config` of the experiment, or its JSON dictionary, or None.
        manifests: Manifests of the jobs behind the rows.
        progress: Called with a name after each piece of work.
        inspection: Page of `ham inspect` to link, relative to `out_dir`.
        claims: Claims to judge by these rows.
        source: Folder of the rows, as the ledger's commands name it.
        claims_file: Where the claims are from; the shipped file when None.
        evidence: Rows beside those of the run: claims are judged by both, and a study of
            associative recall gets its tables and figures.
        pieces: Packed state of the run, as commands in a checkout name it.

    Returns:
        The content of `report.json`.
    """
    build = Build(Path(out_dir))
    advance = progress or (lambda name: None)
    settings = _plain_config(config, manifests)
    results = Results(rows)
    look = Look.of(
        results,
        smoke=settings.get("scale") == "smoke",
        context=settings.get("data", {}).get("context"),
        targets=_targets(settings),
    )
    evidence = evidence or Evidence()
    every = [*manifests, *evidence.manifests]
    known = {str(manifest.get("manifest_id")): manifest for manifest in every}
    tables, missing = all_tables(results, look, _notes(results, settings, evidence))
    study = study_rows(evidence)
    tables += study_tables(study)
    for table in tables:
        _write_table(build, table, look.smoke)
    for name, title in missing.items():
        if name not in PARTS_OF_TABLES:
            build.skip("table", name, f"{title} (table)", "not run")
        build.remove(*(f"tables/{name}.{suffix}" for suffix in ("md", "csv", "tex")))
    absent = missing_jobs(settings, results, known) + missing_runs(study, evidence.manifests)
    for job in absent:
        build.skip("job", job, job, "no rows")
    ledger, judged = None, None
    if claims is not None:
        own = observe(results.rows, manifests, source, settings)
        judged = judge(claims, [*own, *evidence.observations])
        places = [one for one in evidence.places if not Path(one).is_relative_to(source)]
        ledger = ledger_table(judged, [source, *places], claims_file)
        reader = ledger.only(READER_COLUMNS)
        build.text("tables/claims.md", table_format.to_markdown(reader, look.smoke))
        build.text("tables/claims.csv", table_format.to_csv(ledger))
        short = ledger.only(ledger.headline)
        build.text("tables/claims.tex", table_format.to_latex(short, look.smoke))
    advance("tables")
    figures = _write_figures(build, results, look, advance)
    for name, *_ in SWEEP_FIGURES.values():
        build.remove(*(f"figures/{name}.{suffix}" for suffix in ("png", "svg")))
    figures = after_cost(figures, _write_ready(build, sweep_page_figures(evidence)))
    figures += _write_ready(build, study_figures(study))
    name = str(settings.get("name", "CONFIG"))
    page = Page(
        title=str(settings.get("title") or settings.get("name") or "HAM benchmark report"),
        scale=settings.get("scale"),
        results=results,
        styles=look.styles,
        sentences=[
            *first_screen(results, settings, judged, known, absent, evidence, pieces),
            *summary_sentences(results, look),
            *study_sentence(study, evidence.manifests),
        ],
        tables=tables,
        figures=figures,
        skipped=build.skipped,
        provenance=gather(results, manifests, name),
        manifests=known,
        config=settings or None,
        config_name=name,
        inspection=inspection,
        ledger=ledger,
    )
    build.text("index.html", render_page(page))
    build.text("summary.md", _summary_markdown(page, look.smoke))
    advance("page")
    listing = _listing(build, page)
    write_json(build.folder / "report.json", listing)
    return listing


def figure_count() -> int:
    """Pieces of work of one build, for a progress bar."""
    return len(FIGURES) + 2


def _write_table(build: Build, table: Table, smoke: bool) -> None:
    build.text(f"tables/{table.name}.md", table_format.to_markdown(table, smoke))
    build.text(f"tables/{table.name}.csv", table_format.to_csv(table))
    build.text(f"tables/{table.name}.tex", table_format.to_latex(table, smoke))


def _write_figures(
    build: Build, results: Results, look: Look, advance: Progress
) -> list[PageFigure]:
    made = []
    with style_context():
        for spec in FIGURES:
            drawing = spec.draw(results, look)
            if drawing is None:
                if spec.part_of is None:
                    build.skip("figure", spec.name, f"{spec.title} (figure)", spec.missing(results))
                build.remove(*(f"figures/{spec.name}.{suffix}" for suffix in ("png", "svg")))
            else:
                svg = save_svg(drawing.figure)
                build.binary(f"figures/{spec.name}.png", save_png(drawing.figure))
                build.text(f"figures/{spec.name}.svg", svg)
                made.append(
                    PageFigure(spec.name, spec.title, svg, drawing.shown, drawing.note, drawing.alt)
                )
            advance(spec.name)
    return made


def _write_ready(build: Build, ready: Iterable[tuple[PageFigure, bytes]]) -> list[PageFigure]:
    """Write figures that are drawn already."""
    written = []
    for figure, content in ready:
        build.binary(f"figures/{figure.name}.png", content)
        build.text(f"figures/{figure.name}.svg", figure.svg)
        written.append(figure)
    return written


def _plain_config(config: Any, manifests: Sequence[Manifest]) -> dict[str, Any]:
    """The configuration as plain values; that of the manifests where none is given."""
    if config is None:
        embedded = [m["config"] for m in manifests if m.get("config")]
        return dict(embedded[0]) if embedded else {}
    if isinstance(config, Mapping):
        return dict(config)
    return config.model_dump(mode="json")


def _notes(results: Results, settings: Mapping[str, Any], evidence: Evidence) -> dict[str, str]:
    """What captions of tables say besides, by name: it needs more than the rows of the run."""
    lengths = length_note(results, settings)
    return {
        "throughput": speed_note(results, evidence),
        "recall": lengths,
        "equal_bytes": lengths,
    }


def _targets(settings: Mapping[str, Any]) -> dict[str, float]:
    targets = {}
    for arm in settings.get("arms", []):
        target = arm.get("options", {}).get("target")
        if target is not None:
            targets[arm["name"]] = float(target)
    return targets


def _summary_markdown(page: Page, smoke: bool) -> str:
    lines = [f"# {page.title}", ""]
    if smoke:
        lines += [f"**{table_format.SMOKE_NOTE}**", ""]
    lines += [f"- **{topic}.** {text}" for topic, text in page.sentences]
    headline = page.tables[0].only(page.tables[0].headline)
    lines += ["", *table_format.markdown_grid(headline), ""]
    lines += [f"{headline.note} {table_format.LEGEND}", ""]
    if page.ledger is not None:
        lines += ["## Claims", ""]
        lines += [*table_format.markdown_grid(page.ledger.only(page.ledger.headline)), ""]
        lines += [page.ledger.note, ""]
    for figure in page.figures:
        lines += [f"![{figure.title}](figures/{figure.name}.png)", ""]
        lines += [f"{figure.shown} {figure.note}", ""]
    if page.inspection:
        lines += [f"[Kept tokens]({page.inspection}): {INSPECTION_CAPTION}", ""]
    failures = failure_lines(page.results.failures())
    lines += ["## Failed cells", ""]
    lines += [
        f"- {f['model']}, {f['experiment']}, {f['number']} ({f['where']}): failed: {f['error']}"
        for f in failures
    ] or ["None."]
    lines += ["", "## Not run", ""]
    lines += [f"- {item['title']}: {item['reason']}" for item in page.skipped] or ["Nothing."]
    return "\n".join(lines) + "\n"


def _listing(build: Build, page: Page) -> dict[str, Any]:
    results = page.results
    return {
        "report_version": REPORT_VERSION,
        "title": page.title,
        "scale": page.scale,
        "models": results.models,
        "styles": {model: asdict(style) for model, style in page.styles.items()},
        "seeds": results.seeds(),
        "devices": results.devices(),
        "rows": len(results.rows),
        "failed_rows": len(results.failures()),
        "summary": dict(page.sentences),
        "files": sorted([*build.files, "report.json"]),
        "skipped": build.skipped,
        "manifests": sorted(page.manifests),
    }
