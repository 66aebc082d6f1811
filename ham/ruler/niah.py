"""Needle in a haystack: RULER's niah tasks.

What is random is drawn in `sample`; `make_question` and the `*_context` functions put a sample
together from given choices, as the published `generate_input_output` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ham.errors import ConfigError
from ham.ruler import words
from ham.ruler.haystacks import Essays, Noise
from ham.ruler.pieces import Pieces, Statement
from ham.ruler.sample import Context, RulerSample, assemble
from ham.ruler.tasks import DEPTHS, NEEDLE, Kind, RulerTask

_DIGITS = "0123456789"
_LOWEST, _HIGHEST = 10**6, 10**7
_UUID_LENGTH = 36
_POOLS = {"words": (words.WORD_COUNT, words.word), "uuids": (words.UUID_COUNT, words.uuid_text)}


@dataclass(frozen=True)
class Question:
    """Everything of a sample but its haystack.

    Attributes:
        head, question: Parts before and after the context.
        statements: Sentences to hide: those of the answers in their order, then distractors.
        answers: Tokens of each answer with the space before it.
        references: The same as text.
    """

    head: Sequence[np.ndarray]
    question: Sequence[np.ndarray]
    statements: Sequence[Statement]
    answers: Sequence[np.ndarray]
    references: Sequence[str]

    def room(self, length: int) -> int:
        """Tokens left for the context in a sample of `length`."""
        return length - sum(map(len, [*self.head, *self.question, *self.answers]))

    def finish(self, task: RulerTask, context: Context) -> RulerSample:
        """The sample with this context."""
        return assemble(
            task.name,
            self.head,
            context,
            self.question,
            self.statements,
            self.answers,
            self.references,
        )


def sample(
    pieces: Pieces,
    noise: Noise,
    essays: Essays,
    task: RulerTask,
    rng: np.random.Generator,
    length: int,
    depth: float | None,
) -> RulerSample:
    """Draw one sample; see `ham.ruler.generator.RulerGenerator.sample`."""
    if task.has_depth and depth is None:
        depth = int(rng.choice(DEPTHS)) / 100
    keys = draw(rng, task.keys, task.num_keys)
    values = [draw(rng, task.values, task.num_values) for _ in keys]
    made = make_question(pieces, task, keys, values)
    room = made.room(length)
    if task.haystack == "noise":
        context = noise_context(noise, made.statements[0], room, depth)
    elif task.haystack == "needle":
        size = len(made.statements[0])
        lines = _draw_lines(pieces, noise, task, rng, keys[0], size, room - size)
        context = lines_context(noise, lines, made.statements[0], depth)
    elif depth is None:
        context = _scattered(rng, essays, made.statements, room)
    else:
        context = _at_depth(rng, essays, made.statements, room, depth)
    return made.finish(task, context)


def minimum_length(pieces: Pieces, noise: Noise, task: RulerTask) -> int:
    """Fewest tokens in which any sample fits with as much haystack as one line of it."""
    key, value = _longest(pieces, task.keys), _longest(pieces, task.values)
    head, question = (pieces.fixed(text) for text in _plain(task))
    needle = len(pieces.fixed(_plain_needle(task))) + key + value
    line = needle if task.haystack == "needle" else len(noise.line)
    mentions = task.texts()[1].count("{query}")
    asked = mentions * task.num_queries * (key + len(pieces.fixed(", and")))
    hidden = task.num_keys * task.num_values * needle
    frame = len(head) + len(question) + asked + task.answers * value
    return frame + hidden + line + len(noise.line_break)


def make_question(
    pieces: Pieces, task: RulerTask, keys: Sequence[str], values: Sequence[Sequence[str]]
) -> Question:
    """The frame and the needles for given keys, in the order asked for, and values of each key."""
    head, question = task.texts()
    encoded_keys = _encode(pieces, task.keys, keys)
    flat = [value for group in values for value in group]
    encoded_values = _encode(pieces, task.values, flat)
    owners = [key for key, group in zip(encoded_keys, values, strict=True) for _ in group]
    template = _needle(task)
    statements = [
        pieces.statement(template, {"key": key, "value": value}, "value")
        for key, value in zip(owners, encoded_values, strict=True)
    ]
    query = _listed(pieces, encoded_keys[: task.num_queries])
    return Question(
        head=[pieces.fixed(head)],
        question=pieces.fill(question, {"query": query}),
        statements=statements,
        answers=encoded_values[: task.answers],
        references=flat[: task.answers],
    )


def noise_context(noise: Noise, needle: Statement, room: int, depth: float) -> Context:
    """Exactly `room` tokens: noise up to the needle, which begins a line, and noise after it."""
    before = round(depth * (room - len(needle)))
    context = Context()
    context.add(noise.before(before))
    context.add_needle(0, needle)
    context.add(noise.after(room - len(needle) - before))
    return context


def lines_context(
    noise: Noise, lines: Sequence[np.ndarray], needle: Statement, depth: float
) -> Context:
    """The needle between lines like it, where its beginning is nearest to the depth."""
    starts = np.cumsum([0, *(len(line) + len(noise.line_break) for line in lines)])
    place = int(np.abs(starts - depth * starts[-1]).argmin())
    context = Context()
    for line in lines[:place]:
        context.add(line)
        context.add(noise.line_break)
    context.add_needle(0, needle)
    for line in lines[place:]:
        context.add(noise.line_break)
        context.add(line)
    return context


def essay_context(
    essays: Essays,
    offset: int,
    length: int,
    cuts: Sequence[tuple[int, int]],
    statements: Sequence[Statement],
) -> Context:
    """`length` tokens of prose with needle i at position p for each (p, i) in `cuts`, in order."""
    context = Context()
    at = offset
    for position, number in cuts:
        context.add(essays.stretch(at, position))
        context.add_needle(number, statements[number])
        at = position
    context.add(essays.stretch(at, offset + length))
    return context


def draw(
    rng: np.random.Generator, kind: Kind, count: int, taken: frozenset[str] = frozenset()
) -> list[str]:
    """Keys or values of a kind that differ from each other and from those `taken`.

    Raises:
        ConfigError: If there are not that many.
    """
    if kind == "numbers":
        drawn = [str(number) for number in rng.integers(_LOWEST, _HIGHEST, size=count).tolist()]
    else:
        total, text = _POOLS[kind]
        if count + len(taken) > total:
            raise ConfigError(
                f"a haystack of needles this long takes {count + len(taken)} {kind}; there are "
                f"{total}"
            )
        drawn = [text(number) for number in rng.choice(total, count, replace=False).tolist()]
    kept = [one for one in dict.fromkeys(drawn) if one not in taken]
    if len(kept) == count:
        return kept
    return kept + draw(rng, kind, count - len(kept), taken.union(kept))


def _draw_lines(
    pieces: Pieces,
    noise: Noise,
    task: RulerTask,
    rng: np.random.Generator,
    asked: str,
    size: int,
    room: int,
) -> list[np.ndarray]:
    """As many distractors as fit into `room` tokens, each with its line break."""
    template = _needle(task)
    fixed = len(pieces.fixed(_plain_needle(task))) + len(noise.line_break)
    lines: list[np.ndarray] = []
    taken = frozenset([asked])
    while True:
        # About as many as fit; no key comes twice, as the question would have two answers.
        names = draw(rng, task.keys, room // size + 1, taken)
        taken = taken.union(names)
        keys = _encode(pieces, task.keys, names)
        values = _encode(pieces, task.values, draw(rng, task.values, len(names)))
        for key, value in zip(keys, values, strict=True):
            room -= fixed + len(key) + len(value)
            if room < 0:
                return lines
            lines.append(np.concatenate(pieces.fill(template, {"key": key, "value": value})))


def _at_depth(
    rng: np.random.Generator,
    essays: Essays,
    statements: Sequence[Statement],
    room: int,
    depth: float,
) -> Context:
    """Needle 0 begins at the token of that depth; the others stand at random depths.

    Distractors before the needle shift it, so as many stand there as the depth leaves room for.
    Only where no number of them fits does the needle begin at the nearest possible token.
    """
    sizes = [len(statement) for statement in statements]
    hay = room - sum(sizes)
    target = round(depth * (room - sizes[0]))
    others = (1 + rng.permutation(len(statements) - 1)).tolist()
    ahead = np.cumsum([0, *(sizes[number] for number in others)])
    wished = int((rng.choice(DEPTHS, len(others)) < 100 * depth).sum())
    misses = np.maximum(ahead - target, 0) + np.maximum(target - hay - ahead, 0)
    best = np.flatnonzero(misses == misses.min())
    count = int(best[np.abs(best - wished).argmin()])
    before = min(max(target - int(ahead[count]), 0), hay)
    offset = essays.offset(rng, hay, before)
    middle, end = offset + before, offset + hay
    cuts = _places(rng, essays, others[:count], offset, middle)
    cuts += [(middle, 0), *_places(rng, essays, others[count:], middle, end)]
    return essay_context(essays, offset, hay, cuts, statements)


def _places(
    rng: np.random.Generator, essays: Essays, numbers: Sequence[int], low: int, high: int
) -> list[tuple[int, int]]:
    """A random beginning of a sentence within [low, high] for each needle, in rising order."""
    wished = sorted(rng.integers(low, high + 1, size=len(numbers)).tolist())
    places = [essays.nearest_start(position, low, high) for position in wished]
    return list(zip(places, numbers, strict=True))


def _scattered(
    rng: np.random.Generator, essays: Essays, statements: Sequence[Statement], room: int
) -> Context:
    """All needles at different depths of the published grid, in random order."""
    hay = room - sum(map(len, statements))
    offset = essays.offset(rng, hay, 0)
    depths = sorted(rng.choice(DEPTHS, len(statements), replace=False).tolist())
    places = [
        essays.nearest_start(offset + hay * depth // 100, offset, offset + hay) for depth in depths
    ]
    order = rng.permutation(len(statements)).tolist()
    return essay_context(essays, offset, hay, list(zip(places, order, strict=True)), statements)


def _listed(pieces: Pieces, keys: Sequence[np.ndarray]) -> np.ndarray:
    """`a`, or `a, b, c, and d`; one part, as it fills one field."""
    parts = [keys[0]]
    for key in keys[1:-1]:
        parts += [pieces.fixed(","), key]
    if len(keys) > 1:
        parts += [pieces.fixed(", and"), keys[-1]]
    return np.concatenate(parts)


def _encode(pieces: Pieces, kind: Kind, texts: Sequence[str]) -> list[np.ndarray]:
    if kind == "numbers":
        return pieces.varying([f" {text}" for text in texts])
    return [pieces.fixed(f" {text}") for text in texts]


def _needle(task: RulerTask) -> str:
    """The needle's template; in prose it begins with the space after the sentence before it."""
    template = NEEDLE.replace("{type_needle_v}", task.values)
    return f" {template}" if task.haystack == "essay" else template


def _plain_needle(task: RulerTask) -> str:
    return _needle(task).replace(" {key}", "").replace(" {value}", "")


def _plain(task: RulerTask) -> tuple[str, str]:
    head, question = task.texts()
    return head, question.replace(" {query}", "")


def _longest(pieces: Pieces, kind: Kind) -> int:
    if kind == "numbers":
        return pieces.longest(_DIGITS, 7)
    if kind == "uuids":
        return pieces.longest(_DIGITS + "abcdef-", _UUID_LENGTH)
    adjective = max(len(pieces.fixed(f" {one}")) for one in words.ADJECTIVES)
    noun = max(len(pieces.fixed(f"-{one}")) for one in words.NOUNS)
    return adjective + noun
