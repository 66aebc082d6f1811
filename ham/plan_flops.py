"""FLOPs of one arm and seed by stage, from the mixer's own cost methods; see `ham.plan`."""

from __future__ import annotations

import math

from ham.config import Config, DialConfig, TrainConfig
from ham.measure.cost import TRAINING_PASSES
from ham.model.language_model import LanguageModel
from ham.ruler.tasks import ruler_task

# Scores, then the layer's output with the threshold they gave.
CALIBRATION_PASSES = 2
ASSUMED_TASK_DOCUMENTS = 1000


def train_flops(config: Config, model: LanguageModel, fraction: float, train: TrainConfig) -> float:
    """Of a training run with these settings: steps, validation, calibration."""
    forward = model.forward_flops(config.data.context, fraction)
    validations = math.ceil(train.steps / train.validation_every) * train.validation_batches
    sequences = TRAINING_PASSES * train.steps + validations
    if model.routes:
        # Thresholds are set at the freeze and at the end; then validation shares are counted.
        sequences += 2 * CALIBRATION_PASSES * train.calibration_batches
        sequences += max(train.validation_batches, train.calibration_batches)
    return forward * train.batch_size * sequences


def evaluate_flops(config: Config, model: LanguageModel, fraction: float) -> float:
    """Of every part of an evaluation."""
    evaluate, context = config.evaluate, config.data.context
    sequences: list[tuple[int, float]] = []
    if evaluate.language_modelling:
        part = evaluate.language_modelling
        sequences += [(length, part.tokens / length) for length in part.contexts]
    if evaluate.lm_eval:
        documents = evaluate.lm_eval.limit or ASSUMED_TASK_DOCUMENTS
        documents *= 2 if evaluate.lm_eval.untrained else 1
        sequences.append((context, len(evaluate.lm_eval.tasks) * documents))
    if evaluate.needle:
        part = evaluate.needle
        count = len(part.depths) * part.samples * (2 if part.generate else 1)
        for task in part.tasks:
            sequences += [(length, count) for length in part.lengths_of(task)]
    if evaluate.recall:
        sequences.append((context, len(evaluate.recall.pairs) * evaluate.recall.samples))
    if evaluate.dial and model.routes:
        sequences += _dial_sequences(config, evaluate.dial)
    reading = sum(count * model.forward_flops(length, fraction) for length, count in sequences)
    return reading + _generation_flops(config, model, fraction)


def _dial_sequences(config: Config, dial: DialConfig) -> list[tuple[int, float]]:
    """`(tokens, how many)` that are read at all fractions together."""
    evaluate, context = config.evaluate, config.data.context
    batches = CALIBRATION_PASSES * config.train.calibration_batches
    count = dial.tokens / context + batches * config.train.batch_size
    if evaluate.recall:
        count += len(evaluate.recall.pairs) * dial.samples
    sequences = [(context, len(dial.fractions) * count)]
    if evaluate.needle:
        part = evaluate.needle
        count = len(part.depths) * dial.samples * len(dial.fractions)
        for task in part.tasks:
            sequences += [(length, count) for length in part.lengths_of(task)]
    return sequences


def _generation_flops(config: Config, model: LanguageModel, fraction: float) -> float:
    """New tokens of needle answers; their prompts count as reading."""
    part = config.evaluate.needle
    if part is None or not part.generate:
        return 0.0
    count = len(part.depths) * part.samples
    return sum(
        count * ruler_task(task).new_tokens * model.decode_flops(length, fraction)
        for task in part.tasks
        for length in part.lengths_of(task)
    )


def measure_flops(config: Config, model: LanguageModel, fraction: float, trained: bool) -> float:
    """Of the timed passes and steps; an arm that is not trained has no training step."""
    measure = config.measure
    if measure is None:
        return 0.0
    per_repeat = 1 + (TRAINING_PASSES if trained else 0)
    passes = (measure.repeats + measure.warmup) * per_repeat + 1
    total = 0.0
    for context in measure.contexts:
        total += passes * model.forward_flops(context, fraction)
        total += measure.decode_tokens * model.decode_flops(context, fraction)
    return total * measure.batch_size
