"""`ham evaluate`: everything that is asked of one trained arm."""

from __future__ import annotations

import argparse
from pathlib import Path


def register(subparsers: argparse._SubParsersAction) -> None:
    """Add the parser of `ham evaluate`."""
    parser = subparsers.add_parser(
        "evaluate", help="bits per byte, lm-eval tasks, needles, recall and the dial of an arm"
    )
    from ham.job import add_checkpoint_arguments

    add_checkpoint_arguments(parser)
    parser.set_defaults(handler=run)


def run(arguments: argparse.Namespace) -> int:
    """Evaluate; write rows, manifest, the answers to lm-eval's questions, sums by document."""
    import sys

    from ham.evaluate.part import open_subject
    from ham.evaluate.run import evaluate, expected_rows
    from ham.failure import read_failure
    from ham.files import write_jsonl
    from ham.job import open_job
    from ham.model.arm import read_checkpoint

    with open_job(arguments, "evaluate") as job:
        folder = read_checkpoint(job.arm, arguments.checkpoint)
        subject = job.attempt(
            lambda: open_subject(job.config, job.arm, arguments.data, folder, job.device),
            read_failure(folder),
        )
        failed = 0
        if subject is None:
            writer = job.error_writer(expected_rows(job.config, job.arm, arguments.data))
        else:
            subject.seed = job.seed
            writer = job.writer(subject.model)
            failed = evaluate(subject, writer, f"evaluate {job.arm.name} seed {job.seed}")
        write_jsonl(beside(arguments.rows, "samples"), subject.samples if subject else [])
        write_jsonl(beside(arguments.rows, "documents"), subject.documents if subject else [])
        job.finish(writer, arguments.rows)
    if failed:
        print(f"ham: warning: {failed} parts failed; their rows carry the error", file=sys.stderr)
    return 0


def beside(rows: Path, what: str) -> Path:
    """Where what is behind the rows stands: `x.rows.jsonl` has `x.samples.jsonl`."""
    stem = rows.name.removesuffix(".jsonl").removesuffix(".rows")
    return rows.with_name(f"{stem}.{what}.jsonl")
