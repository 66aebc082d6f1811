"""Provenance of a speed run: code, packages and switches that its numbers depend on."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from ham.fingerprint import fingerprint, repository_root
from ham.kernels.peers.fla import FLASH_QLA_PATH, TRITON_PATH
from ham.kernels.registry import operations
from ham.report.manifest import collect_manifest

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
    """The manifest of a speed run; the store adds under `measured` what it measures."""
    extra = {
        "kernel_sources": code_fingerprint,
        "peers": peer_versions(),
        "environment": switches(),
        "peer_environment": {"fla": TRITON_PATH, "flash_qla": FLASH_QLA_PATH},
    }
    return collect_manifest({"device": device, "dtype": dtype}, command, extra=extra)
