"""`ham gc`: remove training state that no run will resume from."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NamedTuple


class StateFolder(NamedTuple):
    """The resumable state of one training run.

    Attributes:
        arm, seed, config_hash: What it belongs to, read from the folder's name.
        finished: Whether a run of the same arm, seed and configuration wrote its results.
    """

    path: Path
    arm: str
    seed: int
    config_hash: str
    bytes: int
    finished: bool


def register(subparsers: argparse._SubParsersAction) -> None:
    """Add the `gc` command."""
    parser = subparsers.add_parser("gc", help="list and remove training state of finished runs")
    parser.add_argument("--results", type=Path, default=Path("results"), metavar="DIR")
    parser.add_argument("--all", action="store_true", help="state of unfinished runs too")
    parser.add_argument("--yes", action="store_true", help="remove; without it only list")
    parser.set_defaults(handler=run)


def run(arguments: argparse.Namespace) -> int:
    """List the state folders and, with `--yes`, remove those that are not needed."""
    folders = state_folders(arguments.results)
    removable = [folder for folder in folders if folder.finished or arguments.all]
    for folder in folders:
        verdict = "finished" if folder.finished else "unfinished, can be resumed"
        print(f"{folder.bytes / 1e6:10.1f} MB  {folder.path}  ({verdict})")
    total = sum(folder.bytes for folder in removable) / 1e6
    if not removable:
        print("nothing to remove")
    elif not arguments.yes:
        print(f"{len(removable)} to remove, {total:.1f} MB; repeat with --yes to remove")
    else:
        _remove(removable)
        print(f"removed {len(removable)}, {total:.1f} MB")
    return 0


def state_folders(results: Path) -> list[StateFolder]:
    """All training states below `results/.state`, sorted by name."""
    finished = _finished_runs(results)
    found = []
    for path in sorted((results / ".state").glob("*-seed*-*-*")):
        arm, seed_text, config_hash, _ = path.name.rsplit("-", 3)
        seed = int(seed_text.removeprefix("seed"))
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        done = (arm, seed, config_hash) in finished
        found.append(StateFolder(path, arm, seed, config_hash, size, done))
    return found


def _finished_runs(results: Path) -> set[tuple[str, int, str]]:
    """Arm, seed and configuration hash of every run whose training rows are written."""
    from ham.errors import CorruptFileError
    from ham.report.rows import read_rows

    found = set()
    for path in sorted((results / "runs").glob("*/models/*/seed*/train.rows.jsonl")):
        try:
            rows = read_rows(path)
        except CorruptFileError as error:
            print(f"ham gc: skipped: {error}", file=sys.stderr)
            continue
        if rows and rows[0].seed is not None:
            found.add((rows[0].model, rows[0].seed, rows[0].config_hash))
    return found


def _remove(folders: list[StateFolder]) -> None:
    import shutil

    for folder in folders:
        shutil.rmtree(folder.path)
