"""Provenance: what made a result file, on what, from which code.

One manifest stands beside the rows of each job (`train.rows.jsonl`, `train.manifest.json`); rows
refer to it by `manifest_id`. Collecting one loads nothing heavy: versions come from the installed
packages' metadata, the GPU from `nvidia-smi`. The host's name is not recorded.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from ham.files import read_json, stable_hash, write_json

MANIFEST_VERSION = 1
ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("ham-bench", "torch", "triton", "numpy", "lm-eval", "datasets", "snakemake")
COMMIT_FILE_VARIABLE = "HAM_COMMIT_FILE"

# What changes from one second to the next and says nothing about what was run.
# `measured` holds what a job found out about its machine.
VOLATILE = ("manifest_id", "started", "wall_seconds", "measured")
VOLATILE_GPU = ("sm_clock_mhz", "memory_clock_mhz", "temperature_celsius", "power_watts")

_GPU_FIELDS = {
    "name": "name",
    "driver": "driver_version",
    "memory_mib": "memory.total",
    "power_limit_watts": "power.limit",
    "sm_clock_mhz": "clocks.sm",
    "memory_clock_mhz": "clocks.mem",
    "temperature_celsius": "temperature.gpu",
    "power_watts": "power.draw",
}


def collect_manifest(
    config: Mapping[str, Any],
    command: Sequence[str],
    seeds: Sequence[int] = (),
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Describe this process: code, configuration, machine, command.

    Args:
        config: The resolved configuration as plain JSON values.
        command: The command line, e.g. `sys.argv`; paths below the working directory are made
            relative, and the first entry is reduced to its name.
        seeds: Seeds that the job used.
        extra: Further JSON values, e.g. kernel source hashes and autotune choices.

    Returns:
        A JSON dictionary. `manifest_id` hashes everything except times, clocks and temperatures,
        so that the same job on the same code and machine keeps its id.
    """
    gpus = query_gpus()
    manifest: dict[str, Any] = {
        "manifest_version": MANIFEST_VERSION,
        **code_state(),
        "config": dict(config),
        "command": portable_command(command),
        "seeds": list(seeds),
        "versions": package_versions(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_model(),
        "threads": thread_count(),
        "gpus": gpus,
        "device": device_name(str(config.get("device", "auto")), gpus),
        "extra": dict(extra or {}),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "wall_seconds": None,
    }
    manifest["manifest_id"] = manifest_id(manifest)
    return manifest


def manifest_id(manifest: Mapping[str, Any]) -> str:
    """The stable hash of a manifest, without what varies between two identical runs."""
    stable = {key: value for key, value in manifest.items() if key not in VOLATILE}
    stable["gpus"] = [
        {key: value for key, value in gpu.items() if key not in VOLATILE_GPU}
        for gpu in manifest.get("gpus", [])
    ]
    return stable_hash(stable)


def write_manifest(
    path: str | os.PathLike, manifest: Mapping[str, Any], wall_seconds: float | None = None
) -> None:
    """Write `manifest` atomically, with the job's wall time when it is known by now."""
    written = dict(manifest)
    if wall_seconds is not None:
        written["wall_seconds"] = round(wall_seconds, 3)
    write_json(path, written)


def read_manifest(path: str | os.PathLike) -> dict[str, Any]:
    """Read a manifest.

    Raises:
        MissingDataError: If there is no such file.
        CorruptFileError: If it is not JSON.
    """
    return read_json(path)


def manifest_path(rows_path: str | os.PathLike) -> Path:
    """Where the manifest of a rows file stands: `x.rows.jsonl` has `x.manifest.json`."""
    path = Path(rows_path)
    stem = path.name.removesuffix(".jsonl").removesuffix(".rows")
    return path.with_name(f"{stem}.manifest.json")


def code_state(root: Path = ROOT) -> dict[str, Any]:
    """Commit and state of the working tree.

    Without git or outside a checkout the commit is read from the file named by the environment
    variable `HAM_COMMIT_FILE` (first line: commit, second line, if any: hash of the changes).

    Returns:
        `commit` (or `unknown`), `dirty` (None when unknown) and `dirty_hash` (None when clean):
        the hash of the difference to the commit, new files included.
    """
    top = _git(root, "rev-parse", "--show-toplevel")
    # An installed copy may lie inside somebody else's checkout.
    if top is not None and Path(top.decode().strip()).resolve() == root.resolve():
        head = _git(root, "rev-parse", "HEAD")
        if head is not None:
            dirty_hash = _difference_hash(root)
            return {
                "commit": head.decode().strip(),
                "dirty": dirty_hash is not None,
                "dirty_hash": dirty_hash,
            }
    return _code_state_from_file()


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that a number may depend on."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def cpu_model() -> str:
    """The processor's marketing name, or the architecture where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() in ("model name", "Model", "Hardware") and value.strip():
            return " ".join(value.split())
    return platform.processor() or platform.machine()


def thread_count() -> int:
    """Threads that torch uses in this process, or would use if it were loaded."""
    torch = sys.modules.get("torch")
    if torch is not None and hasattr(torch, "get_num_threads"):
        return int(torch.get_num_threads())
    declared = os.environ.get("OMP_NUM_THREADS", "")
    return int(declared) if declared.isdigit() else len(os.sched_getaffinity(0))


def query_gpus() -> list[dict[str, Any]]:
    """Name, driver, clocks and temperature of each NVIDIA GPU; empty without one.

    A missing or broken `nvidia-smi` and values it cannot read are tolerated.
    """
    if shutil.which("nvidia-smi") is None:
        return []
    command = [
        "nvidia-smi",
        f"--query-gpu={','.join(_GPU_FIELDS.values())}",
        "--format=csv,noheader,nounits",
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return parse_gpu_query(done.stdout)


def parse_gpu_query(text: str) -> list[dict[str, Any]]:
    """Read the CSV answer of `nvidia-smi`; unreadable numbers become None."""
    gpus = []
    for line in text.splitlines():
        values = [value.strip() for value in line.split(",")]
        if len(values) != len(_GPU_FIELDS):
            continue
        gpu: dict[str, Any] = dict(zip(_GPU_FIELDS, values, strict=True))
        for key in gpu:
            if key not in ("name", "driver"):
                gpu[key] = _number(gpu[key])
        gpus.append(gpu)
    return gpus


def device_name(device: str, gpus: Sequence[Mapping[str, Any]] | None = None) -> str:
    """The name that rows carry for `cpu`, `cuda` or `auto` (a GPU if there is one)."""
    gpus = query_gpus() if gpus is None else gpus
    if device != "cpu" and gpus:
        return str(gpus[0]["name"])
    return cpu_model()


def portable_command(command: Sequence[str]) -> list[str]:
    """`command` without the folder of its program and without the working directory's path."""
    here = f"{Path.cwd()}{os.sep}"
    parts = [part.replace(here, "") for part in command]
    if parts:
        name = Path(parts[0]).name
        parts[0] = "ham" if name == "__main__.py" else name
    return parts


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _git(root: Path, *arguments: str) -> bytes | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def _difference_hash(root: Path) -> str | None:
    """Hash of the changes to tracked files and of new files; None in a clean checkout."""
    difference = _git(root, "diff", "HEAD", "--binary", "--no-ext-diff") or b""
    new_files = (_git(root, "ls-files", "-z", "--others", "--exclude-standard") or b"").split(b"\0")
    new_files = sorted(name for name in new_files if name)
    if not difference and not new_files:
        return None
    digest = hashlib.sha256(difference)
    for name in new_files:
        digest.update(name)
        path = root / os.fsdecode(name)
        if path.is_file():
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:12]


def _code_state_from_file() -> dict[str, Any]:
    named = os.environ.get(COMMIT_FILE_VARIABLE)
    if named:
        try:
            lines = Path(named).read_text(encoding="utf-8").split("\n")
        except OSError:
            lines = []
        lines = [line.strip() for line in lines if line.strip()]
        if lines:
            dirty_hash = lines[1] if len(lines) > 1 else None
            return {
                "commit": lines[0],
                "dirty": dirty_hash is not None,
                "dirty_hash": dirty_hash,
            }
    return {"commit": "unknown", "dirty": None, "dirty_hash": None}
