"""Training documents of needles that are asked for again and again.

A sample of RULER has one answer of seven digits in thousands of tokens, too little for a small
model to find out that answers can be looked up. Here several needles of RULER's form (arXiv
2404.06654) stand in prose and its question is put for one after another, until the document ends.
Samples for evaluation are those of `ham.ruler` alone.
"""

from __future__ import annotations

import numpy as np

from ham.ruler.haystacks import Essays
from ham.ruler.niah import Question, draw, essay_context, make_question
from ham.ruler.pieces import Pieces
from ham.ruler.tasks import RulerTask

MOST_NEEDLES = 8
LEAST_PROSE = 64
"""Tokens of prose at least; at most it takes a third of the document."""


def needles_document(
    pieces: Pieces, essays: Essays, rng: np.random.Generator, length: int
) -> list[int]:
    """Up to `MOST_NEEDLES` needles in prose, then questions with their answers.

    Args:
        pieces: Tokens of text.
        essays: The prose.
        rng: Decides everything that is random.
        length: Tokens from which on no further question is put; more than that are returned.
    """
    number = int(rng.integers(1, MOST_NEEDLES + 1))
    task = RulerTask("needles", "essay", num_keys=number)
    keys = draw(rng, task.keys, number)
    values = draw(rng, task.values, number)
    asked = [_about(pieces, task, keys, values, key) for key in range(number)]
    most = max(LEAST_PROSE, length // 3)
    prose = int(LEAST_PROSE * (most / LEAST_PROSE) ** rng.random())
    offset = essays.offset(rng, prose, 0)
    places = sorted(rng.integers(offset, offset + prose + 1, size=number).tolist())
    cuts = list(zip(places, range(number), strict=True))
    context = essay_context(
        essays, offset, prose, cuts, [question.statements[0] for question in asked]
    )
    parts = [*asked[0].head, *context.segments]
    size = sum(map(len, parts))
    while size < length:
        question = asked[int(rng.integers(number))]
        turn = [*question.question, *question.answers]
        parts += turn
        size += sum(map(len, turn))
    return np.concatenate(parts).tolist()


def _about(
    pieces: Pieces, task: RulerTask, keys: list[str], values: list[str], key: int
) -> Question:
    """The question for one key, whose needle comes first."""
    first = [key, *(other for other in range(len(keys)) if other != key)]
    return make_question(pieces, task, [keys[i] for i in first], [[values[i]] for i in first])
