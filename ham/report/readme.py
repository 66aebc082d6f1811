"""The results section of README.md, made from what is published.

It stands between two markers; `ham publish readme` writes it and a test fails when it is stale.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from ham.config_files import read_yaml
from ham.errors import ConfigError
from ham.files import write_text
from ham.report.manifest import manifest_path, read_manifest
from ham.report.publish import CONFIG_FILE, REPORTS, RESULTS, Sources, sources_of
from ham.report.rows import Row, read_rows
from ham.report.verify import published_folders

README = Path("README.md")
BEGIN = "<!-- results: begin (`ham publish readme` writes these lines) -->"
END = "<!-- results: end -->"
# Sentences of a full run's summary that a reader of the README gets.
QUOTED = (
    "Quality",
    "Which tokens",
    "Cost",
    "Done",
    "Found",
    "Numbers",
    "Missing",
    "Threats to validity",
)
PAGES = {"run": "summary.md", "kernels": "kernels.md", "sweep": "sweep.md", "study": "mqar.md"}
KINDS = {
    "run": "training and evaluation",
    "kernels": "speed of kernels",
    "sweep": "decoding over context",
    "study": "associative recall",
}
SHORT_COMMIT = 9


def results_section(root: Path = Path()) -> str:
    """Every published folder as a line of a table, then what full runs say, the largest first."""
    lines = [
        "| results | what | rows | failed | device | commit | report |",
        "| --- | --- | ---: | ---: | --- | --- | --- |",
    ]
    names = published_folders(root)[::-1]
    lines += [_line(root, name) for name in names]
    for name in sorted(names, key=lambda name: -len(_rows_files(root, name))):
        lines += _quotes(root, name)
    return "\n".join(lines) + "\n"


def _rows_files(root: Path, name: str) -> list[Path]:
    return sorted((root / RESULTS / name).glob("*.rows.jsonl"))


def with_section(text: str, section: str) -> str:
    """The text of a README with its results section replaced.

    Raises:
        ConfigError: If the markers are not there.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ConfigError(f"{README} has no lines {BEGIN!r} and {END!r} to write between")
    return f"{before}{begin}\n\n{section}\n{end}{after}"


def write_readme(root: Path = Path()) -> Path:
    """Write the results section into README.md."""
    path = root / README
    write_text(path, with_section(path.read_text(encoding="utf-8"), results_section(root)))
    return path


def _line(root: Path, name: str) -> str:
    folder, files = root / RESULTS / name, _rows_files(root, name)
    rows = read_rows(files)
    commits = {str(read_manifest(manifest_path(path)).get("commit")) for path in files}
    sources = sources_of(folder)
    links = [
        f"[{page}]({REPORTS / name / page})"
        for kind, page in PAGES.items()
        if getattr(sources, kind) and (root / REPORTS / name / page).is_file()
    ]
    cells = [
        f"[`{name}`]({RESULTS / name})",
        _what(folder, sources),
        f"{len(rows):,}",
        str(sum(row.error is not None for row in rows)),
        _most_common_device(rows),
        ", ".join(sorted(commit[:SHORT_COMMIT] for commit in commits)),
        ", ".join(links) or "none",
    ]
    return f"| {' | '.join(cells)} |"


def _what(folder: Path, sources: Sources) -> str:
    kinds = [words for kind, words in KINDS.items() if getattr(sources, kind)]
    if sources.run and read_yaml(folder / CONFIG_FILE).get("scale") != "full":
        kinds[0] += ", a smoke run"
    return "; ".join(kinds) or "rows"


def _most_common_device(rows: list[Row]) -> str:
    counts = Counter(row.device for row in rows)
    return counts.most_common(1)[0][0] if counts else "unknown"


def _quotes(root: Path, name: str) -> list[str]:
    """What the summary of a full run says, as a list under its title."""
    folder, summary = root / RESULTS / name, root / REPORTS / name / PAGES["run"]
    if not sources_of(folder).run or not summary.is_file():
        return []
    if read_yaml(folder / CONFIG_FILE).get("scale") != "full":
        return []
    text = summary.read_text(encoding="utf-8").splitlines()
    starts = tuple(f"- **{topic}.**" for topic in QUOTED)
    return ["", f"**{text[0].removeprefix('# ')}** (`{name}`)", ""] + [
        line for line in text if line.startswith(starts)
    ]
