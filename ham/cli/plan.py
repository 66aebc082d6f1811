"""`ham plan`: jobs, minutes, disk and parameters of a configuration, before anything runs."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from ham.device import visible_gpus


def register(subparsers: argparse._SubParsersAction) -> None:
    """Add the `plan` command."""
    parser = subparsers.add_parser("plan", help="print jobs, minutes, disk and sizes beforehand")
    parser.add_argument("config", type=Path, nargs="+", metavar="CONFIG")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument(
        "--cores", type=int, default=len(os.sched_getaffinity(0)), help="default: %(default)s"
    )
    parser.add_argument(
        "--gpus",
        type=int,
        default=max(1, len(visible_gpus())),
        help="wall time on so many, too (default: those that are there, %(default)s)",
    )
    parser.add_argument(
        "--note", action="store_true", help="write the estimate into CONFIG, one file, as comments"
    )
    parser.set_defaults(handler=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the plan."""
    from ham.config_files import load_config
    from ham.errors import ConfigError
    from ham.plan import Plan, format_plan
    from ham.plan_note import write_note

    config = load_config(arguments.config, arguments.overrides).check_registry()
    plan = Plan(config, cores=arguments.cores, gpus=arguments.gpus)
    if not arguments.note:
        print(format_plan(plan))
        return 0
    if len(arguments.config) > 1 or arguments.overrides:
        raise ConfigError("--note writes into one file: give one CONFIG and no --set")
    write_note(arguments.config[0], plan)
    return 0
