"""`ham measure`: speed and memory of one trained arm against context length."""

from __future__ import annotations

import argparse
import os


def register(subparsers: argparse._SubParsersAction) -> None:
    """Add the parser of `ham measure`."""
    parser = subparsers.add_parser("measure", help="speed and memory of a trained arm")
    from ham.job import add_checkpoint_arguments

    add_checkpoint_arguments(parser)
    parser.set_defaults(handler=run)


def run(arguments: argparse.Namespace) -> int:
    """Measure and write rows with their manifest."""
    # The profiler that counts memory on a CPU otherwise prints a line at every start and stop.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")

    import numpy as np
    import torch

    from ham.errors import ConfigError
    from ham.evaluate.part import open_subject
    from ham.failure import read_failure
    from ham.job import open_job
    from ham.measure.dial import measure_dial
    from ham.measure.throughput import Measurement, expected_rows
    from ham.model.arm import read_checkpoint
    from ham.progress import ProgressReporter
    from ham.report.manifest import device_name

    with open_job(arguments, "measure") as job:
        settings = job.config.measure
        if settings is None:
            raise ConfigError("the configuration has no `measure` section; nothing to measure")
        folder = read_checkpoint(job.arm, arguments.checkpoint)
        subject = job.attempt(
            lambda: open_subject(job.config, job.arm, arguments.data, folder, job.device),
            read_failure(folder),
        )
        if subject is None:
            missing = expected_rows(settings, job.arm.trained)
            job.finish(job.error_writer(missing), arguments.rows)
            return 0
        model = subject.model
        tokens_T = torch.from_numpy(np.array(subject.test.tokens[: model.config.max_positions]))
        writer = job.writer(model)
        name = device_name(job.device.type, job.manifest["gpus"])
        measurement = Measurement(
            model,
            tokens_T.long().to(job.device),
            settings,
            job.config.train,
            writer,
            name,
            trains=job.arm.trained,
        )
        parts = len(measurement.parts) * len(settings.contexts) + 1
        with ProgressReporter(f"measure {job.arm.name}", parts) as progress:
            measurement.run(lambda note: progress.advance(note=note))
            measure_dial(subject, writer)
        job.finish(writer, arguments.rows)
    return 0
