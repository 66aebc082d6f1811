"""Snakemake as a user calls it, on this repository's workflow."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import yaml

from ham.fingerprint import repository_root

ROOT = repository_root()


def snakemake_command(folder: Path, *arguments: str, snakefile: Path = ROOT / "Snakefile") -> list:
    """The command line of a run in `folder`."""
    base = [sys.executable, "-m", "snakemake", "--snakefile", str(snakefile)]
    return [*base, "--directory", str(folder), *arguments]


def snakemake(
    folder: Path, *arguments: str, snakefile: Path = ROOT / "Snakefile"
) -> subprocess.CompletedProcess[str]:
    """A finished run in `folder`."""
    return subprocess.run(
        snakemake_command(folder, *arguments, snakefile=snakefile),
        capture_output=True,
        text=True,
        cwd=ROOT,
    )


def planned_jobs(folder: Path, *arguments: str) -> dict[str, int]:
    """Jobs by rule that a dry run announces."""
    done = snakemake(folder, "--dry-run", "--quiet", "rules", *arguments)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines() + done.stderr.splitlines()
    counts = {}
    for line in lines[next((i for i, one in enumerate(lines) if one.startswith("job ")), -1) :]:
        words = line.split()
        if len(words) == 2 and words[1].isdigit():
            counts[words[0]] = int(words[1])
        if words[:1] == ["total"]:
            break
    return counts


def write_yaml(path: Path, values: object) -> str:
    """Write `values`; returns the path as text."""
    path.write_text(yaml.safe_dump(values))
    return str(path)
