"""Bits per byte on held-out documents, loss by position, and a unigram model to compare with.

Windows never cross documents and their targets never overlap. All contexts of a configuration
score the same target tokens, cut into shorter or longer windows, so that they differ only in how
much the model may look back.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from ham.errors import ConfigError
from ham.evaluate.part import CORPUS_TASK, EVALUATION_SEED, Cell, Fields, Subject
from ham.evaluate.scoring import RoutingCount, RowScore
from ham.report.statistics import MIN_BOOTSTRAP_DOCUMENTS, bootstrap_interval

EXPERIMENT = "language_modelling"
_CHUNK = 1 << 22


@dataclass(frozen=True)
class Segment:
    """Consecutive tokens of one document; all but the first are to be predicted."""

    document: int
    tokens: np.ndarray

    def windows(self, context: int) -> list[np.ndarray]:
        """Rows of at most `context + 1` tokens that together predict the same tokens."""
        targets = len(self.tokens) - 1
        return [
            self.tokens[start : min(start + context, targets) + 1]
            for start in range(0, targets, context)
        ]


def draw_segments(
    documents: Iterable[np.ndarray], context: int, tokens: int, seed: int = EVALUATION_SEED
) -> list[Segment]:
    """Segments of `context` targets, drawn without replacement, about `tokens` targets in all.

    Raises:
        ConfigError: If no document is that long; the message names the longest.
    """
    found, longest = [], 0
    for index, document in enumerate(documents):
        longest = max(longest, len(document))
        for start in range(0, len(document) - context, context):
            found.append(Segment(index, document[start : start + context + 1]))
    if not found:
        raise ConfigError(
            f"a context of {context} tokens needs a held-out document of {context + 1} tokens; "
            f"the longest has {longest}"
        )
    count = min(len(found), max(1, tokens // context))
    picks = np.random.default_rng(seed).choice(len(found), size=count, replace=False)
    return [found[index] for index in sorted(picks)]


def cells(subject: Subject) -> list[Cell]:
    """One cell per context and one for the unigram model.

    A model with a tokenizer of its own has no unigram model: nobody counted its training text.
    """
    settings = subject.config.evaluate.language_modelling
    if settings is None:
        return []
    longest = max(settings.contexts)
    segments = draw_segments(subject.test.documents(), longest, settings.tokens)

    def cell(context: int) -> Cell:
        coordinates = {"task": CORPUS_TASK, "x_name": "context", "x_value": context}
        return Cell(
            f"bits per byte, context {context}",
            [{"experiment": EXPERIMENT, "metric": "bits_per_byte", **coordinates}],
            lambda: measure_context(subject, segments, context, settings.position_bins),
        )

    unigram = {"experiment": EXPERIMENT, "metric": "unigram_bits_per_byte", "task": CORPUS_TASK}
    parts = [cell(context) for context in settings.contexts]
    if not subject.reencodes:
        run = functools.partial(_unigram_row, subject, segments, unigram)
        parts.append(Cell("unigram model", [unigram], lambda: [run()]))
    return parts


def measure_context(
    subject: Subject, segments: Sequence[Segment], context: int, position_bins: int
) -> list[Fields]:
    """Rows of one context: bits per byte, loss by position, routed share by layer."""
    routing = RoutingCount()
    windows = [(segment, window) for segment in segments for window in segment.windows(context)]
    scores = subject.score([window for _, window in windows], routing)
    bits = np.array([score.nats.sum() for score in scores]) / math.log(2)
    sizes = np.array([subject.tokenizer.count_bytes(window[1:]) for _, window in windows])
    documents = np.array([segment.document for segment, _ in windows])
    common: Fields = {
        "experiment": EXPERIMENT,
        "task": CORPUS_TASK,
        "kv_fraction": subject.kv_fraction(routing, context),
    }
    by_context = {**common, "x_name": "context", "x_value": context}
    rows = [{"metric": "bits_per_byte", **by_context, **ratio_fields(bits, sizes, documents)}]
    for centre, mean, count in losses_by_position(scores, context, position_bins):
        rows.append(
            {
                **common,
                "metric": "loss_nats",
                "value": mean,
                "n": count,
                "x_name": "position",
                "x_value": centre,
                "labels": {"context": context},
            }
        )
    for layer, share in routing.per_layer().items():
        rows.append(
            {
                **by_context,
                "metric": "kv_fraction",
                "value": share,
                "n": len(windows),
                "labels": {"layer": layer},
            }
        )
    return rows


def ratio_fields(bits: np.ndarray, sizes: np.ndarray, documents: np.ndarray) -> Fields:
    """Total bits over total bytes with a bootstrap interval.

    Resamples documents, whose windows depend on each other; windows where fewer than eight
    documents were read; no interval where fewer than eight windows were.
    """
    value = float(bits.sum() / sizes.sum())
    unique, owner = np.unique(documents, return_inverse=True)
    if len(unique) >= MIN_BOOTSTRAP_DOCUMENTS:
        bits, sizes = np.bincount(owner, bits), np.bincount(owner, sizes)
    if len(bits) < MIN_BOOTSTRAP_DOCUMENTS:
        return {"value": value, "n": len(bits)}
    spread = bootstrap_interval(bits.tolist(), sizes.tolist(), seed=EVALUATION_SEED)
    return {
        "value": value,
        "n": spread.n,
        "low": spread.low,
        "high": spread.high,
        "interval": spread.interval,
    }


def losses_by_position(
    scores: Sequence[RowScore], context: int, bins: int
) -> list[tuple[float, float, int]]:
    """`(centre, mean nats per token, windows)` of equal bins over the positions 0..context - 1."""
    edges = np.linspace(0, context, min(bins, context) + 1).round().astype(int)
    rows = []
    for start, end in itertools.pairwise(edges):
        parts = [score.nats[start:end] for score in scores if len(score.nats) > start]
        if parts:
            rows.append(((start + end - 1) / 2, float(np.concatenate(parts).mean()), len(parts)))
    return rows


def unigram_log_probabilities(tokens: np.ndarray, vocabulary_size: int) -> np.ndarray:
    """Natural logarithms of add-one-smoothed token frequencies."""
    counts = np.ones(vocabulary_size, dtype=np.float64)
    for start in range(0, len(tokens), _CHUNK):
        counts += np.bincount(tokens[start : start + _CHUNK], minlength=vocabulary_size)
    return np.log(counts / counts.sum())


def _unigram_row(subject: Subject, segments: Sequence[Segment], coordinates: Fields) -> Fields:
    logs = unigram_log_probabilities(
        subject.shard("train").tokens, subject.tokenizer.vocabulary_size
    )
    bits = np.array([-logs[segment.tokens[1:]].sum() for segment in segments]) / math.log(2)
    sizes = np.array([subject.tokenizer.count_bytes(segment.tokens[1:]) for segment in segments])
    documents = np.array([segment.document for segment in segments])
    return {**coordinates, **ratio_fields(bits, sizes, documents)}
