"""Figures of all kernels under one version of Triton, stored where a diff can be read."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from ham.errors import CorruptFileError
from ham.files import read_json, write_text
from ham.kernels.gate.compare import Figures

FOLDER = Path(__file__).parent / "snapshots"
FORMAT = 1


class Entry(NamedTuple):
    """What a line of a snapshot is about; `kernel` has `#2` for a second launch in one case."""

    operation: str
    case: str
    target: str
    kernel: str


Snapshot = Mapping[Entry, Figures]


def snapshot_path(triton: str, folder: Path = FOLDER) -> Path:
    """Where the snapshot of a version of Triton lies."""
    return folder / f"triton-{triton}.json"


def read_snapshot(path: Path) -> dict[Entry, Figures] | None:
    """The snapshot, or None if there is none.

    Raises:
        CorruptFileError: If the file is not a snapshot.
    """
    if not path.exists():
        return None
    stored = read_json(path)
    if not isinstance(stored, dict) or stored.get("format") != FORMAT:
        raise CorruptFileError(f"{path} is not a snapshot of format {FORMAT}")
    return {
        Entry(operation, case, target, kernel): figures
        for operation, cases in stored["operations"].items()
        for case, targets in cases.items()
        for target, kernels in targets.items()
        for kernel, figures in kernels.items()
    }


def write_snapshot(path: Path, triton: str, snapshot: Snapshot) -> None:
    """Write sorted, one line per compiled kernel, atomically."""
    tree: dict = {}
    for entry, figures in sorted(snapshot.items()):
        node = tree
        for part in entry:
            node = node.setdefault(part, {})
        node.update(figures)
    head = {"format": FORMAT, "triton": triton}
    lines = [f"  {json.dumps(key)}: {json.dumps(value)},\n" for key, value in head.items()]
    body = "".join(_lines({"operations": tree}, depth=1))
    write_text(path, "{\n" + "".join(lines) + body + "}\n")


def _lines(tree: dict, depth: int) -> Iterator[str]:
    for number, (key, value) in enumerate(tree.items(), start=1):
        end = ",\n" if number < len(tree) else "\n"
        label = f"{'  ' * depth}{json.dumps(key, ensure_ascii=False)}: "
        if any(isinstance(each, dict) for each in value.values()):
            yield label + "{\n"
            yield from _lines(value, depth + 1)
            yield "  " * depth + "}" + end
        else:
            yield label + json.dumps(value, sort_keys=True) + end
