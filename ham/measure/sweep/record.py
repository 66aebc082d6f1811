"""Provenance of a sweep: code, sizes and packages that its numbers depend on."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from ham.fingerprint import fingerprint, repository_root
from ham.kernels.speed.record import kernel_modules, switches
from ham.measure.sweep.grid import Scale
from ham.report.manifest import collect_manifest


def sweep_fingerprint() -> str:
    """Hash of the sweep, of all kernels and of all baselines, which are imported by name."""
    folder = repository_root() / "baselines"
    baselines = [
        f"ham.baselines.{path.stem}" for path in sorted(folder.glob("*.py")) if path.stem[0] != "_"
    ]
    return fingerprint("ham.measure.sweep.run", *kernel_modules(), *baselines)


def sweep_manifest(
    device: torch.device, dtype: torch.dtype, scale: Scale, command: Sequence[str], code: str
) -> dict[str, Any]:
    """The manifest of a sweep; the store adds under `measured` what it measures."""
    config = {
        "device": device.type,
        "dtype": str(dtype).removeprefix("torch."),
        "scale": dataclasses.asdict(scale),
    }
    extra = {"sources": code, "environment": switches()}
    return collect_manifest(config, command, extra=extra)
