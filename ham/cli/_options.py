"""Options that several commands have."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_continue_options(parser: argparse.ArgumentParser) -> None:
    """What becomes of the cells that FILE (`--rows`) already holds."""
    parser.add_argument(
        "--overwrite", action="store_true", help="forget what FILE holds instead of continuing it"
    )
    parser.add_argument(
        "--retry-errors", action="store_true", help="run cells again that FILE holds as failed"
    )


def add_evidence_argument(parser: argparse.ArgumentParser, what: str) -> None:
    """Rows that are not of the run and by which its claims are judged too."""
    parser.add_argument(
        "--evidence",
        type=Path,
        nargs="+",
        default=[],
        metavar="DIR",
        help=f"{what}; claims are judged by their rows too",
    )


def add_samples_argument(parser: argparse.ArgumentParser) -> None:
    """Whether the answers behind lm-eval's scores are published."""
    parser.add_argument(
        "--no-samples",
        dest="samples",
        action="store_false",
        help="leave out the answers behind lm-eval's scores, which take up to 8 MiB",
    )
