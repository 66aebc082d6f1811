"""Texts as token numbers, piece by piece: what is fixed is encoded once, what varies by itself.

A piece begins with the space before its first word, so that byte-level vocabularies and bytes give
the same tokens as for the whole text (a test compares them).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import Formatter

import numpy as np

from ham.train.tokenizer import Tokenizer

_DTYPE = np.int64


@dataclass(frozen=True)
class Statement:
    """A sentence to hide.

    Attributes:
        tokens: Int64 token numbers.
        value: Span [start, end) of what is asked for.
    """

    tokens: np.ndarray
    value: tuple[int, int]

    def __len__(self) -> int:
        return len(self.tokens)


class Pieces:
    """Encodes with one tokenizer and remembers fixed texts.

    Args:
        tokenizer: Any.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self._known: dict[str, np.ndarray] = {}
        self._templates: dict[str, list[tuple[np.ndarray, str | None]]] = {}

    def fixed(self, text: str) -> np.ndarray:
        """Int64 tokens of a text that comes again: a part of a template or a word."""
        found = self._known.get(text)
        if found is None:
            found = self._known[text] = np.array(self.tokenizer.encode(text), dtype=_DTYPE)
        return found

    def varying(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Int64 tokens of texts that hardly come again."""
        return [tokens.astype(_DTYPE) for tokens in self.tokenizer.encode_documents(texts)]

    def fill(self, template: str, fields: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """The parts of a template, in order; a field's tokens begin with the space before it."""
        parts = self._templates.get(template)
        if parts is None:
            parts = self._templates[template] = self._split(template)
        filled = []
        for literal, field in parts:
            filled.append(literal)
            if field is not None:
                filled.append(fields[field])
        return filled

    def statement(self, template: str, fields: Mapping[str, np.ndarray], value: str) -> Statement:
        """A filled template; `value` names the field that is asked for (its first place)."""
        parts = self.fill(template, fields)
        start = 0
        for part in parts:
            if part is fields[value]:
                break
            start += len(part)
        return Statement(np.concatenate(parts), (start, start + len(fields[value])))

    def longest(self, characters: str, count: int) -> int:
        """Upper bound of the tokens of a space and `count` of these characters."""
        longest = max(len(self.fixed(character)) for character in set(characters))
        return len(self.fixed(" ")) + count * longest

    def _split(self, template: str) -> list[tuple[np.ndarray, str | None]]:
        parts = []
        for literal, field, _, _ in Formatter().parse(template):
            text = literal if field is None else literal.removesuffix(" ")
            parts.append((self.fixed(text), field))
        return parts
