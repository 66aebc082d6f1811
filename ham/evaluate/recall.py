"""Multi-query associative recall: key-value pairs first, then every key is asked for.

After Zoology (arXiv 2312.04927), written as text. A query counts as right if greedy decoding
would give every token of its answer, with the true answers of earlier queries in the context.
"""

from __future__ import annotations

import numpy as np

from ham.evaluate.part import EVALUATION_SEED, Cell, Fields, Subject
from ham.evaluate.scoring import RoutingCount
from ham.report.statistics import wilson_interval

EXPERIMENT = "recall"
TASK = "pairs"


def cells(subject: Subject) -> list[Cell]:
    """One cell per number of pairs."""
    settings = subject.config.evaluate.recall
    if settings is None:
        return []

    def cell(pairs: int) -> Cell:
        return Cell(
            f"recall, {pairs} pairs",
            [coordinates(pairs)],
            lambda: [measure_pairs(subject, pairs, settings.samples)],
        )

    return [cell(pairs) for pairs in settings.pairs]


def coordinates(pairs: int) -> Fields:
    """Experiment, metric and coordinates of a row."""
    return {
        "experiment": EXPERIMENT,
        "metric": "accuracy",
        "task": TASK,
        "x_name": "pairs",
        "x_value": pairs,
    }


def measure_pairs(subject: Subject, pairs: int, samples: int) -> Fields:
    """The row of one number of pairs; n counts queries, one per pair and document."""
    from ham.train.recall_documents import pairs_document

    documents = [
        pairs_document(
            np.random.default_rng((EVALUATION_SEED, pairs, sample)), subject.tokenizer, pairs, pairs
        )
        for sample in range(samples)
    ]
    routing = RoutingCount()
    rows = [document.tokens for document in documents]
    scores = subject.score(rows, routing)
    hits = [
        score.span(start, end)[1]
        for document, score in zip(documents, scores, strict=True)
        for start, end in document.answers
    ]
    accuracy = wilson_interval(sum(hits), len(hits))
    return {
        **coordinates(pairs),
        "value": accuracy.value,
        "n": accuracy.n,
        "low": accuracy.low,
        "high": accuracy.high,
        "interval": accuracy.interval,
        "kv_fraction": subject.kv_fraction(routing, max(map(len, rows))),
    }
