"""`ham unpack`: lay out pieces of `ham pack`, to go on with the rest."""

from __future__ import annotations

import argparse
from pathlib import Path


def register(subparsers: argparse._SubParsersAction) -> None:
    """Add the parser of `ham unpack`."""
    parser = subparsers.add_parser("unpack", help="lay out a piece, to go on with the rest")
    parser.add_argument("pieces", type=Path, nargs="+", metavar="FILE", help="of parts, the first")
    parser.set_defaults(handler=run)


def run(arguments: argparse.Namespace) -> int:
    """Write the files of the pieces below the working directory."""
    from ham.pieces.archive import read_piece, unpack

    new = unpack([read_piece(path) for path in arguments.pieces])
    print(f"{len(new)} new files; run `ham prepare` before jobs go on")
    return 0
