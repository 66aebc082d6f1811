"""Stretches of held-out documents: what is read, the same for every model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from ham.errors import ConfigError
from ham.evaluate.part import EVALUATION_SEED


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
