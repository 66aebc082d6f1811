"""Bits per byte on held-out documents: in all, by position, by class of word; a unigram model.

Windows never cross documents and their targets never overlap. All contexts of a configuration
score the same target tokens, cut into shorter or longer windows, so that they differ only in how
much the model may look back. A context longer than the training context shows what lies beyond it.

Sums of bits and bytes by document are kept beside the rows: whoever compares two models pairs them.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ham.evaluate.part import CORPUS_TASK, EVALUATION_SEED, Cell, Fields, Subject
from ham.evaluate.scoring import RoutingCount, RowScore
from ham.evaluate.segments import Segment, draw_segments
from ham.evaluate.word_classes import TOKEN_CLASSES, Spelling, WordCounts, classify, count_words
from ham.report.statistics import MIN_BOOTSTRAP_DOCUMENTS, bootstrap_interval
from ham.train.shards import TokenShard
from ham.train.tokenizer import load_tokenizer

EXPERIMENT = "language_modelling"
_CHUNK = 1 << 22


def cells(subject: Subject) -> list[Cell]:
    """One cell per context and one for the unigram model.

    A model with a tokenizer of its own has no unigram model: nobody counted its training text.
    """
    settings = subject.config.evaluate.language_modelling
    if settings is None:
        return []
    longest = max(settings.contexts)
    segments = draw_segments(subject.test.documents(), longest, settings.tokens)

    @functools.cache
    def words() -> WordCounts | None:
        if settings.rare_share is None:
            return None
        return training_words(subject, settings.rare_share)

    def cell(context: int) -> Cell:
        coordinates = {"task": CORPUS_TASK, "x_name": "context", "x_value": context}
        return Cell(
            f"bits per byte, context {context}",
            [{"experiment": EXPERIMENT, "metric": "bits_per_byte", **coordinates}],
            lambda: measure_context(subject, segments, context, settings.position_bins, words()),
        )

    unigram = {"experiment": EXPERIMENT, "metric": "unigram_bits_per_byte", "task": CORPUS_TASK}
    parts = [cell(context) for context in settings.contexts]
    if not subject.reencodes:
        run = functools.partial(_unigram_row, subject, segments, unigram)
        parts.append(Cell("unigram model", [unigram], lambda: [run()]))
    return parts


def training_words(subject: Subject, rare_share: float) -> WordCounts:
    """Words of the training text of the experiment, the same for every model.

    Raises:
        MissingDataError, CorruptFileError: If the training shard cannot be read.
    """
    shard = TokenShard.open(subject.data / "train.tokens", verify=False)
    tokenizer = load_tokenizer(subject.config.data.tokenizer, subject.data)
    return WordCounts.of(count_words(shard, Spelling(tokenizer)), rare_share)


@dataclass(frozen=True)
class ScoredWindows:
    """Every window of one context with its scores.

    Attributes:
        documents: The document of each window.
        bits: By window, the bits of each target token.
        sizes: By window, the bytes of each target token.
        spelled: By window, the bytes themselves, of the token before the first target too.
    """

    documents: np.ndarray
    bits: list[np.ndarray]
    sizes: list[np.ndarray]
    spelled: list[list[bytes]]

    @classmethod
    def of(
        cls,
        subject: Subject,
        windows: Sequence[tuple[Segment, np.ndarray]],
        scores: Sequence[RowScore],
    ) -> ScoredWindows:
        """From windows and their scores."""
        spelling = Spelling(subject.tokenizer)
        spelled = [spelling(window) for _, window in windows]
        return cls(
            np.array([segment.document for segment, _ in windows]),
            [score.nats / math.log(2) for score in scores],
            [np.array([len(part) for part in parts[1:]]) for parts in spelled],
            spelled,
        )

    def totals(self, masks: Sequence[np.ndarray] | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Bits and bytes by window, of the target tokens that `masks` choose."""
        chosen = masks or [np.ones(len(bits), dtype=bool) for bits in self.bits]
        parts = zip(self.bits, self.sizes, chosen, strict=True)
        sums = [(bits[mask].sum(), sizes[mask].sum()) for bits, sizes, mask in parts]
        bits, sizes = np.array(sums, dtype=np.float64).T
        return bits, sizes


def measure_context(
    subject: Subject,
    segments: Sequence[Segment],
    context: int,
    position_bins: int,
    words: WordCounts | None = None,
) -> list[Fields]:
    """Rows of one context: bits per byte, by position and by class of word, routed share by layer.

    Sums by document are appended to `subject.documents`.
    """
    routing = RoutingCount()
    windows = [(segment, window) for segment in segments for window in segment.windows(context)]
    scores = subject.score([window for _, window in windows], routing)
    scored = ScoredWindows.of(subject, windows, scores)
    bits, sizes = scored.totals()
    _keep_documents(subject, context, "all", scored.documents, bits, sizes)
    common: Fields = {
        "experiment": EXPERIMENT,
        "task": CORPUS_TASK,
        "kv_fraction": subject.kv_fraction(routing, context),
    }
    by_context = {**common, "x_name": "context", "x_value": context}
    rows = [
        {"metric": "bits_per_byte", **by_context, **ratio_fields(bits, sizes, scored.documents)}
    ]
    by_position = {**common, "x_name": "position", "labels": {"context": context}}
    for centre, mean, count in losses_by_position(scores, context, position_bins):
        place = {**by_position, "x_value": centre}
        rows.append({**place, "metric": "loss_nats", "value": mean, "n": count})
    for centre, fields in bits_by_position(scored, context, position_bins):
        place = {**by_position, "x_value": centre}
        rows.append({**place, "metric": "position_bits_per_byte", **fields})
    if words is not None:
        rows += _class_rows(subject, scored, context, words, by_context)
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


def _class_rows(
    subject: Subject,
    scored: ScoredWindows,
    context: int,
    words: WordCounts,
    by_context: Fields,
) -> list[Fields]:
    """Bits per byte and bytes of each class of word; of an empty class only the bytes, none."""
    windows = [classify(spelled, words) for spelled in scored.spelled]
    rows = []
    for name in TOKEN_CLASSES:
        bits, sizes = scored.totals([masks[name][1:] for masks in windows])
        _keep_documents(subject, context, name, scored.documents, bits, sizes)
        place = {**by_context, "labels": {"token_class": name}}
        held = sizes > 0
        rows.append(
            {**place, "metric": "class_bytes", "value": float(sizes.sum()), "n": int(held.sum())}
        )
        if held.any():
            fields = ratio_fields(bits[held], sizes[held], scored.documents[held])
            rows.append({**place, "metric": "class_bits_per_byte", **fields})
    return rows


def _keep_documents(
    subject: Subject,
    context: int,
    token_class: str,
    documents: np.ndarray,
    bits: np.ndarray,
    sizes: np.ndarray,
) -> None:
    unique, owner = np.unique(documents, return_inverse=True)
    sums = zip(unique, np.bincount(owner, bits), np.bincount(owner, sizes), strict=True)
    for document, bit_count, byte_count in sums:
        subject.documents.append(
            {
                "experiment": EXPERIMENT,
                "task": CORPUS_TASK,
                "context": context,
                "token_class": token_class,
                "document": int(document),
                "bits": float(bit_count),
                "bytes": int(byte_count),
            }
        )


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
    return {**spread.row_fields(), "value": value}


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


def bits_by_position(scored: ScoredWindows, context: int, bins: int) -> list[tuple[float, Fields]]:
    """`(centre, fields of the bits per byte)` of the bins of `losses_by_position`."""
    edges = np.linspace(0, context, min(bins, context) + 1).round().astype(int)
    rows = []
    for start, end in itertools.pairwise(edges):
        masks = [np.zeros(len(bits), dtype=bool) for bits in scored.bits]
        for mask in masks:
            mask[start:end] = True
        bits, sizes = scored.totals(masks)
        held = sizes > 0
        if held.any():
            fields = ratio_fields(bits[held], sizes[held], scored.documents[held])
            rows.append(((start + end - 1) / 2, fields))
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
