"""Bytes and decoding times along the dial: one trained model at several cache sizes.

As in `ham.measure.throughput`, a context of test text is read into an empty memory and single
tokens are timed after it. The thresholds are set as `ham.evaluate.dial` sets them, on fewer
batches, so rows are to be read at the fraction that they realised.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import torch

from ham.evaluate.threshold_dial import calibration_batches, coordinates, dialled, has_dial
from ham.measure.decoding import Reading, timed_decoder
from ham.measure.timing import time_calls
from ham.model.precision import precision_context

if TYPE_CHECKING:
    from ham.config import MeasureConfig
    from ham.evaluate.part import Fields, Subject
    from ham.report.rows import RowWriter

CALIBRATION_BATCHES = 4
METRICS = ("decode_ms", "kv_bytes", "cache_bytes_allocated")


def measure_dial(subject: Subject, writer: RowWriter) -> None:
    """Add rows of every target fraction at the longest measured context.

    A fraction that fails becomes error rows. Nothing is added for a model without a dial or a
    configuration that does not measure or dial.
    """
    dial, settings = subject.config.evaluate.dial, subject.config.measure
    if dial is None or settings is None or not has_dial(subject.model):
        return
    context = max(settings.contexts)
    batches = calibration_batches(subject, CALIBRATION_BATCHES)
    with precision_context(subject.model.device, subject.config.train.precision):
        for fraction in dial.fractions:
            try:
                with dialled(subject.model, batches, fraction):
                    rows = _measure(subject, settings, context, fraction)
            except RuntimeError as error:
                reason = " ".join(f"{type(error).__name__}: {error}".split())
                print(f"ham: warning: dial at {fraction:g} failed: {reason}", file=sys.stderr)
                rows = [
                    {**coordinates(fraction, metric), "value": None, "error": reason}
                    for metric in METRICS
                ]
            for row in rows:
                note = row.pop("note", None)
                labels = {"context": context} | ({} if note is None else {"note": note})
                writer.add(**{**row, "labels": labels})


@torch.inference_mode()
def _measure(
    subject: Subject, settings: MeasureConfig, context: int, fraction: float
) -> list[Fields]:
    model, batch = subject.model, settings.batch_size
    steps = settings.warmup + settings.decode_tokens
    text_T = torch.from_numpy(subject.test.tokens[: context + steps].astype("int64"))
    tokens_BT = text_T.to(model.device).repeat(batch, 1)
    held: dict[str, int] = {}
    kept: dict[str, float | None] = {}

    def read() -> Reading:
        state = model.init_state(batch)
        output = model.prefill(tokens_BT[:, :context], state, last_only=True)
        held.update(state.bytes_allocated())
        kept["kv_fraction"] = output.kv_fraction()
        return Reading(state, context, batch, output.kv_fraction_per_layer())

    decoder = timed_decoder(model, read)
    upcoming = iter(tokens_BT[:, context:].unbind(dim=1))
    timing = time_calls(
        lambda: decoder.step(next(upcoming)),
        model.device,
        settings.warmup,
        settings.decode_tokens,
    )
    decoder.finish()
    time = {"metric": "decode_ms", "value": timing.median_ms, **timing.interval()}
    time |= {"note": decoder.note, **decoder.fields()}
    size = {"kv_bytes": held.get("kv", 0), "cache_bytes_allocated": sum(held.values())}
    return [
        {**coordinates(fraction), **kept, **time},
        *(
            {**coordinates(fraction, metric), **kept, "value": count / batch}
            for metric, count in size.items()
        ),
    ]
