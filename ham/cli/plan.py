"""`ham plan`: jobs, minutes, disk and parameters of a configuration, before anything runs."""

from __future__ import annotations

import argparse
import os
from pathlib import Path


def register(subparsers: argparse._SubParsersAction) -> None:
    """Add the `plan` command."""
    parser = subparsers.add_parser("plan", help="print jobs, minutes, disk and sizes beforehand")
    parser.add_argument("config", type=Path, nargs="+", metavar="CONFIG")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument(
        "--cores", type=int, default=len(os.sched_getaffinity(0)), help="default: %(default)s"
    )
    parser.set_defaults(handler=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the plan."""
    from ham.config_files import load_config
    from ham.plan import Plan, format_plan

    config = load_config(arguments.config, arguments.overrides).check_registry()
    print(format_plan(Plan(config, cores=arguments.cores)))
    return 0
