"""`ham kernels train`: the loss curves of one training run with each provider."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ham.job import Job
    from ham.report.rows import Row
    from ham.train.compare_kernels import Curve


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
    from ham.errors import ConfigError
    from ham.fingerprint import fingerprint
    from ham.job import open_job
    from ham.kernels.speed.record import switches
    from ham.progress import ProgressReporter
    from ham.train.compare_kernels import Comparison, choose_variants
    from ham.workflow import mixer_files

    arguments.overrides = [*arguments.overrides, f"train.steps={arguments.steps}"]
    extra = {"environment": switches()}
    with open_job(arguments, "train", output=arguments.rows, extra=extra) as job:
        if job.arm.mixer is None:
            raise ConfigError(
                f"arm {job.arm.name!r} is {job.arm.architecture}, which calls no kernel of this "
                "project; legal: an arm with a mixer"
            )
        files = mixer_files()
        own = [files[name] for name in job.arm.mixers]
        code = fingerprint("ham.train.compare_kernels", *own)
        job = dataclasses.replace(job, code_fingerprint=code)
        names = choose_variants(arguments.variants, job.device)
        curves: list[Curve] = []
        with ProgressReporter("kernels train", arguments.steps * len(names)) as progress:
            for index, name in enumerate(names):
                comparison = Comparison(
                    job, arguments.data, lambda name=name: progress.advance(note=name)
                )
                curves.append(comparison.run(name))
                # Written after each variant: should the next one end the process, this one is kept.
                rows = _write_rows(job, curves, arguments.rows)
                undone = arguments.steps * (index + 1) - progress.done
                if undone:
                    progress.advance(undone, note=f"{name} failed")
    _print_result(rows)
    failed = [curve for curve in curves if curve.error is not None]
    for curve in failed:
        print(f"ham: variant {curve.variant} failed: {curve.error}", file=sys.stderr)
    return 1 if failed else 0


def _write_rows(job: Job, curves: Sequence[Curve], path: Path) -> list[Row]:
    """Write the rows of the variants so far, with the manifest."""
    from ham.report.manifest import device_name
    from ham.report.rows import RowWriter
    from ham.train.compare_kernels import add_rows

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
    job.finish(writer, path)
    return writer.rows


def _print_result(rows: Sequence[Row]) -> None:
    from ham.report.kernel_training import comparison_sentences, training_runs, training_table
    from ham.report.table_format import markdown_grid

    for run in training_runs(rows):
        print("\n".join([*markdown_grid(training_table(run)), "", *comparison_sentences(run)]))
