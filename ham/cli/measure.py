"""`ham measure`: speed and memory of one trained arm against context length."""

from __future__ import annotations

import argparse
import os
from pathlib import Path


def register(subparsers: argparse._SubParsersAction) -> None:
    """Add the parser of `ham measure`."""
    parser = subparsers.add_parser("measure", help="speed and memory of a trained arm")
    from ham.job import add_job_arguments

    add_job_arguments(parser)
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder of the model")
    parser.add_argument("--rows", type=Path, required=True, help="JSON-lines file to write")
    parser.set_defaults(handler=run)


def run(arguments: argparse.Namespace) -> int:
    """Measure and write rows with their manifest."""
    # The profiler that counts memory on a CPU otherwise prints a line at every start and stop.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")

    import numpy as np
    import torch

    from ham.errors import ConfigError
    from ham.evaluate.part import Subject
    from ham.failure import read_failure
    from ham.job import open_job
    from ham.measure.dial import measure_dial
    from ham.measure.throughput import Measurement, expected_rows
    from ham.model.arm import load_arm
    from ham.progress import ProgressReporter
    from ham.report.manifest import device_name
    from ham.train.shards import TokenShard
    from ham.train.tokenizer import load_tokenizer

    with open_job(arguments, "measure") as job:
        settings = job.config.measure
        if settings is None:
            raise ConfigError("the configuration has no `measure` section; nothing to measure")
        model = job.attempt(
            lambda: load_arm(job.config, job.arm, arguments.checkpoint, job.device),
            read_failure(arguments.checkpoint),
        )
        if model is None:
            job.finish(job.error_writer(expected_rows(settings)), arguments.rows)
            return 0
        shard = TokenShard.open(arguments.data / "test.tokens")
        tokens_T = torch.from_numpy(np.array(shard.tokens[: model.config.max_positions]))
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
            tokenizer = load_tokenizer(model.config.tokenizer, arguments.data)
            measure_dial(Subject(job.config, model, tokenizer, arguments.data), writer)
        job.finish(writer, arguments.rows)
    return 0
