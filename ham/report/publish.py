"""Published results: rows and manifests in git, and everything that is made from them.

`results/published/<name>/` holds copies of a finished run's rows, manifests, configuration and of
the claims of its day, with those of its studies, below `evidence/` of other published folders by
which claims are judged too, below `inspect/` the page of kept tokens with its rows, and the answers
behind lm-eval's scores (`ham.report.samples`); or the rows
and manifests of a kernel speed run (`kernel_speed.rows.jsonl`), of training with each provider
(`kernel_training.rows.jsonl`), of a sweep (`sweep.rows.jsonl`) or of the study of routing scores,
or several of them, and the checksums of them all (`SHA256SUMS`). They are source files: no rule
ever writes them, so a fresh machine reruns nothing. The report in `reports/published/<name>/` can
be made again from them at any time, byte for byte; `ham.report.verify` checks that.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import yaml

from ham.batch.studies import published_study_files, study_files
from ham.claims.config import load_claims, shipped_claims
from ham.claims.evidence import CHECKSUMS, Evidence, gather_evidence, observe
from ham.config import Config
from ham.config_files import load_config, read_yaml
from ham.errors import ConfigError, MissingDataError
from ham.files import atomic_writer, sha256_file, write_folder, write_json, write_text
from ham.report.build import build_report
from ham.report.figure_compare import drawing_versions
from ham.report.kernel_report import build_kernel_report
from ham.report.manifest import manifest_path, read_manifest
from ham.report.rows import read_rows
from ham.report.samples import PUBLISHED_SAMPLES, answers_of_job, pack_samples
from ham.report.study_section import STUDY_EXPERIMENTS
from ham.report.sweep_report import build_sweep_report
from ham.workflow import inspection_files, rows_files

RESULTS = Path("results/published")
REPORTS = Path("reports/published")
PIECES = Path("results/pieces")
CONFIG_FILE = "config.yaml"
CLAIMS_FILE = "claims.yaml"
KERNEL_ROWS = "kernel_speed.rows.jsonl"
TRAINING_ROWS = "kernel_training.rows.jsonl"
KERNEL_FILES = (KERNEL_ROWS, TRAINING_ROWS)
SWEEP_ROWS = "sweep.rows.jsonl"
ROWS = "*.rows.jsonl"
DRAWN_WITH = "drawn_with.json"
BESIDE = "evidence"
INSPECTED = "inspect"


def publish_run(
    config_paths: list[Path], name: str, root: Path = Path(), with_samples: bool = True
) -> list[Path]:
    """Copy the rows and manifests of a finished run under `results/published/<name>/`.

    Args:
        config_paths: The configuration of the run, overlays included.
        name: `<date>-<device>` by convention.
        root: The checkout that holds `results/`.
        with_samples: Whether to keep the answers behind lm-eval's scores.

    Returns:
        The rows files written.

    Raises:
        ConfigError: If something is published under that name already, or the answers are too many.
        MissingDataError: If a job of the run has no rows yet; the message names it.
    """
    require_unpublished(name, root)
    config = load_config(config_paths)
    sources = rows_files(config)
    missing = [path for path in sources if not (root / path).is_file()]
    if missing:
        raise MissingDataError(
            f"{root / missing[0]} does not exist ({len(missing)} of {len(sources)} rows files are "
            "missing); finish the run first"
        )
    paths = [path for source in sources for path in (source, str(manifest_path(source)))]
    files = {path: (root / path).read_bytes() for path in paths}
    pages = {
        path: (root / path).read_bytes()
        for path in inspection_files(config)
        if (root / path).is_file()
    }
    answers: dict[str, bytes] = {}
    for source in sources if with_samples else ():
        if source.endswith("/evaluate.rows.jsonl"):
            answers |= answers_of_job(root, source)
    studies = study_files(config, root)
    return publish_files(config, files, name, root, studies, pages=pages, answers=answers)


def require_unpublished(name: str, root: Path = Path()) -> None:
    """Refuse a name that is taken.

    Raises:
        ConfigError: If something is published under it.
    """
    folder = root / RESULTS / name
    if folder.exists():
        raise ConfigError(f"{folder} exists; published results are never overwritten")


def publish_files(
    config: Config,
    files: Mapping[str, bytes],
    name: str,
    root: Path = Path(),
    studies: Mapping[str, bytes] | None = None,
    beside: Sequence[Path] = (),
    pages: Mapping[str, bytes] | None = None,
    answers: Mapping[str, bytes] | None = None,
) -> list[Path]:
    """Keep rows and manifests of a run, given by their paths in the run, in one step.

    Args:
        config: Of the run.
        files: Rows and manifests of its jobs.
        name: `<date>-<device>` by convention.
        root: The checkout that holds `results/`.
        studies: Rows and manifests of the runs of its studies.
        beside: Published folders whose rows count as evidence for claims; copied as they are.
        pages: Pages of `ham inspect` of its models, and rows with manifests beside them.
        answers: Answers behind lm-eval's scores.

    Returns:
        The rows files written.

    Raises:
        ConfigError: If something is published under that name already, two folders beside it have
            one name, or the answers take more than `ham.report.samples.MOST_BYTES`.
        MissingDataError: If a folder beside it is none of published results.
        CorruptFileError: If rows of studies have no manifest.
    """
    require_unpublished(name, root)
    kept = {"-".join(PurePosixPath(path).parts[-3:]): content for path, content in files.items()}
    kept |= published_study_files(studies or {}) | _copies(beside)
    kept |= {
        f"{INSPECTED}/{PurePosixPath(path).name}": page for path, page in (pages or {}).items()
    }
    packed = pack_samples(answers or {})
    if packed is not None:
        kept[PUBLISHED_SAMPLES] = packed
    kept[CONFIG_FILE] = yaml.safe_dump(config.model_dump(mode="json")).encode()
    kept[CLAIMS_FILE] = shipped_claims().read_bytes()
    kept[CHECKSUMS] = checksum_text(
        {path: sha256(kept[path]).hexdigest() for path in kept}
    ).encode()
    folder = root / RESULTS / name
    write_folder(folder, kept)
    return [folder / path for path in kept if path.endswith(ROWS.removeprefix("*"))]


def _copies(folders: Sequence[Path]) -> dict[str, bytes]:
    """The files of published folders by their paths in a folder that takes them in."""
    kept: dict[str, bytes] = {}
    for folder in folders:
        if not (folder / CHECKSUMS).is_file():
            raise MissingDataError(f"{folder} has no {CHECKSUMS}: no published results lie there")
        place = f"{BESIDE}/{folder.resolve().name}"
        if f"{place}/{CHECKSUMS}" in kept:
            raise ConfigError(f"two folders are called {folder.name!r}; give each once")
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            kept[f"{place}/{path.relative_to(folder).as_posix()}"] = path.read_bytes()
    return kept


def published_names(root: Path = Path()) -> list[str]:
    """Names under which results are published that a report is made of."""
    folders = sorted(path for path in (root / RESULTS).glob("*") if path.is_dir())
    return [folder.name for folder in folders if any(sources_of(folder))]


class Sources(NamedTuple):
    """The rows files of a published folder by the report that they go into."""

    run: list[Path]
    kernels: list[Path]
    sweep: list[Path]
    study: list[Path]


def sources_of(folder: Path) -> Sources:
    """Sort the rows files of a folder; rows of other origin have no report of their own."""
    kernels = [folder / name for name in KERNEL_FILES if (folder / name).is_file()]
    sweep = [folder / SWEEP_ROWS] if (folder / SWEEP_ROWS).is_file() else []
    others = [path for path in sorted(folder.glob(ROWS)) if path not in (*kernels, *sweep)]
    study = [path for path in others if _first_experiment(path) in STUDY_EXPERIMENTS]
    run = [path for path in others if path not in study]
    return Sources(run if (folder / CONFIG_FILE).is_file() else [], kernels, sweep, study)


def build_published(name: str, root: Path = Path(), out: Path | None = None) -> list[Path]:
    """Make the reports of published rows again, and note what the figures were drawn with.

    Args:
        name: One of `published_names`.
        root: The checkout.
        out: Folder to write; `reports/published/<name>` when None.

    Returns:
        The first page of each report: `index.html` of a run, `kernels.md` of kernel rows,
        `sweep.md` of a sweep, `mqar.md` of the study.

    Raises:
        MissingDataError: If nothing is published under that name that a report is made of.
    """
    folder = root / RESULTS / name
    target = out or root / REPORTS / name
    sources = sources_of(folder)
    pages = []
    if sources.run:
        pages.append(_build_run(folder / CONFIG_FILE, sources, target))
    if sources.kernels:
        pages.append(_build_kernels(sources.kernels, target))
    if sources.sweep:
        pages.append(_build_sweep(sources.sweep, target))
    # The page of a run has its studies.
    if sources.study and not sources.run:
        pages.append(_build_study(sources.study, target))
    if not pages:
        known = ", ".join(published_names(root)) or "none"
        raise MissingDataError(f"nothing is published as {name!r}; known: {known}")
    write_json(target / DRAWN_WITH, drawing_versions())
    return pages


def write_checksums(folder: Path) -> Path:
    """Write the SHA-256 of every file of a published folder, as `sha256sum` does.

    Raises:
        ConfigError: If there are checksums already: published results never change.
        MissingDataError: If the folder holds no rows.
    """
    target = folder / CHECKSUMS
    if target.exists():
        raise ConfigError(f"{target} exists; published results never change")
    if not any(folder.glob(ROWS)):
        raise MissingDataError(f"{folder} holds no {ROWS}")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    write_text(
        target,
        checksum_text({path.relative_to(folder).as_posix(): sha256_file(path) for path in files}),
    )
    return target


def checksum_text(digests: Mapping[str, str]) -> str:
    """Checksums by name, in the format of `sha256sum`."""
    return "".join(f"{digests[name]}  {name}\n" for name in sorted(digests))


def _build_run(config: Path, sources: Sources, target: Path) -> Path:
    claims = config.with_name(CLAIMS_FILE)
    pages = _copy_pages(config.parent, target)
    folder = RESULTS / config.parent.name
    files = [*sources.run, *sorted(config.parent.glob(f"{INSPECTED}/{ROWS}"))]
    build_report(
        read_rows(files),
        target,
        # As it was resolved then: defaults of today's code would change the page of an earlier run.
        config=read_yaml(config),
        manifests=_manifests(files),
        inspection=pages[0] if pages else None,
        claims=load_claims(claims) if claims.is_file() else None,
        source=folder.as_posix(),
        claims_file=(folder / CLAIMS_FILE).as_posix(),
        evidence=_evidence(config.parent, sources.study, folder.as_posix()),
        pieces=_pieces(config),
    )
    return target / "index.html"


def _pieces(config: Path) -> list[str]:
    """Packed state of a published run in its checkout, as patterns for a shell.

    A piece is named after its configuration. Patterns, because a piece that is added later must not
    change the page of what is published.
    """
    root = config.parents[len(RESULTS.parts) + 1]
    name = read_yaml(config).get("name")
    # Of a piece in parts, the first stands for all.
    patterns = [f"{(PIECES / str(name)).as_posix()}-*.tar.xz{part}" for part in ("", ".001")]
    return [pattern for pattern in patterns if any(root.glob(pattern))]


def _copy_pages(source: Path, target: Path) -> list[str]:
    """Put the pages of kept tokens into a report; returns their paths in it."""
    pages = sorted(source.glob(f"{INSPECTED}/*.html"))
    for page in pages:
        with atomic_writer(target / INSPECTED / page.name, "wb") as handle:
            handle.write(page.read_bytes())
    return [f"{INSPECTED}/{page.name}" for page in pages]


def _evidence(place: Path, study: list[Path], run: str) -> Evidence:
    """Rows of the run's studies, and of the published folders that were copied beside it."""
    copied = sorted(path for path in (place / BESIDE).glob("*") if path.is_dir())
    beside = gather_evidence(copied) if copied else Evidence()
    manifests = _manifests(study)
    own = observe(read_rows(study), manifests, run)
    return Evidence((*own, *beside.observations), (*manifests, *beside.manifests))


def _build_kernels(files: list[Path], target: Path) -> Path:
    listing = build_kernel_report(read_rows(files), target, _manifests(files))
    return target / listing["files"][0]


def _build_sweep(files: list[Path], target: Path) -> Path:
    listing = build_sweep_report(read_rows(files), target, _manifests(files))
    return target / listing["files"][0]


def _build_study(files: list[Path], target: Path) -> Path:
    # The study trains models, so importing it loads torch.
    from ham.study.report import build_report as build_study_report
    from ham.study.report import read_study

    return build_study_report(read_study(files), target)[0]


def _manifests(files: list[Path]) -> list[dict[str, Any]]:
    return [read_manifest(manifest_path(path)) for path in files]


def _first_experiment(path: Path) -> str | None:
    with open(path, encoding="utf-8") as handle:
        line = handle.readline()
    try:
        return json.loads(line).get("experiment")
    except (ValueError, AttributeError):
        return None
