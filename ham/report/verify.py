"""Are published tables and figures what their raw rows give?

Everything in `reports/published/<name>/` is made again in a temporary folder and compared byte by
byte. Bytes of a figure also depend on matplotlib, FreeType and Pillow, whose versions stand beside
them (`drawn_with.json`); with other versions figures are compared by what they show
(`ham.report.figure_compare`), and a note says so. The rows themselves are checked against their
schema, their manifests and their checksums.
"""

from __future__ import annotations

import itertools
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ham.config_files import read_yaml
from ham.errors import ConfigError, HamError, MissingDataError
from ham.files import read_json, sha256_file
from ham.report.figure_compare import drawing_versions, png_difference, svg_difference
from ham.report.manifest import manifest_id, manifest_path, read_manifest
from ham.report.publish import (
    CHECKSUMS,
    CONFIG_FILE,
    DRAWN_WITH,
    INSPECTED,
    REPORTS,
    RESULTS,
    ROWS,
    build_published,
    sources_of,
)
from ham.report.rows import read_rows
from ham.report.samples import PUBLISHED_SAMPLES, read_samples, sample_faults

FIGURES = {".png", ".svg"}
MANIFESTS = "*.manifest.json"
LONGEST_LINE = 100


@dataclass
class Verification:
    """What a check of one published folder found.

    Attributes:
        name: The folder.
        rows: Rows read.
        tables: Files other than figures that are equal byte by byte.
        figures: Figures that are equal, byte by byte or in what they show.
        faults: What is wrong, one sentence each.
        notes: What a reader should know besides.
    """

    name: str
    rows: int = 0
    tables: int = 0
    figures: int = 0
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def verify_published(name: str, root: Path = Path()) -> Verification:
    """Check rows, manifests and checksums of a published folder, and its report against them.

    Args:
        name: A folder of `results/published`.
        root: The checkout.

    Raises:
        MissingDataError: If there is no such folder.
    """
    folder = root / RESULTS / name
    if not folder.is_dir():
        known = ", ".join(published_folders(root)) or "none"
        raise MissingDataError(f"nothing is published as {name!r}; known: {known}")
    found = Verification(name)
    found.faults += checksum_faults(folder)
    _check_rows(folder, found)
    _check_samples(folder, found)
    _check_report(root, found)
    return found


def verify_all(root: Path = Path()) -> list[Verification]:
    """Check every published folder; reports without results are at fault too."""
    names = published_folders(root)
    reports = sorted(path.name for path in (root / REPORTS).glob("*") if path.is_dir())
    lonely = [
        Verification(name, faults=[f"{REPORTS / name} is a report of results that are not there"])
        for name in reports
        if name not in names
    ]
    return [*(verify_published(name, root) for name in names), *lonely]


def published_folders(root: Path = Path()) -> list[str]:
    """Every folder of `results/published`, also those that no report is made of."""
    return sorted(path.name for path in (root / RESULTS).glob("*") if path.is_dir())


def published_name(path: Path) -> tuple[Path, str]:
    """Checkout and name of a published folder given by its path.

    Raises:
        ConfigError: If the path does not lie in a `results/published`.
    """
    place = path.resolve()
    if place.parts[-3:-1] != RESULTS.parts:
        raise ConfigError(f"expected a folder of {RESULTS}, received {path}")
    return place.parents[2], place.name


def checksum_faults(folder: Path) -> list[str]:
    """What differs from the checksums of a folder; a file without one is a fault."""
    if not (folder / CHECKSUMS).is_file():
        return [f"there is no {CHECKSUMS}; `ham publish seal {folder.name}` writes it"]
    recorded = {}
    for number, line in enumerate((folder / CHECKSUMS).read_text().splitlines(), start=1):
        digest, separator, name = line.partition("  ")
        if not separator or len(digest) != 64:
            return [f"{CHECKSUMS}:{number} is not a checksum and a name: {line[:LONGEST_LINE]!r}"]
        recorded[name] = digest
    present = _files_below(folder) - {CHECKSUMS}
    faults = [f"{name} is missing" for name in sorted(recorded.keys() - present)]
    faults += [f"{name} is not among the checksums" for name in sorted(present - recorded.keys())]
    faults += [
        f"{name} was changed: its SHA-256 is not the recorded one"
        for name in sorted(present & recorded.keys())
        if sha256_file(folder / name) != recorded[name]
    ]
    return faults


def _check_rows(folder: Path, found: Verification) -> None:
    inspected = sorted(folder.glob(f"{INSPECTED}/{ROWS}"))
    files = [*sorted(folder.glob(ROWS)), *inspected]
    if files == inspected:
        found.faults.append(f"there is no {ROWS}")
    run = sources_of(folder).run
    for path in files:
        try:
            found.faults += _rows_faults(path, found)
            if path in run:
                found.faults += _config_faults(path)
        except HamError as error:
            found.faults.append(str(error))
    manifests = {*folder.glob(MANIFESTS), *folder.glob(f"{INSPECTED}/{MANIFESTS}")}
    lonely = manifests - {manifest_path(path) for path in files}
    found.faults += [f"{path.name} belongs to no rows" for path in sorted(lonely)]


def _check_samples(folder: Path, found: Verification) -> None:
    """Accuracies must be the means of the answers that lie beside them."""
    path = folder / PUBLISHED_SAMPLES
    if not path.is_file():
        return
    try:
        records = read_samples(path)
        found.faults += sample_faults(records, read_rows(sources_of(folder).run))
    except HamError as error:
        found.faults.append(str(error))


def _rows_faults(path: Path, found: Verification) -> list[str]:
    """Faults of one rows file and of its manifest."""
    rows = read_rows(path)
    found.rows += len(rows)
    if not rows:
        return [f"{path.name} is empty"]
    manifest = read_manifest(manifest_path(path))
    identity, faults = manifest.get("manifest_id"), []
    if manifest_id(manifest) != identity:
        faults.append(f"{manifest_path(path).name} was changed: its id is not that of its content")
    others = sorted({row.manifest_id for row in rows} - {identity})
    if others:
        faults.append(f"{path.name} refers to manifest {others[0]!r}, beside it lies {identity!r}")
    return faults


def _config_faults(path: Path) -> list[str]:
    """A run's manifests were written under the configuration that is kept beside them."""
    kept = read_yaml(path.with_name(CONFIG_FILE))
    beside = manifest_path(path)
    recorded = read_manifest(beside).get("config") or {}
    if _untuned(kept) == _untuned(recorded) if kept.get("tuning") else kept == recorded:
        return []
    return [f"{beside.name} has another configuration than {CONFIG_FILE}"]


def _untuned(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without what `ham train` sets from the tuning section: rate, steps, seeds."""
    train = dict(config.get("train", {}))
    for key in ("learning_rate", "steps"):
        train.pop(key, None)
    arms = [
        {key: value for key, value in arm.items() if key not in ("steps", "seeds")}
        for arm in config.get("arms", [])
    ]
    # How jobs share processes decides no number; pieces may differ in it.
    rest = {k: value for k, value in config.items() if k not in ("tuning", "seeds", "workflow")}
    return {**rest, "train": train, "arms": arms}


def _check_report(root: Path, found: Verification) -> None:
    """Make the report again and compare it file by file."""
    if not any(sources_of(root / RESULTS / found.name)):
        found.notes.append("no report is made of these rows")
        return
    kept = root / REPORTS / found.name
    with tempfile.TemporaryDirectory() as temporary:
        made = Path(temporary)
        try:
            build_published(found.name, root, made)
        except HamError as error:
            found.faults.append(f"the report cannot be made: {error}")
            return
        old, new = _files_below(kept), _files_below(made)
        found.faults += [f"{kept / name} is missing" for name in sorted(new - old)]
        found.faults += [f"{kept / name} is not made from the rows" for name in sorted(old - new)]
        alike = _same_drawing(kept / DRAWN_WITH, found)
        for name in sorted((old & new) - {DRAWN_WITH}):
            difference = _difference(kept / name, made / name, alike)
            if difference is not None:
                found.faults.append(f"{kept / name}: {difference}")
            elif Path(name).suffix in FIGURES:
                found.figures += 1
            else:
                found.tables += 1


def _same_drawing(recorded: Path, found: Verification) -> bool:
    """Whether figures were drawn with what is installed here; if not, a note says so."""
    drawn = read_json(recorded) if recorded.is_file() else {}
    here = drawing_versions()
    changes = [
        f"{name} {drawn.get(name, 'unknown')} (here {here[name]})"
        for name in here
        if drawn.get(name) != here[name]
    ]
    if changes:
        found.notes.append(
            f"figures were drawn with {', '.join(changes)}: compared by words, shapes and "
            "coordinates (SVG) and decoded pixels (PNG) instead of bytes"
        )
    return not changes


def _difference(kept: Path, made: Path, alike: bool) -> str | None:
    """How two files differ, or None; figures of other versions count by what they show."""
    old, new = kept.read_bytes(), made.read_bytes()
    if old == new:
        return None
    if not alike:
        if kept.suffix == ".png":
            return png_difference(old, new)
        if kept.suffix == ".svg":
            return svg_difference(old.decode(), new.decode())
        if kept.suffix == ".html":
            return _page_difference(old.decode(), new.decode())
    if kept.suffix == ".png":
        return "the bytes of the figure differ"
    return _line_difference(old.decode(errors="replace"), new.decode(errors="replace"))


def _page_difference(old: str, new: str) -> str | None:
    """Text by bytes, the drawings in it by what they show."""
    pieces = [re.split(r"(<svg\b.*?</svg>)", text, flags=re.DOTALL) for text in (old, new)]
    texts = ["".join(piece[::2]) for piece in pieces]
    drawings = zip(pieces[0][1::2], pieces[1][1::2], strict=False)
    if texts[0] != texts[1]:
        return _line_difference(*texts)
    if len(pieces[0]) != len(pieces[1]):
        return f"{len(pieces[0]) // 2} drawings against {len(pieces[1]) // 2}"
    return next((words for pair in drawings if (words := svg_difference(*pair))), None)


def _line_difference(old: str, new: str) -> str:
    lines = itertools.zip_longest(old.splitlines(), new.splitlines(), fillvalue="(nothing)")
    for number, (one, other) in enumerate(lines, start=1):
        if one != other:
            return (
                f"line {number} is {one[:LONGEST_LINE]!r}, the rows give {other[:LONGEST_LINE]!r}"
            )
    return "line ends differ"


def _files_below(folder: Path) -> set[str]:
    paths = folder.rglob("*") if folder.is_dir() else ()
    return {path.relative_to(folder).as_posix() for path in paths if path.is_file()}
