"""The HAM dial: one trained model, several cache sizes, no retraining.

For each target fraction the thresholds are set on the calibration split, layer by layer, frozen,
and the model is scored on the test split. The trained thresholds come back afterwards.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from ham.evaluate.language_modelling import Segment, draw_segments, ratio_fields
from ham.evaluate.part import CORPUS_TASK, EVALUATION_SEED, Cell, Fields, Subject
from ham.evaluate.scoring import RoutingCount
from ham.model.calibration import calibrate
from ham.model.decoder import DecoderLM

EXPERIMENT = "dial"


def cells(subject: Subject) -> list[Cell]:
    """One cell per target fraction; none for a model whose cache no threshold decides."""
    settings = subject.config.evaluate.dial
    if settings is None or not subject.model.routes:
        return []
    if all(controller.control == "none" for controller in subject.model.controllers):
        return []
    context = subject.config.data.context
    segments = draw_segments(subject.test.documents(), context, settings.tokens)
    batches = calibration_batches(subject)

    def cell(fraction: float) -> Cell:
        return Cell(
            f"dial at {fraction:g}",
            [coordinates(fraction)],
            lambda: [measure_fraction(subject, segments, batches, fraction)],
        )

    return [cell(fraction) for fraction in settings.fractions]


def coordinates(fraction: float) -> Fields:
    """Experiment, metric and coordinates of a row."""
    return {
        "experiment": EXPERIMENT,
        "metric": "bits_per_byte",
        "task": CORPUS_TASK,
        "x_name": "target_fraction",
        "x_value": fraction,
    }


def calibration_batches(subject: Subject) -> list[torch.Tensor]:
    """`tokens_BT` of the calibration split, as many as the configuration's training uses."""
    train = subject.config.train
    context = subject.config.data.context
    rows = train.calibration_batches * train.batch_size
    segments = draw_segments(
        subject.shard("calibration").documents(), context, rows * context, EVALUATION_SEED
    )
    tokens = np.stack([segment.tokens[:-1] for segment in segments]).astype(np.int64)
    return list(torch.from_numpy(tokens).to(subject.model.device).split(train.batch_size))


def measure_fraction(
    subject: Subject, segments: Sequence[Segment], batches: Sequence[torch.Tensor], fraction: float
) -> Fields:
    """The row of one target; `kv_fraction` is what was realised on the test split."""
    routing = RoutingCount()
    # All or nothing needs no scores: the threshold is infinite then.
    needed = batches if 0 < fraction < 1 else batches[:1]
    with thresholds_restored(subject.model):
        calibrate(subject.model, needed, fraction)
        scores = subject.score([segment.tokens for segment in segments], routing)
    bits = np.array([score.nats.sum() for score in scores]) / math.log(2)
    sizes = np.array([subject.tokenizer.count_bytes(segment.tokens[1:]) for segment in segments])
    documents = np.array([segment.document for segment in segments])
    return {
        **coordinates(fraction),
        **ratio_fields(bits, sizes, documents),
        "kv_fraction": routing.fraction(),
    }


@contextlib.contextmanager
def thresholds_restored(model: DecoderLM) -> Iterator[None]:
    """Put all persistent buffers, thresholds among them, back on leaving."""
    parameters = {name for name, _ in model.named_parameters()}
    saved = {
        name: tensor.clone()
        for name, tensor in model.state_dict().items()
        if name not in parameters
    }
    try:
        yield
    finally:
        model.load_state_dict(saved, strict=False)
