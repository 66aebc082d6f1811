"""Published results: rows and manifests in git, and everything that is made from them.

`results/published/<name>/` holds copies of a finished run's rows, manifests and configuration.
They are source files: no rule ever writes them, so a fresh machine reruns nothing. The report in
`reports/published/<name>/` can be made again from them at any time, byte for byte.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import yaml

from ham.config import load_config
from ham.errors import ConfigError, MissingDataError
from ham.files import atomic_writer, write_text
from ham.report.build import build_report
from ham.report.manifest import manifest_path, read_manifest
from ham.report.rows import read_rows
from ham.workflow import parse_workflow_config, rows_files

RESULTS = Path("results/published")
REPORTS = Path("reports/published")
CONFIG_FILE = "config.yaml"


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
    """Names under which results are published."""
    return sorted(path.parent.name for path in (root / RESULTS).glob(f"*/{CONFIG_FILE}"))


def build_published(name: str, root: Path = Path(), out: Path | None = None) -> dict[str, Any]:
    """Make the report of published rows again; returns the listing of `report.json`.

    Args:
        name: One of `published_names`.
        root: The checkout.
        out: Folder to write; `reports/published/<name>` when None.

    Raises:
        MissingDataError: If nothing is published under that name.
    """
    folder = root / RESULTS / name
    if not (folder / CONFIG_FILE).is_file():
        known = ", ".join(published_names(root)) or "none"
        raise MissingDataError(f"nothing is published as {name!r}; known: {known}")
    files = sorted(folder.glob("*.rows.jsonl"))
    values = yaml.safe_load((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    return build_report(
        read_rows(files),
        out or root / REPORTS / name,
        config=parse_workflow_config(values),
        manifests=[read_manifest(manifest_path(path)) for path in files],
    )


def _copy(source: Path, target: Path | os.PathLike) -> None:
    with open(source, "rb") as reader, atomic_writer(target, "wb") as writer:
        shutil.copyfileobj(reader, writer)
