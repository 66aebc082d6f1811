"""Published results: rows and manifests in git, and everything that is made from them.

`results/published/<name>/` holds copies of a finished run's rows, manifests and configuration, or
the rows and manifests of a kernel speed run (`kernel_speed.rows.jsonl`), of training with each
provider (`kernel_training.rows.jsonl`) or of a sweep (`sweep.rows.jsonl`), or all of them. They are
source files: no rule ever writes them, so a fresh machine reruns nothing. The report in
`reports/published/<name>/` can be made again from them at any time, byte for byte.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import yaml

from ham.config_files import load_config
from ham.errors import ConfigError, MissingDataError
from ham.files import atomic_writer, write_text
from ham.report.build import build_report
from ham.report.kernel_report import build_kernel_report
from ham.report.manifest import manifest_path, read_manifest
from ham.report.rows import read_rows
from ham.report.sweep_report import build_sweep_report
from ham.workflow import parse_workflow_config, rows_files

RESULTS = Path("results/published")
REPORTS = Path("reports/published")
CONFIG_FILE = "config.yaml"
KERNEL_ROWS = "kernel_speed.rows.jsonl"
TRAINING_ROWS = "kernel_training.rows.jsonl"
KERNEL_FILES = (KERNEL_ROWS, TRAINING_ROWS)
SWEEP_ROWS = "sweep.rows.jsonl"


def publish_run(config_paths: list[Path], name: str, root: Path = Path()) -> list[Path]:
    """Copy the rows and manifests of a finished run under `results/published/<name>/`.

    Args:
        config_paths: The configuration of the run, overlays included.
        name: `<date>-<device>` by convention.
        root: The checkout that holds `results/`.

    Returns:
        The rows files written.

    Raises:
        ConfigError: If something is published under that name already.
        MissingDataError: If a job of the run has no rows yet; the message names it.
    """
    folder = root / RESULTS / name
    if folder.exists():
        raise ConfigError(f"{folder} exists; published results are never overwritten")
    config = load_config(config_paths)
    sources = [root / path for path in rows_files(config)]
    missing = [path for path in sources if not path.is_file()]
    if missing:
        raise MissingDataError(
            f"{missing[0]} does not exist ({len(missing)} of {len(sources)} rows files are "
            "missing); finish the run first"
        )
    written = []
    for source in sources:
        arm, seed = source.parts[-3:-1]
        target = folder / f"{arm}-{seed}-{source.name}"
        _copy(source, target)
        _copy(manifest_path(source), manifest_path(target))
        written.append(target)
    write_text(folder / CONFIG_FILE, yaml.safe_dump(config.model_dump(mode="json")))
    return written


def published_names(root: Path = Path()) -> list[str]:
    """Names under which results are published that a report is made of."""
    return sorted(
        {
            path.parent.name
            for file in (CONFIG_FILE, *KERNEL_FILES, SWEEP_ROWS)
            for path in (root / RESULTS).glob(f"*/{file}")
        }
    )


def build_published(name: str, root: Path = Path(), out: Path | None = None) -> list[Path]:
    """Make the reports of published rows again.

    Args:
        name: One of `published_names`.
        root: The checkout.
        out: Folder to write; `reports/published/<name>` when None.

    Returns:
        The first page of each report: `index.html` of a run, `kernels.md` of kernel rows,
        `sweep.md` of a sweep.

    Raises:
        MissingDataError: If nothing is published under that name.
    """
    folder = root / RESULTS / name
    target = out or root / REPORTS / name
    pages = []
    if (folder / CONFIG_FILE).is_file():
        pages.append(_build_run(folder, target))
    kernel_files = [folder / name for name in KERNEL_FILES if (folder / name).is_file()]
    if kernel_files:
        pages.append(_build_kernels(kernel_files, target))
    if (folder / SWEEP_ROWS).is_file():
        pages.append(_build_sweep(folder / SWEEP_ROWS, target))
    if not pages:
        known = ", ".join(published_names(root)) or "none"
        raise MissingDataError(f"nothing is published as {name!r}; known: {known}")
    return pages


def _build_run(folder: Path, target: Path) -> Path:
    others = (*KERNEL_FILES, SWEEP_ROWS)
    files = sorted(path for path in folder.glob("*.rows.jsonl") if path.name not in others)
    values = yaml.safe_load((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    build_report(
        read_rows(files),
        target,
        config=parse_workflow_config(values),
        manifests=[read_manifest(manifest_path(path)) for path in files],
    )
    return target / "index.html"


def _build_kernels(files: list[Path], target: Path) -> Path:
    manifests = [read_manifest(manifest_path(path)) for path in files]
    listing = build_kernel_report(read_rows(files), target, manifests)
    return target / listing["files"][0]


def _build_sweep(rows: Path, target: Path) -> Path:
    listing = build_sweep_report(read_rows(rows), target, [read_manifest(manifest_path(rows))])
    return target / listing["files"][0]


def _copy(source: Path, target: Path | os.PathLike) -> None:
    with open(source, "rb") as reader, atomic_writer(target, "wb") as writer:
        shutil.copyfileobj(reader, writer)
