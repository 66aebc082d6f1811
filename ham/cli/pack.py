"""`ham pack`: what one machine has finished of an experiment, in one small file."""

from __future__ import annotations

import argparse
from pathlib import Path


def register(subparsers: argparse._SubParsersAction) -> None:
    """Add the parser of `ham pack`."""
    parser = subparsers.add_parser("pack", help="put what a run has finished into one small file")
    parser.add_argument("results", type=Path, help="folder of the run, results/runs/NAME")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="by custom *.tar.xz"
    )
    parser.add_argument(
        "--checkpoints",
        choices=("none", "needed", "all"),
        default="none",
        help="trained weights too: those that unfinished jobs will read, or all (default: none)",
    )
    parser.add_argument(
        "--part-mib", type=float, metavar="N", help="cut into FILE.001, ... of at most N MiB"
    )
    parser.set_defaults(handler=run)


def run(arguments: argparse.Namespace) -> int:
    """Write the piece and say what it holds."""
    from ham.pieces.archive import piece_of_run, write_piece

    piece = piece_of_run(arguments.results, arguments.checkpoints)
    written = write_piece(piece, arguments.out, arguments.part_mib)
    done = sum(piece.has(task) for task in piece.tasks.all)
    for path in written:
        print(f"{path}: {path.stat().st_size / (1 << 20):.2f} MiB")
    print(f"{done} of {len(piece.tasks.all)} jobs; configuration {piece.config_hash}")
    return 0
