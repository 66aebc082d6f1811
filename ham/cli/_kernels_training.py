"""`ham kernels train`: the loss curves of one training run with each provider."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path


def register(actions: argparse._SubParsersAction) -> None:
    """Add the parser of `ham kernels train`."""
    from ham.job import add_job_arguments

    parser = actions.add_parser(
        "train", help="train an arm with each provider and compare the loss curves"
    )
    add_job_arguments(parser)
    parser.add_argument("--steps", type=int, default=300, help="optimiser steps (default: 300)")
    parser.add_argument("--rows", type=Path, required=True, help="JSON-lines file to write")
    parser.add_argument(
        "--variants",
        nargs="+",
        metavar="NAME",
        help="torch, torch-other-rounding, triton, reference (default: the first two, and triton "
        "or, where that cannot run, reference)",
    )
    parser.set_defaults(handler=train)


def train(arguments: argparse.Namespace) -> int:
    """Train every variant, write rows, print their table; status 1 if a variant failed."""
    from ham.fingerprint import fingerprint
    from ham.job import open_job
    from ham.kernels.speed.record import switches
    from ham.progress import ProgressReporter
    from ham.report.manifest import device_name
    from ham.report.rows import RowWriter
    from ham.train.compare_kernels import Comparison, add_rows, choose_variants
    from ham.workflow import mixer_files

    arguments.overrides = [*arguments.overrides, f"train.steps={arguments.steps}"]
    extra = {"environment": switches()}
    with open_job(arguments, "train", output=arguments.rows, extra=extra) as job:
        code = fingerprint("ham.train.compare_kernels", mixer_files()[job.arm.mixer])
        job = dataclasses.replace(job, code_fingerprint=code)
        names = choose_variants(arguments.variants, job.device)
        curves = []
        with ProgressReporter("kernels train", arguments.steps * len(names)) as progress:
            for index, name in enumerate(names):
                comparison = Comparison(
                    job, arguments.data, lambda name=name: progress.advance(note=name)
                )
                curves.append(comparison.run(name))
                undone = arguments.steps * (index + 1) - progress.done
                if undone:
                    progress.advance(undone, note=f"{name} failed")
        writer = RowWriter(
            model=job.arm.name,
            mixer=job.arm.mixer,
            seed=job.seed,
            device=device_name(job.device.type, job.manifest["gpus"]),
            launch_mode="compiled" if job.config.train.compile else "eager",
            config_hash=job.config_hash,
            code_fingerprint=job.code_fingerprint,
            manifest_id=job.manifest["manifest_id"],
        )
        add_rows(writer, curves)
        job.finish(writer, arguments.rows)
    _print_result(writer.rows)
    failed = [curve for curve in curves if curve.error is not None]
    for curve in failed:
        print(f"ham: variant {curve.variant} failed: {curve.error}", file=sys.stderr)
    return 1 if failed else 0


def _print_result(rows: list) -> None:
    from ham.report.kernel_training import comparison_sentences, training_runs, training_table
    from ham.report.table_format import markdown_grid

    for run in training_runs(rows):
        print("\n".join([*markdown_grid(training_table(run)), "", *comparison_sentences(run)]))
