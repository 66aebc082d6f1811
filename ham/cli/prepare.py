"""`ham prepare`: write the token shards and the tokenizer of a configuration."""

from __future__ import annotations

import argparse
from pathlib import Path


def register(subparsers: argparse._SubParsersAction) -> None:
    """Add the parser of `ham prepare`."""
    parser = subparsers.add_parser("prepare", help="write token shards and tokenizer")
    parser.add_argument(
        "config", type=Path, nargs="+", metavar="CONFIG", help="YAML; a later file overlays"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="data folder")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.set_defaults(handler=run)


def run(arguments: argparse.Namespace) -> int:
    """Prepare the data and print the size of every split."""
    from ham.config_files import load_config
    from ham.files import read_json
    from ham.train.prepare import SUMMARY_FILE, prepare_data

    config = load_config(arguments.config, arguments.overrides)
    prepare_data(config.data, arguments.out)
    summary = read_json(arguments.out / SUMMARY_FILE)
    for split, header in summary["splits"].items():
        print(
            f"{split:12} {header['documents']:6} documents {header['tokens'] / 1e6:8.3f} M tokens "
            f"{header['bytes'] / 1e6:8.3f} MB"
        )
    return 0
