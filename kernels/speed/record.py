"""Provenance of a speed run: code, packages and switches that its numbers depend on."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ham.fingerprint import fingerprint, repository_root
from ham.kernels.peers.fla import FLASH_QLA_PATH, TRITON_PATH
from ham.kernels.registry import operations
from ham.report.manifest import (
    collect_manifest,
    manifest_path,
    portable_command,
    read_manifest,
    write_manifest,
)

# Variables that switch paths in peers and in Triton.
SWITCHES = ("FLA_", "TRITON_", "TORCHINDUCTOR_", "TILELANG_", "MAMBA_")


def kernel_modules() -> list[str]:
    """Every module under `kernels/`, which the registry imports by name at run time."""
    folder = repository_root() / "kernels"
    modules = []
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        modules.append(".".join(("ham", "kernels", *parts)))
    return modules


def kernel_fingerprint() -> str:
    """Hash of all code under `kernels/` and of the command that runs it."""
    return fingerprint("ham.cli.kernels", "ham.cli._kernels_speed", *kernel_modules())


def peer_versions() -> dict[str, str]:
    """Version of the package behind every peer, by provider."""
    return {
        f"{operation.name}/{provider.name}": provider.version() or "not installed"
        for operation in operations().values()
        for provider in operation.providers.values()
        if provider.version is not None
    }


def switches() -> dict[str, str]:
    """Environment variables that choose paths inside peers, as they are set for this process."""
    return {name: value for name, value in sorted(os.environ.items()) if name.startswith(SWITCHES)}


def speed_manifest(
    device: str, dtype: str, command: Sequence[str], code_fingerprint: str
) -> dict[str, Any]:
    """The manifest of a speed run; what the run measures is added under `measured`."""
    extra = {
        "kernel_sources": code_fingerprint,
        "peers": peer_versions(),
        "environment": switches(),
        "peer_environment": {"fla": TRITON_PATH, "flash_qla": FLASH_QLA_PATH},
    }
    manifest = collect_manifest({"device": device, "dtype": dtype}, command, extra=extra)
    manifest["measured"] = {"commands": [portable_command(command)], "ceilings": {}, "tiles": {}}
    return manifest


def continued_manifest(rows: Path, command: Sequence[str]) -> dict[str, Any]:
    """The manifest beside rows that this run adds to, with this run's command added."""
    manifest = read_manifest(manifest_path(rows))
    manifest.setdefault("measured", {}).setdefault("commands", []).append(portable_command(command))
    return manifest


def finish_manifest(
    rows: Path,
    manifest: dict[str, Any],
    ceilings: dict[str, float],
    tiles: dict[str, list[str]],
    wall_seconds: float,
) -> None:
    """Write the manifest with what was measured; wall times of several runs add up."""
    measured = manifest.setdefault("measured", {})
    measured["ceilings"] = ceilings
    measured["tiles"] = {**measured.get("tiles", {}), **tiles}
    write_manifest(
        manifest_path(rows), manifest, (manifest.get("wall_seconds") or 0.0) + wall_seconds
    )
