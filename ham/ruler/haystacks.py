"""Pre-tokenised haystacks: prose that is cut at sentences, and one line again and again."""

from __future__ import annotations

import re
from collections.abc import Iterable

import numpy as np

from ham.errors import ConfigError
from ham.ruler.pieces import Pieces
from ham.ruler.tasks import NOISE
from ham.train.shards import TokenShard
from ham.train.tokenizer import Tokenizer

MOST_CHARACTERS = 8_000_000
"""Prose that is tokenised for one evaluation, at most."""

_BETWEEN_SENTENCES = re.compile(r"(?:(?<=[.!?])|(?<=[.!?][\"”’)\]])) (?=[\"“‘(\[]?[A-Z0-9])")


class Essays:
    """Prose to hide needles in.

    Args:
        tokens: Token numbers of all of it; a memory map may be.
        starts: Rising positions at which a sentence begins, or None to let needles stand between
            any two tokens.
    """

    def __init__(self, tokens: np.ndarray, starts: np.ndarray | None = None):
        self.tokens = tokens
        self.starts = np.empty(0, dtype=np.int64) if starts is None else starts

    @classmethod
    def from_texts(
        cls, tokenizer: Tokenizer, texts: Iterable[str], most: int = MOST_CHARACTERS
    ) -> Essays:
        """Tokenise texts sentence by sentence, up to `most` characters in all.

        Runs of white space become one space, as in the published haystack.
        """
        sentences: list[str] = []
        characters = 0
        for text in texts:
            if characters >= most:
                break
            plain = " ".join(text.split())[: most - characters]
            characters += len(plain)
            sentences += [f" {sentence}" for sentence in _BETWEEN_SENTENCES.split(plain)]
        if sentences:
            sentences[0] = sentences[0].removeprefix(" ")
        encoded = tokenizer.encode_documents(sentences)
        ends = np.cumsum([len(one) for one in encoded], dtype=np.int64)
        starts = np.concatenate(([0], ends[:-1])) if len(ends) else None
        tokens = np.concatenate(encoded) if encoded else np.empty(0, dtype=np.int64)
        return cls(tokens, starts)

    @classmethod
    def from_shard(
        cls, tokenizer: Tokenizer, shard: TokenShard, most: int = MOST_CHARACTERS
    ) -> Essays:
        """The documents of a shard, tokenised again with plain spaces."""
        # Lists: a tokenizer that walks over a memory map takes ten times as long.
        documents = (tokenizer.decode(document.tolist()) for document in shard.documents())
        return cls.from_texts(tokenizer, documents, most)

    def offset(self, rng: np.random.Generator, length: int, before: int) -> int:
        """Where a stretch of `length` tokens begins, so that a sentence begins `before` later.

        Where no sentence allows it, any stretch.

        Raises:
            ConfigError: If there is less prose than that.
        """
        last = len(self.tokens) - length
        if last < 0:
            raise ConfigError(
                f"this needle task needs a haystack of {length} tokens; the text has "
                f"{len(self.tokens)}"
            )
        low = int(np.searchsorted(self.starts, before))
        high = int(np.searchsorted(self.starts, before + last, side="right"))
        if low == high:
            return int(rng.integers(last + 1))
        return int(self.starts[rng.integers(low, high)]) - before

    def nearest_start(self, position: int, low: int, high: int) -> int:
        """The beginning of a sentence within [low, high] next to a position there, else itself."""
        index = int(np.searchsorted(self.starts, position))
        near = [int(start) for start in self.starts[max(index - 1, 0) : index + 1]]
        near = [start for start in near if low <= start <= high]
        return min(near, key=lambda start: abs(start - position), default=position)

    def stretch(self, start: int, end: int) -> np.ndarray:
        """Int64 tokens [start, end)."""
        return np.asarray(self.tokens[start:end], dtype=np.int64)


class Noise:
    """RULER's noise sentence, line after line."""

    def __init__(self, pieces: Pieces):
        self.line = pieces.fixed(NOISE)
        self.line_break = pieces.fixed("\n")
        self.period = len(self.line) + len(self.line_break)
        self._endless = np.concatenate([self.line, self.line_break])

    def before(self, count: int) -> np.ndarray:
        """The last `count` tokens before the beginning of a line."""
        return self._from((-count) % self.period, count)

    def after(self, count: int) -> np.ndarray:
        """The first `count` tokens from a line break on."""
        return self._from(len(self.line), count)

    def lines(self, count: int) -> np.ndarray:
        """`count` lines, each with its line break."""
        return self._from(0, count * self.period)

    def _from(self, phase: int, count: int) -> np.ndarray:
        if len(self._endless) < phase + count:
            lines = 2 * (phase + count) // self.period + 1
            self._endless = np.tile(self._endless[: self.period], lines)
        return self._endless[phase : phase + count]
