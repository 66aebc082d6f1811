"""`ham verify`: are published tables and figures what their raw rows give?"""

from __future__ import annotations

import argparse
from pathlib import Path


def register(subparsers: argparse._SubParsersAction) -> None:
    """Add the parser of `ham verify`."""
    parser = subparsers.add_parser(
        "verify", help="make published tables and figures again and compare them byte by byte"
    )
    parser.add_argument(
        "folders", nargs="*", type=Path, metavar="FOLDER", help="results/published/NAME"
    )
    parser.add_argument("--all", action="store_true", help="every folder of results/published")
    parser.set_defaults(handler=run)


def run(arguments: argparse.Namespace) -> int:
    """Print what was found; status 1 if anything differs."""
    from ham.errors import ConfigError
    from ham.report.verify import published_name, verify_all, verify_published

    if arguments.all == bool(arguments.folders):
        raise ConfigError("name folders of results/published, or --all of them")
    if arguments.all:
        found = verify_all()
    else:
        places = [published_name(folder) for folder in arguments.folders]
        found = [verify_published(name, root) for root, name in places]
    for result in found:
        verdict = "DIFFERS" if result.faults else "verified"
        print(
            f"{result.name}: {verdict}; {result.rows} rows, {result.tables} tables and pages and "
            f"{result.figures} figures made again"
        )
        for line in (*result.faults, *(f"note: {note}" for note in result.notes)):
            print(f"  {line}")
    if not found:
        raise ConfigError("there is no results/published here; run this in a checkout")
    return 1 if any(result.faults for result in found) else 0
