"""Training documents of needles that are asked for again and again.

A sample of RULER has one answer of seven digits in thousands of tokens, too little for a small
model to find out that answers can be looked up. Here needles of RULER's form (arXiv 2404.06654)
stand in prose and its question is put for one after another.
Samples for evaluation are those of `ham.ruler` alone.
"""

from __future__ import annotations

import math

import numpy as np

from ham.ruler.haystacks import Essays
from ham.ruler.niah import Question, draw, essay_context, make_question
from ham.ruler.pieces import Pieces
from ham.ruler.tasks import RulerTask
from ham.train.recall_documents import RecallDocument

MOST_NEEDLES = 8
LEAST_PROSE, MOST_PROSE = 64, 1024
"""Tokens of prose; each octave as often."""


def needles_document(pieces: Pieces, essays: Essays, rng: np.random.Generator) -> RecallDocument:
    """Up to `MOST_NEEDLES` needles in prose, then a question for each and as many again.

    The first question is RULER's. Later ones are only the sentence that the answer ends: half as
    many tokens without an answer. Few needles are as frequent as many, since one needle teaches to
    copy, which choosing among several then needs.

    Args:
        pieces: Tokens of text.
        essays: The prose.
        rng: Decides everything that is random.
    """
    number = int(2 ** (rng.random() * math.log2(MOST_NEEDLES + 1)))
    task = RulerTask("needles", "essay", num_keys=number)
    keys = draw(rng, task.keys, number)
    values = draw(rng, task.values, number)
    prose = int(LEAST_PROSE * (MOST_PROSE / LEAST_PROSE) ** rng.random())
    offset = essays.offset(rng, prose, 0)
    places = sorted(rng.integers(offset, offset + prose + 1, size=number).tolist())
    cuts = list(zip(places, range(number), strict=True))
    asked = [_about(pieces, task, keys, values, key) for key in range(number)]
    context = essay_context(
        essays, offset, prose, cuts, [question.statements[0] for question in asked]
    )
    # Each needle once before any is asked for again: an answer given can be copied instead.
    order = [*rng.permutation(number).tolist(), *rng.integers(number, size=number).tolist()]
    first, *others = order
    parts = [*asked[first].head, *context.segments, *asked[first].question, *asked[first].answers]
    ends = [sum(map(len, parts))]
    sentence = task.texts()[1].split("?")[1]
    for key in others:
        turn = pieces.fill(sentence, {"query": pieces.fixed(f" {keys[key]}")})
        turn += asked[key].answers
        parts += turn
        ends.append(ends[-1] + sum(map(len, turn)))
    answers = [
        (end - sum(map(len, asked[key].answers)), end) for end, key in zip(ends, order, strict=True)
    ]
    return RecallDocument(np.concatenate(parts).tolist(), tuple(answers))


def _about(
    pieces: Pieces, task: RulerTask, keys: list[str], values: list[str], key: int
) -> Question:
    """The question for one key, whose needle comes first."""
    first = [key, *(other for other in range(len(keys)) if other != key)]
    return make_question(pieces, task, [keys[i] for i in first], [[values[i]] for i in first])
