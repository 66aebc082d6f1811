"""One sample, and how it is put together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ham.ruler.pieces import Statement

Span = tuple[int, int]


@dataclass(frozen=True, eq=False)
class RulerSample:
    """A question with its answers, in token numbers.

    Attributes:
        task: Name of the task.
        tokens: Int64: the prompt, then the answers, each with the space before it.
        context: Span of haystack and needles.
        needles: Span of the sentence of each answer, in the order of the answers.
        values: Span of the answer's own tokens within its sentence.
        answers: Span of each answer at the end.
        references: The answers as text, without the space.
        depth: Where the needle begins: 0 at the first token of the context, 1 where it ends the
            context; None where there are several answers.
    """

    task: str
    tokens: np.ndarray
    context: Span
    needles: tuple[Span, ...]
    values: tuple[Span, ...]
    answers: tuple[Span, ...]
    references: tuple[str, ...]
    depth: float | None

    @property
    def prompt(self) -> np.ndarray:
        """The tokens before the first answer."""
        return self.tokens[: self.answers[0][0]]


@dataclass
class Context:
    """Haystack and needles in order.

    Attributes:
        segments: Int64 tokens.
        places: Number of each needle and the index of its segment.
    """

    segments: list[np.ndarray] = field(default_factory=list)
    places: dict[int, int] = field(default_factory=dict)

    def add(self, tokens: np.ndarray) -> None:
        """Append haystack."""
        self.segments.append(tokens)

    def add_needle(self, number: int, statement: Statement) -> None:
        """Append needle `number`."""
        self.places[number] = len(self.segments)
        self.segments.append(statement.tokens)


def assemble(
    task: str,
    head: Sequence[np.ndarray],
    context: Context,
    question: Sequence[np.ndarray],
    statements: Sequence[Statement],
    answers: Sequence[np.ndarray],
    references: Sequence[str],
) -> RulerSample:
    """Join the parts; `statements[i]` is needle i of the context and holds answer i.

    Needles of the context beyond the answers are distractors and leave no span.
    """
    parts = [*head, *context.segments, *question, *answers]
    ends = np.cumsum([len(part) for part in parts]).tolist()
    starts = [0, *ends[:-1]]
    first = len(head)
    last = first + len(context.segments)
    span = (starts[first], starts[last])
    begins = [starts[first + context.places[number]] for number in range(len(answers))]
    needles = [
        (begin, begin + len(statement))
        for begin, statement in zip(begins, statements, strict=False)
    ]
    values = [
        (begin + statement.value[0], begin + statement.value[1])
        for begin, statement in zip(begins, statements, strict=False)
    ]
    depth = None
    if len(answers) == 1:
        room = span[1] - span[0] - len(statements[0])
        depth = (begins[0] - span[0]) / room if room else 0.0
    return RulerSample(
        task=task,
        tokens=np.concatenate(parts),
        context=span,
        needles=tuple(needles),
        values=tuple(values),
        answers=tuple(zip(starts[-len(answers) :], ends[-len(answers) :], strict=True)),
        references=tuple(references),
        depth=depth,
    )
