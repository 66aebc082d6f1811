"""`ham diff`: what changed from one run to another, beyond noise."""

from __future__ import annotations

import argparse
from pathlib import Path

FORMATS = ("table", "markdown", "json")


def register(subparsers: argparse._SubParsersAction) -> None:
    """Add the parser of `ham diff`."""
    parser = subparsers.add_parser(
        "diff",
        help="compare two runs: what made them, numbers beyond noise, failed and missing cells",
        description="Status 0: nothing differs beyond noise and threshold; 1: something does, or "
        "fails or is missing on one side; 2: the runs cannot be compared.",
    )
    parser.add_argument("one", type=Path, metavar="RUN_A", help="folder of rows, or a rows file")
    parser.add_argument("other", type=Path, metavar="RUN_B", help="changes are from A to B")
    parser.add_argument(
        "--threshold",
        type=float,
        default=0.02,
        metavar="SHARE",
        help="relative change that matters (default: %(default)s)",
    )
    parser.add_argument("--metric", nargs="+", default=[], metavar="NAME", help="only these")
    parser.add_argument("--model", nargs="+", default=[], metavar="NAME", help="only these")
    parser.add_argument(
        "--ignore-missing", action="store_true", help="rows that only one run has do not count"
    )
    parser.add_argument(
        "--strict", action="store_true", help="times without a spread count as they are"
    )
    parser.add_argument(
        "--limit", type=int, default=30, help="lines a table; 0 for all (default: %(default)s)"
    )
    parser.add_argument("--format", choices=FORMATS, default="table")
    parser.add_argument(
        "--json", dest="format", action="store_const", const="json", help="same as --format json"
    )
    parser.set_defaults(handler=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the comparison; status 1 if the runs differ."""
    import json

    from ham.compare.runs import compare, to_json
    from ham.compare.sides import load_sides
    from ham.errors import ConfigError

    if arguments.limit < 0:
        raise ConfigError(f"--limit must be at least 0, received {arguments.limit}")
    sides = load_sides(arguments.one, arguments.other, arguments.metric, arguments.model)
    found = compare(*sides, arguments.threshold)
    differs = found.differs(arguments.ignore_missing, arguments.strict)
    if arguments.format == "json":
        print(json.dumps(to_json(found, differs=differs), indent=2, ensure_ascii=False))
    else:
        # After the runs are known to be good: pandas takes half a second to load.
        from ham.compare.show import print_tables, to_markdown

        if arguments.format == "markdown":
            print(to_markdown(found, arguments.limit), end="")
        else:
            print_tables(found, arguments.limit)
    return 1 if differs else 0
