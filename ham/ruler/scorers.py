"""RULER's scorers of generated text, as in its `scripts/eval/synthetic/constants.py`.

All nine retrieval tasks are scored by `string_match_all`; `string_match_part` is that of RULER's
question answering and says here whether any of several answers was found. RULER prints percent,
these are shares in 0..1.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_NOT_PRINTABLE = re.compile(r"[\x00-\x1f]")


def clean_prediction(text: str) -> str:
    """A generated text as RULER reads it: stripped, control characters as line breaks."""
    return _NOT_PRINTABLE.sub("\n", text.strip()).strip()


def found(prediction: str, reference: str) -> bool:
    """Whether an answer occurs in a generated text, case ignored."""
    return reference.lower() in prediction.lower()


def string_match_all(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Share of the answers that occur, averaged over samples.

    Raises:
        ValueError: If there are no samples or the two differ in length.
    """
    return _mean(
        [
            sum(found(prediction, answer) for answer in answers) / len(answers)
            for prediction, answers in zip(predictions, references, strict=True)
        ]
    )


def string_match_part(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Share of samples of which at least one answer occurs.

    Raises:
        ValueError: If there are no samples or the two differ in length.
    """
    return _mean(
        [
            float(any(found(prediction, answer) for answer in answers))
            for prediction, answers in zip(predictions, references, strict=True)
        ]
    )


def _mean(scores: Sequence[float]) -> float:
    if not scores:
        raise ValueError("there is no prediction to score")
    return sum(scores) / len(scores)
