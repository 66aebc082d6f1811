"""Moving the thresholds of a trained model to a target fraction, and back.

`ham.evaluate.dial` and `ham.measure.dial` share it, so that neither stage runs again when only the
other one changes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch

from ham.evaluate.part import CORPUS_TASK, Fields, Subject
from ham.model.calibration import calibrate
from ham.model.decoder import DecoderLM
from ham.model.language_model import LanguageModel

EXPERIMENT = "dial"


def has_dial(model: LanguageModel) -> bool:
    """Whether a threshold decides what a model keeps."""
    return model.routes and any(one.control != "none" for one in model.controllers)


def coordinates(fraction: float, metric: str = "bits_per_byte") -> Fields:
    """Experiment, metric and coordinates of a row."""
    return {
        "experiment": EXPERIMENT,
        "metric": metric,
        "task": CORPUS_TASK,
        "x_name": "target_fraction",
        "x_value": fraction,
    }


def calibration_batches(subject: Subject, limit: int | None = None) -> list[torch.Tensor]:
    """`tokens_BT` spread over the calibration split, as many as the configuration's training uses.

    Args:
        subject: The model and its data.
        limit: At most so many batches.
    """
    train = subject.config.train
    context = subject.config.data.context
    rows = min(limit or train.calibration_batches, train.calibration_batches) * train.batch_size
    windows_NT = torch.from_numpy(subject.shard("calibration").even_windows(context, rows))
    return list(windows_NT.to(subject.model.device).split(train.batch_size))


@contextlib.contextmanager
def dialled(model: DecoderLM, batches: Sequence[torch.Tensor], fraction: float) -> Iterator[None]:
    """The model with its thresholds at a target fraction; the earlier ones return on leaving."""
    # All or nothing needs no scores: the threshold is infinite then.
    needed = batches if 0 < fraction < 1 else batches[:1]
    with thresholds_restored(model):
        calibrate(model, needed, fraction)
        yield


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
