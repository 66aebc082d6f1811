"""Options of the commands that continue a file of rows."""

from __future__ import annotations

import argparse


def add_continue_options(parser: argparse.ArgumentParser) -> None:
    """What becomes of the cells that FILE (`--rows`) already holds."""
    parser.add_argument(
        "--overwrite", action="store_true", help="forget what FILE holds instead of continuing it"
    )
    parser.add_argument(
        "--retry-errors", action="store_true", help="run cells again that FILE holds as failed"
    )
