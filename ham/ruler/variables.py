"""Variable tracking: RULER's vt, one chain of four hops in noise, after one worked example."""

from __future__ import annotations

import functools
import itertools
import string
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ham.ruler.haystacks import Noise
from ham.ruler.pieces import Pieces, Statement
from ham.ruler.sample import Context, RulerSample, assemble
from ham.ruler.tasks import VT_EXAMPLE_TOKENS, VT_FEWEST_NOISES, VT_HOPS, RulerTask

_NAMES = VT_HOPS + 1
_LETTERS, _EXAMPLE_LETTERS = 5, 3
_LOWEST, _HIGHEST = 10_000, 99_999
_FIRST = "VAR {name} = {value}"
# The published hop ends with a space.
_HOP = "VAR {name} = VAR {value}"
_EXAMPLE_SEED = 42


@dataclass(frozen=True)
class Chain:
    """Variables that all have one value; `names[i + 1]` gets that of `names[i]`."""

    names: Sequence[str]
    value: str


def draw_chain(rng: np.random.Generator, letters: int) -> Chain:
    """A random chain; its names differ."""
    names: dict[str, None] = {}
    while len(names) < _NAMES:
        numbers = rng.integers(len(string.ascii_uppercase), size=letters).tolist()
        names["".join(string.ascii_uppercase[number] for number in numbers)] = None
    return Chain(list(names), str(int(rng.integers(_LOWEST, _HIGHEST))))


@dataclass(frozen=True)
class EncodedChain:
    """A chain in tokens.

    Attributes:
        names: Tokens of each name with the space before it.
        value: The same of the value.
        statements: The assignments, without line breaks.
    """

    names: Sequence[np.ndarray]
    value: np.ndarray
    statements: Sequence[Statement]


def encode_chains(pieces: Pieces, chains: Sequence[Chain]) -> list[EncodedChain]:
    """All chains at once, which is faster than one by one."""
    texts = [f" {text}" for chain in chains for text in (*chain.names, chain.value)]
    encoded = iter(pieces.varying(texts))
    made = []
    for chain in chains:
        names = [next(encoded) for _ in chain.names]
        made.append(_encoded(pieces, names, next(encoded)))
    return made


def sample(
    pieces: Pieces, noise: Noise, task: RulerTask, rng: np.random.Generator, length: int
) -> RulerSample:
    """Draw one sample; see `ham.ruler.generator.RulerGenerator.sample`."""
    chain = draw_chain(rng, _LETTERS)
    chains = encode_chains(pieces, [draw_chain(rng, _EXAMPLE_LETTERS), chain])
    noises = (length - _frame(pieces, noise, task, chains)) // noise.period
    places = sorted(rng.choice(noises, _NAMES, replace=False).tolist())
    return compose(pieces, noise, task, chains, chain.names, places, noises)


def minimum_length(pieces: Pieces, noise: Noise, task: RulerTask) -> int:
    """Fewest tokens in which any sample fits: the noise begins with five lines, as published."""
    nothing = pieces.fixed("")
    chains = [_encoded(pieces, [nothing] * _NAMES, nothing) for _ in range(2)]
    # Each name stands in its statement, in the next one and in the answer; the value three times.
    names = (3 * _NAMES - 1) * sum(
        pieces.longest(string.ascii_uppercase, letters) for letters in (_LETTERS, _EXAMPLE_LETTERS)
    )
    values = 6 * pieces.longest(string.digits, 5)
    frame = _frame(pieces, noise, task, chains)
    return frame + names + values + VT_FEWEST_NOISES * noise.period


def compose(
    pieces: Pieces,
    noise: Noise,
    task: RulerTask,
    chains: Sequence[EncodedChain],
    references: Sequence[str],
    places: Sequence[int],
    noises: int,
) -> RulerSample:
    """The sample of given choices.

    Args:
        pieces: Encodes.
        noise: The noise line.
        task: Variable tracking.
        chains: Chain of the worked example, then the chain that is asked for.
        references: Names of the second as text.
        places: Rising numbers of the noise lines before which its statements stand.
        noises: Noise lines, more than the last place.
    """
    example, asked = chains
    return assemble(
        task.name,
        [*_example(pieces, noise, task, example), pieces.fixed(task.texts()[0])],
        _context(noise, asked.statements, places, noises),
        _question(pieces, task, asked),
        asked.statements,
        asked.names,
        references,
    )


def _frame(pieces: Pieces, noise: Noise, task: RulerTask, chains: Sequence[EncodedChain]) -> int:
    """Tokens of everything but the noise lines of the question, each with a line break."""
    example, asked = chains
    parts = [*_example(pieces, noise, task, example), pieces.fixed(task.texts()[0])]
    parts += [*_question(pieces, task, asked), *asked.names]
    statements = sum(map(len, asked.statements)) + _NAMES * len(noise.line_break)
    # The line break after the last noise line is part of the question.
    return sum(map(len, parts)) + statements - len(noise.line_break)


def _example(
    pieces: Pieces, noise: Noise, task: RulerTask, chain: EncodedChain
) -> list[np.ndarray]:
    """A question of the same form with its answers, always with the same places, as published."""
    head, question = pieces.fixed(task.texts()[0]), _question(pieces, task, chain)
    # The published search for its size counts the prompt alone.
    used = len(head) + sum(map(len, question)) - len(noise.line_break)
    used += sum(map(len, chain.statements)) + _NAMES * len(noise.line_break)
    noises = max(VT_FEWEST_NOISES, (VT_EXAMPLE_TOKENS - used) // noise.period)
    context = _context(noise, chain.statements, _example_places(noises), noises)
    # The published prefix ends with a space, and another stands before the answers.
    answers = [pieces.fixed(" "), *chain.names, pieces.fixed("\n\n")]
    return [head, *context.segments, *question, *answers]


@functools.cache
def _example_places(noises: int) -> list[int]:
    rng = np.random.default_rng(_EXAMPLE_SEED)
    return sorted(rng.choice(noises, _NAMES, replace=False).tolist())


def _encoded(pieces: Pieces, names: Sequence[np.ndarray], value: np.ndarray) -> EncodedChain:
    statements = [pieces.statement(_FIRST, {"name": names[0], "value": value}, "name")]
    for before, name in itertools.pairwise(names):
        hop = pieces.statement(_HOP, {"name": name, "value": before}, "name")
        tokens = np.concatenate([hop.tokens, pieces.fixed(" ")])
        statements.append(Statement(tokens, hop.value))
    return EncodedChain(names, value, statements)


def _context(
    noise: Noise, statements: Sequence[Statement], places: Sequence[int], noises: int
) -> Context:
    """Noise lines with statement j before line `places[j]`."""
    context = Context()
    at = 0
    for number, (place, statement) in enumerate(zip(places, statements, strict=True)):
        context.add(noise.lines(place - at))
        context.add_needle(number, statement)
        context.add(noise.line_break)
        at = place
    context.add(noise.lines(noises - at)[: -len(noise.line_break)])
    return context


def _question(pieces: Pieces, task: RulerTask, chain: EncodedChain) -> list[np.ndarray]:
    return pieces.fill(task.texts()[1], {"query": chain.value})
