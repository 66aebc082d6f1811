"""`ham train`: train one arm with one seed, resuming where an earlier attempt stopped."""

from __future__ import annotations

import argparse
from pathlib import Path


def register(subparsers: argparse._SubParsersAction) -> None:
    """Add the parser of `ham train`."""
    parser = subparsers.add_parser("train", help="train one arm with one seed (resumable)")
    from ham.job import add_job_arguments

    add_job_arguments(parser)
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoint and rows")
    parser.add_argument(
        "--state",
        type=Path,
        default=Path("results/.state"),
        help="root of the resumable states (default: %(default)s)",
    )
    parser.set_defaults(handler=run)


def run(arguments: argparse.Namespace) -> int:
    """Train, write checkpoint, manifest and rows."""
    from ham.job import open_job
    from ham.train.loop import Trainer

    with open_job(arguments, "train") as job:
        trainer = Trainer(job, arguments.data, arguments.state)
        writer = trainer.run(arguments.out)
        job.finish(writer, arguments.out / "train.rows.jsonl")
        trainer.discard_state()
    return 0
