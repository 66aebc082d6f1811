"""Needle in a haystack: a fact hidden in held-out text, asked for at the end.

After RULER's single-needle task (arXiv 2404.06654), scored without sampling: the answer counts as
right if greedy decoding would give every one of its tokens. For a model that routes, the rows also
say which share of the needle's own tokens entered the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ham.errors import ConfigError
from ham.evaluate.part import EVALUATION_SEED, Cell, Fields, Subject
from ham.evaluate.scoring import RoutingCount, RowScore
from ham.report.statistics import wilson_interval

if TYPE_CHECKING:
    from ham.train.recall_documents import RecallDocument
    from ham.train.tokenizer import Tokenizer

EXPERIMENT = "needle"
TASK = "needle_single"
_DEPTH_STEPS = 10_000


def cells(subject: Subject) -> list[Cell]:
    """One cell per length; it holds all depths, as its rows are equally long.

    Raises:
        ConfigError: If a length is too short to hold question, answer and needle.
    """
    from ham.train.recall_documents import needle_minimum_length

    settings = subject.config.evaluate.needle
    if settings is None:
        return []
    minimum = needle_minimum_length(subject.tokenizer)
    too_short = [length for length in settings.lengths if length < minimum]
    if too_short:
        raise ConfigError(
            f"evaluate.needle.lengths holds {min(too_short)}; with tokenizer "
            f"{subject.tokenizer.name!r} a needle document has at least {minimum} tokens"
        )

    def cell(length: int) -> Cell:
        return Cell(
            f"needle, {length} tokens",
            [
                {"metric": metric, **coordinates(length, depth)}
                for depth in settings.depths
                for metric in ("accuracy", "answer_loss_nats")
            ],
            lambda: measure_length(subject, length, settings.depths, settings.samples),
        )

    return [cell(length) for length in settings.lengths]


def coordinates(length: int, depth: float) -> Fields:
    """Where a needle stands in the plots."""
    return {
        "experiment": EXPERIMENT,
        "task": TASK,
        "x_name": "length",
        "x_value": length,
        "labels": {"depth": depth},
    }


def needle_documents(
    tokenizer: Tokenizer, haystack: Sequence[int], length: int, depth: float, samples: int
) -> list[RecallDocument]:
    """The same documents for every model: the seed depends on length, depth and sample alone."""
    from ham.train.recall_documents import needle_document

    key = (EVALUATION_SEED, length, round(depth * _DEPTH_STEPS))
    return [
        needle_document(np.random.default_rng((*key, sample)), tokenizer, haystack, length, depth)
        for sample in range(samples)
    ]


def measure_length(
    subject: Subject, length: int, depths: Sequence[float], samples: int
) -> list[Fields]:
    """Rows of all depths at one length."""
    haystack = subject.test.tokens
    documents = {
        depth: needle_documents(subject.tokenizer, haystack, length, depth, samples)
        for depth in depths
    }
    routing = RoutingCount()
    scores = subject.score(
        [document.tokens for group in documents.values() for document in group],
        routing,
        keep_routed=subject.model.routes,
    )
    fraction = subject.kv_fraction(routing, length)
    rows: list[Fields] = []
    for index, (depth, group) in enumerate(documents.items()):
        own = scores[index * samples : (index + 1) * samples]
        common = {**coordinates(length, depth), "kv_fraction": fraction}
        rows += _answer_rows(group, own, common)
        if subject.model.routes:
            rows += _kept_rows(group, own, common, list(routing.routed))
    return rows


def _answer_rows(
    documents: Sequence[RecallDocument], scores: Sequence[RowScore], common: Fields
) -> list[Fields]:
    hits, losses = 0, []
    for document, score in zip(documents, scores, strict=True):
        answers = [score.span(start, end) for start, end in document.answers]
        hits += all(greedy for _, greedy in answers)
        tokens = sum(end - start for start, end in document.answers)
        losses.append(-sum(log_likelihood for log_likelihood, _ in answers) / tokens)
    accuracy = wilson_interval(hits, len(documents))
    return [
        {
            **common,
            "metric": "accuracy",
            "value": accuracy.value,
            "n": accuracy.n,
            "low": accuracy.low,
            "high": accuracy.high,
            "interval": accuracy.interval,
        },
        {
            **common,
            "metric": "answer_loss_nats",
            "value": float(np.mean(losses)),
            "n": len(documents),
        },
    ]


def _kept_rows(
    documents: Sequence[RecallDocument],
    scores: Sequence[RowScore],
    common: Fields,
    layers: Sequence[int],
) -> list[Fields]:
    """Share of the needle's tokens that were routed: mean over layers, then each layer.

    Layers have a metric of their own, so that whoever looks for `kept_fraction` finds one row.
    """
    shares = []
    for document, score in zip(documents, scores, strict=True):
        assert document.needle is not None and score.routed is not None
        start, end = document.needle
        shares.append(score.routed[:, start:end].mean(axis=1))
    per_layer = np.mean(shares, axis=0)
    row = {**common, "metric": "kept_fraction", "n": len(documents)}
    rows = [{**row, "value": float(per_layer.mean())}]
    for layer, share in zip(layers, per_layer, strict=True):
        labels = {**common["labels"], "layer": layer}
        rows.append(
            {**row, "metric": "kept_fraction_layer", "value": float(share), "labels": labels}
        )
    return rows
