"""Synthetic documents of key-value pairs whose answers stand earlier in the same document.

Multi-query associative recall (Zoology, arXiv 2312.04927) written as text: keys, each with its
value right after it, then the keys again in another order; and copies of random strings. Needle
documents are those of `ham.ruler`.

Every piece of text is tokenised by itself and the token numbers are joined, so spans are exact in
tokens for any tokenizer. With the byte tokenizer and with byte-level vocabularies, decoding the
tokens gives the text.
"""

from __future__ import annotations

import functools
import string
from dataclasses import dataclass

import numpy as np

from ham.errors import ConfigError
from ham.train.tokenizer import Tokenizer

# One-character keys: with two-letter keys a small model had learned nothing after four million
# tokens of such documents.
_KEY_CHARACTERS = string.ascii_letters + "!#$%&*+=?@^~"
MAX_PAIRS = len(_KEY_CHARACTERS) ** 2

_VALUES = string.digits + "\"'(),-./:;<>[]_`{|}"
_COPIED_CHARACTERS = string.ascii_letters + string.digits
LEAST_COPIED, MOST_COPIED = 8, 128
MOST_COPIES = 4
_COPIES_HEAD = "\nCopies\n"
_PAIRS_HEAD = "\nPairs\n"
_QUERIES_HEAD = "Asked\n"
_LINE_END = "\n"


@dataclass(frozen=True)
class RecallDocument:
    """A document with the spans that follow from what stands before them.

    Attributes:
        tokens: Token numbers.
        answers: Spans [start, end) in tokens whose content follows from the context.
    """

    tokens: list[int]
    answers: tuple[tuple[int, int], ...]


def pairs_document(
    rng: np.random.Generator,
    tokenizer: Tokenizer,
    num_pairs: int,
    num_queries: int,
    num_repeats: int = 0,
) -> RecallDocument:
    """Keys with values, then `num_queries` of the keys again, in random order, with their values.

    Then `num_repeats` more questions, each for any of these keys.

    Keys are drawn without replacement, one character each for up to 64 pairs and two beyond; values
    are one of 30 other characters and may repeat. Two keys, P and A, also begin the heading lines.

    Raises:
        ConfigError: If `num_pairs` is not within 1..4096 or `num_queries` not within 1..num_pairs.
    """
    if not 1 <= num_pairs <= MAX_PAIRS:
        raise ConfigError(f"pairs must be within 1..{MAX_PAIRS}, received {num_pairs}")
    if not 1 <= num_queries <= num_pairs:
        raise ConfigError(f"queries must be within 1..{num_pairs} (pairs), received {num_queries}")
    single = num_pairs <= len(_KEY_CHARACTERS)
    keys = rng.permutation(len(_KEY_CHARACTERS) if single else MAX_PAIRS)[:num_pairs]
    values = rng.integers(0, len(_VALUES), size=num_pairs)
    asked = rng.permutation(num_pairs)[:num_queries]
    if num_repeats:
        asked = np.concatenate((asked, rng.choice(asked, size=num_repeats)))
    key_pieces, value_pieces = _keys(tokenizer, single), _values(tokenizer)
    pieces = [
        (key_pieces[key], value_pieces[value])
        for key, value in zip(keys.tolist(), values.tolist(), strict=True)
    ]
    end = _piece(tokenizer, _LINE_END)
    tokens = list(_piece(tokenizer, _PAIRS_HEAD))
    for key_ids, value_ids in pieces:
        tokens += key_ids + value_ids + end
    tokens += _piece(tokenizer, _QUERIES_HEAD)
    answers = []
    for index in asked.tolist():
        key_ids, value_ids = pieces[index]
        start = len(tokens) + len(key_ids)
        answers.append((start, start + len(value_ids)))
        tokens += key_ids + value_ids + end
    return RecallDocument(tokens, tuple(answers))


def copies_document(rng: np.random.Generator, tokenizer: Tokenizer) -> RecallDocument:
    """A random string, two to `MOST_COPIES` times; the answers are all but the first copy.

    The simplest look-up, which the others are built on (induction heads, arXiv 2209.11895).
    """
    length = int(LEAST_COPIED * (MOST_COPIED / LEAST_COPIED) ** rng.random())
    text = "".join(rng.choice(list(_COPIED_CHARACTERS), size=length))
    copy = [*tokenizer.encode(text), *_piece(tokenizer, _LINE_END)]
    head = list(_piece(tokenizer, _COPIES_HEAD))
    tokens = head + copy * int(rng.integers(2, MOST_COPIES + 1))
    return RecallDocument(tokens, ((len(head) + len(copy), len(tokens)),))


@functools.lru_cache(maxsize=16)
def _keys(tokenizer: Tokenizer, single: bool) -> list[tuple[int, ...]]:
    """Tokens of every key."""
    firsts = [""] if single else list(_KEY_CHARACTERS)
    keys = [first + second for first in firsts for second in _KEY_CHARACTERS]
    return [tuple(tokens.tolist()) for tokens in tokenizer.encode_documents(keys)]


@functools.lru_cache(maxsize=16)
def _values(tokenizer: Tokenizer) -> list[tuple[int, ...]]:
    return [_piece(tokenizer, value) for value in _VALUES]


@functools.lru_cache(maxsize=1 << 10)
def _piece(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    return tuple(tokenizer.encode(text))
