"""Samples of every RULER retrieval task, at any length, from pre-tokenised haystacks."""

from __future__ import annotations

import functools

import numpy as np

from ham.errors import ConfigError
from ham.ruler import niah, variables
from ham.ruler.haystacks import Essays, Noise
from ham.ruler.pieces import Pieces
from ham.ruler.sample import RulerSample
from ham.ruler.tasks import RulerTask, ruler_task
from ham.train.tokenizer import Tokenizer


class RulerGenerator:
    """Makes samples; keep one, as it remembers what it has encoded.

    Args:
        tokenizer: That of the model.
        essays: Prose for the tasks that hide needles in essays, in tokens of the same tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer, essays: Essays):
        self.tokenizer = tokenizer
        self.essays = essays
        self.pieces = Pieces(tokenizer)
        self.noise = Noise(self.pieces)
        self.minimum_length = functools.cache(self._minimum_length)

    def sample(
        self, task: str, rng: np.random.Generator, length: int, depth: float | None = None
    ) -> RulerSample:
        """One sample of prompt and answers.

        Args:
            task: Name of a task.
            rng: Decides everything that is random.
            length: Tokens of prompt and answers together. Noise and essay haystacks fill it to the
                token; needle haystacks and variable tracking consist of whole lines, as many as
                fit.
            depth: Where the needle of a task with one answer begins in its context, 0..1; one of
                the published depths at random when None. A needle begins exactly at the token
                nearest to it, in a haystack of needles at the line nearest to it. Tasks with
                several answers have random depths.

        Raises:
            ConfigError: If the task is unknown, `length` is below its minimum, the depth is not
                within 0..1, or the essays are too short.
        """
        found = ruler_task(task)
        minimum = self.minimum_length(task)
        if length < minimum:
            raise ConfigError(
                f"{task} of {length} tokens is too short; with tokenizer "
                f"{self.tokenizer.name!r} the minimum is {minimum}"
            )
        if depth is not None and not 0.0 <= depth <= 1.0:
            raise ConfigError(f"needle depth must be within 0..1, received {depth}")
        if found.track:
            return variables.sample(self.pieces, self.noise, found, rng, length)
        if not found.has_depth:
            depth = None
        return niah.sample(self.pieces, self.noise, self.essays, found, rng, length, depth)

    def _minimum_length(self, task: str) -> int:
        """Fewest tokens of a sample of this task in which any key and value fits.

        Raises:
            ConfigError: If the task is unknown.
        """
        found: RulerTask = ruler_task(task)
        if found.track:
            return variables.minimum_length(self.pieces, self.noise, found)
        return niah.minimum_length(self.pieces, self.noise, found)
