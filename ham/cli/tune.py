"""`ham tune`: choose an arm's learning rate from its tuning runs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def register(subparsers: argparse._SubParsersAction) -> None:
    """Add the parser of `ham tune`."""
    parser = subparsers.add_parser(
        "tune", help="choose an arm's learning rate from runs of `ham train --learning-rate`"
    )
    parser.add_argument("config", nargs="+", help="YAML file; later ones overlay earlier ones")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=VALUE", dest="overrides")
    parser.add_argument("--arm", required=True, help="name of an arm in the configuration")
    parser.add_argument(
        "--rows", type=Path, nargs="+", required=True, metavar="FILE", help="of the tuning runs"
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON file for `ham train --tuned`")
    parser.add_argument(
        "--keep-going",
        action="store_true",
        help="if the arm failed at every rate, write that as the choice and end with status 0",
    )
    parser.set_defaults(handler=run)


def run(arguments: argparse.Namespace) -> int:
    """Write the choice and print it; warn where it lies at an end of the rates tried."""
    from ham.config_files import load_config
    from ham.errors import ConfigError
    from ham.report.rows import read_rows
    from ham.train.tuning import choose, tuning_of, write_choice, write_failed_choice

    config = load_config(arguments.config, arguments.overrides)
    arm = config.arm(arguments.arm).name
    rates = tuning_of(config).learning_rates
    try:
        choice = choose(read_rows(arguments.rows), arm, rates)
    except ConfigError as error:
        if not arguments.keep_going:
            raise
        print(f"ham: warning: {error}", file=sys.stderr)
        write_failed_choice(arguments.out, arm, str(error))
        return 0
    write_choice(arguments.out, choice)
    losses = ", ".join(
        f"{rate:g}: {'failed' if loss is None else f'{loss:.4f}'}"
        for rate, loss in choice.losses.items()
    )
    print(f"{arm}: learning rate {choice.learning_rate:g} (validation loss by rate: {losses})")
    if choice.edge is not None:
        print(
            f"ham: warning: {arm}: the best rate is the {choice.edge} tried; a better one may lie "
            "outside",
            file=sys.stderr,
        )
    return 0
