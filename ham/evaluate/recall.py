"""Multi-query associative recall: key-value pairs first, then every key is asked for.

After Zoology (arXiv 2312.04927), written as text. A query counts as right if greedy decoding
would give every token of its answer, with the true answers of earlier queries in the context.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ham.errors import ConfigError
from ham.evaluate.part import EVALUATION_SEED, Cell, Fields, Subject
from ham.evaluate.scoring import RoutingCount
from ham.report.statistics import clustered_wilson_interval

if TYPE_CHECKING:
    from ham.train.recall_documents import RecallDocument

EXPERIMENT = "recall"
TASK = "pairs"


def cells(subject: Subject) -> list[Cell]:
    """One cell per number of pairs.

    Raises:
        ConfigError: If that many pairs do not fit into the model's position range.
    """
    settings = subject.config.evaluate.recall
    if settings is None:
        return []
    limit = subject.model.config.max_positions
    # A model from elsewhere whose range ends too early fails in its cell.
    for pairs in [] if subject.foreign else settings.pairs:
        (document,) = recall_documents(subject, pairs, 1)
        if len(document.tokens) > limit + 1:
            raise ConfigError(
                f"evaluate.recall.pairs holds {pairs}, which takes {len(document.tokens)} tokens; "
                f"the model's max_positions is {limit}"
            )

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


def recall_documents(subject: Subject, pairs: int, samples: int) -> list[RecallDocument]:
    """The same documents for every model; every key is asked for once."""
    from ham.train.recall_documents import pairs_document

    return [
        pairs_document(
            np.random.default_rng((EVALUATION_SEED, pairs, sample)), subject.tokenizer, pairs, pairs
        )
        for sample in range(samples)
    ]


def measure_pairs(subject: Subject, pairs: int, samples: int) -> Fields:
    """The row of one number of pairs; n counts queries, one per pair and document.

    The queries of a document share its interval: documents are what was drawn.
    """
    documents = recall_documents(subject, pairs, samples)
    routing = RoutingCount()
    rows = [document.tokens for document in documents]
    scores = subject.score(rows, routing)
    right = [
        sum(score.span(start, end)[1] for start, end in document.answers)
        for document, score in zip(documents, scores, strict=True)
    ]
    accuracy = clustered_wilson_interval(right, [pairs] * samples)
    return {
        **coordinates(pairs),
        **accuracy.row_fields(),
        "kv_fraction": subject.kv_fraction(routing, max(map(len, rows))),
    }
