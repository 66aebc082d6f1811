"""Where the numbers of a report come from: code, machine, versions, and how to make them again."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ham.report.aggregate import Cell, Results
from ham.report.rows import Row

Manifest = Mapping[str, Any]

STAGES = {
    "train": "train",
    "tuning": "train",
    "throughput": "measure",
    "memory": "measure",
    "inspect": "inspect",
    "agreement": "inspect",
    "kernel_speed": "measure",
}
TIMED = "dial"
"""An experiment of `ham evaluate` whose bytes and times `ham measure` takes."""
ORDER = ("train", "evaluate", "measure", "inspect")
"""Sub-commands that make rows, as a list of jobs has them."""


@dataclass(frozen=True)
class JobLine:
    """One job behind the rows: what it made and the command that makes it again."""

    model: str
    seed: str
    stage: str
    rows: int
    failed: int
    command: str
    wall_seconds: float | None
    manifest_id: str
    config_hash: str
    code_fingerprint: str


@dataclass(frozen=True)
class Provenance:
    """Facts about the code and the machines, each with the values that occur."""

    facts: list[tuple[str, list[str]]]
    versions: list[tuple[str, list[str]]]
    jobs: list[JobLine]
    dirty: bool


def stage_of(row: Row, known: Mapping[str, Manifest] | None = None) -> str:
    """The sub-command that made a row; for the dial, which two make, the recorded one."""
    recorded = (known or {}).get(row.manifest_id, {}).get("command") or []
    if row.experiment == TIMED and recorded[1:2] == ["measure"]:
        return "measure"
    return STAGES.get(row.experiment, "evaluate")


def gather(results: Results, manifests: Sequence[Manifest], config_name: str) -> Provenance:
    """Collect what the manifests and the rows say.

    Args:
        results: The rows.
        manifests: Manifests of the jobs; missing ones are tolerated.
        config_name: Used in the commands of jobs without a manifest.
    """
    known = {str(manifest.get("manifest_id")): manifest for manifest in manifests}
    facts = [
        ("commit", _distinct(commit_and_changes(manifest) for manifest in manifests)),
        ("device", results.devices()),
        ("processor", _distinct(m.get("cpu") for m in manifests)),
        ("threads per job", _distinct(m.get("threads") for m in manifests)),
        ("GPU", _gpus([gpu for m in manifests for gpu in m.get("gpus", [])])),
        ("platform", _distinct(m.get("platform") for m in manifests)),
        ("launch mode", _distinct(row.launch_mode.replace("_", " ") for row in results.rows)),
        ("provider", _distinct(row.provider for row in results.rows)),
        ("manifests", [f"{len(known)} of {len(_ids(results))} jobs"]),
    ]
    packages = sorted({name for m in manifests for name in m.get("versions", {})})
    versions = [
        (name, _distinct(m.get("versions", {}).get(name) for m in manifests)) for name in packages
    ]
    return Provenance(
        [(name, values) for name, values in facts if values],
        versions,
        job_lines(results, known, config_name),
        any(manifest.get("dirty") for manifest in manifests),
    )


def job_lines(results: Results, known: Mapping[str, Manifest], config_name: str) -> list[JobLine]:
    """One line a model, seed, stage and manifest."""
    groups: dict[tuple, list[Row]] = {}
    for row in results.rows:
        key = (row.model, row.seed, stage_of(row, known), row.manifest_id)
        groups.setdefault(key, []).append(row)
    lines = []
    for (model, seed, stage, identity), rows in groups.items():
        manifest = known.get(identity, {})
        lines.append(
            JobLine(
                model,
                "–" if seed is None else str(seed),
                stage,
                len(rows),
                sum(row.error is not None for row in rows),
                rerun_command(rows[0], known, config_name),
                manifest.get("wall_seconds"),
                identity,
                ", ".join(_distinct(row.config_hash for row in rows)),
                ", ".join(_distinct(row.code_fingerprint for row in rows)),
            )
        )
    return sorted(
        lines,
        key=lambda line: (results.models.index(line.model), line.seed, ORDER.index(line.stage)),
    )


def rerun_command(row: Row, known: Mapping[str, Manifest], config_name: str) -> str:
    """The command line that makes a row again: the recorded one, else its general form."""
    recorded = known.get(row.manifest_id, {}).get("command")
    if recorded:
        return shlex.join(recorded)
    stage = stage_of(row)
    if stage == "inspect":
        known_as = f"--config {config_name}.yaml --arm {row.model}"
        return f"ham inspect CHECKPOINT --sample FILE {known_as} --out PAGE"
    seed = "" if row.seed is None else f" --seed {row.seed}"
    where = {
        "train": "--data DATA --out OUT",
        "evaluate": "--data DATA --checkpoint CHECKPOINT --rows FILE",
        "measure": "--data DATA --checkpoint CHECKPOINT --rows FILE",
    }
    return f"ham {stage} {config_name}.yaml --arm {row.model}{seed} {where[stage]}"


def cell_command(cell: Cell, known: Mapping[str, Manifest], config_name: str) -> str:
    """The command of the first row behind a cell, and how many seeds repeat it."""
    text = "rerun: " + rerun_command(cell.rows[0], known, config_name)
    seeds = {row.seed for row in cell.rows}
    return text if len(seeds) < 2 else f"{text} (and {len(seeds) - 1} more seeds)"


def commit_and_changes(manifest: Manifest) -> str:
    """The commit behind a manifest, with the hash of changes that were in no commit."""
    commit = str(manifest.get("commit", "unknown"))
    if manifest.get("dirty"):
        return f"{commit} with changes (hash {manifest.get('dirty_hash')})"
    return commit


def _gpus(gpus: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line a GPU, driver and power limit, with the span of what jobs found at their start."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for gpu in gpus:
        parts = [str(gpu.get("name")), f"driver {gpu.get('driver')}"]
        if gpu.get("power_limit_watts"):
            parts.append(f"power limit {gpu['power_limit_watts']:g} W")
        groups.setdefault(", ".join(parts), []).append(gpu)
    spans = (("sm_clock_mhz", "MHz at start"), ("temperature_celsius", "°C at start"))
    return [
        ", ".join([name, *filter(None, (_span(group, key, unit) for key, unit in spans))])
        for name, group in sorted(groups.items())
    ]


def _span(gpus: Sequence[Mapping[str, Any]], key: str, unit: str) -> str:
    """`35 to 71 °C at start`, or one number where all are the same."""
    known = [gpu[key] for gpu in gpus if gpu.get(key)]
    ends = sorted({min(known), max(known)}) if known else []
    return f"{' to '.join(f'{end:g}' for end in ends)} {unit}" if ends else ""


def _ids(results: Results) -> set[str]:
    return {row.manifest_id for row in results.rows}


def _distinct(values: Any) -> list[str]:
    return sorted({str(value) for value in values if value not in (None, "")})
