"""Synthetic documents whose answers stand earlier in the same document.

Two kinds. A needle document hides one sentence with a number in ordinary text and asks for the
number at its end, after RULER's single-needle task (arXiv 2404.06654), in our own words. A pairs
document lists keys with values and then asks for them in another order, after multi-query
associative recall (Zoology, arXiv 2312.04927), written as text.

Every piece of text is tokenised by itself and the token numbers are joined. Spans are therefore
exact in tokens for any tokenizer, and a needle stands at exactly the depth asked for. With the byte
tokenizer and with byte-level vocabularies, decoding the tokens gives the text.
"""

from __future__ import annotations

import functools
import re
import string
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ham.errors import ConfigError
from ham.train.tokenizer import Tokenizer

NEEDLE_DIGITS = 7

# One-character keys: a small model learns to look them up within about a million tokens of such
# documents; with two-letter keys it had learned nothing after four million.
_KEY_CHARACTERS = string.ascii_letters + "!#$%&*+=?@^~"
MAX_PAIRS = len(_KEY_CHARACTERS) ** 2

# fmt: off
_WORDS = (
    "anchor", "apple", "arrow", "barrel", "basket", "bell", "bridge", "bucket", "candle",
    "carpet", "castle", "chest", "clock", "coin", "copper", "cradle", "crown", "curtain", "door",
    "drum", "engine", "feather", "fiddle", "flute", "forest", "fountain", "garden", "gate",
    "glove", "hammer", "harbour", "harp", "helmet", "island", "ivory", "jar", "kettle", "key",
    "ladder", "lamp", "lantern", "letter", "locket", "meadow", "mill", "mirror", "oven", "parcel",
    "pearl", "pillow", "quarry", "rabbit", "ribbon", "saddle", "shovel", "silver", "spade",
    "statue", "stove", "teapot", "tower", "trunk", "tunnel", "valley", "violin", "wagon", "wheel",
    "window",
)
# fmt: on
_BEFORE_WORD = "\nKeep in mind: the number that opens the "
_AFTER_WORD = " is "
_AFTER_NUMBER = ".\n"
_QUESTION = "\nWhich number opens the "
_QUESTION_END = "? The number that opens the "

_PAIRS_HEAD = "\nPairs\n"
_QUERIES_HEAD = "Asked\n"
_PAIR_MIDDLE = ": "
_PAIR_END = "\n"


@dataclass(frozen=True)
class RecallDocument:
    """A document with the spans that can be answered from what stands before them.

    Attributes:
        tokens: Token numbers.
        answers: Spans [start, end) in tokens whose content follows from the context.
        needle: Span of the hidden sentence, or None for a pairs document.
    """

    tokens: list[int]
    answers: tuple[tuple[int, int], ...]
    needle: tuple[int, int] | None


def needle_document(
    rng: np.random.Generator,
    tokenizer: Tokenizer,
    haystack: Sequence[int],
    length: int,
    depth: float,
    digits: int = NEEDLE_DIGITS,
) -> RecallDocument:
    """One hidden number in a stretch of `haystack`, asked for at the end.

    Args:
        rng: Chooses the stretch, the word and the number.
        tokenizer: That of `haystack`.
        haystack: Tokens to hide the needle in; a random stretch of it is used.
        length: Tokens of the whole document; its last tokens are the answer.
        depth: 0 puts the needle first, 1 right before the question; the tokens of haystack before
            the needle are `round(depth * haystack tokens)`.
        digits: Digits of the number.

    Raises:
        ConfigError: If `length` is below `needle_minimum_length`, the haystack is too short, or
            `depth` is not within 0..1.
    """
    minimum = needle_minimum_length(tokenizer, digits)
    if length < minimum:
        raise ConfigError(
            f"a needle document of {length} tokens is too short; with tokenizer "
            f"{tokenizer.name!r} the minimum is {minimum}"
        )
    if not 0.0 <= depth <= 1.0:
        raise ConfigError(f"needle depth must be within 0..1, received {depth}")
    word = _piece(tokenizer, _WORDS[int(rng.integers(len(_WORDS)))])
    number = tokenizer.encode(str(int(rng.integers(10 ** (digits - 1), 10**digits))))
    is_ = _piece(tokenizer, _AFTER_WORD)
    needle = [*_piece(tokenizer, _BEFORE_WORD), *word, *is_, *number]
    needle += _piece(tokenizer, _AFTER_NUMBER)
    question = [*_piece(tokenizer, _QUESTION), *word]
    question += [*_piece(tokenizer, _QUESTION_END), *word, *is_]

    hay = length - len(needle) - len(question) - len(number)
    if len(haystack) < hay:
        raise ConfigError(
            f"a needle document of {length} tokens needs {hay} tokens of haystack, "
            f"received {len(haystack)}"
        )
    offset = int(rng.integers(len(haystack) - hay + 1))
    stretch = np.asarray(haystack[offset : offset + hay]).tolist()
    start = round(depth * hay)
    tokens = [*stretch[:start], *needle, *stretch[start:], *question, *number]
    answer = (length - len(number), length)
    return RecallDocument(tokens, (answer,), (start, start + len(needle)))


@functools.lru_cache(maxsize=64)
def needle_minimum_length(tokenizer: Tokenizer, digits: int = NEEDLE_DIGITS) -> int:
    """Fewest tokens of a needle document that any word and number fits in, without haystack."""
    fixed = (_BEFORE_WORD, _AFTER_WORD, _AFTER_NUMBER, _QUESTION, _QUESTION_END, _AFTER_WORD)
    longest_word = max(len(_piece(tokenizer, word)) for word in _WORDS)
    longest_digit = max(len(_piece(tokenizer, str(digit))) for digit in range(10))
    frame = sum(len(_piece(tokenizer, text)) for text in fixed)
    return frame + 3 * longest_word + 2 * digits * longest_digit


def needle_spans(text: str) -> list[tuple[int, int]]:
    """Spans [start, end), in characters, of the sentences that `needle_document` hides."""
    frame = map(re.escape, (_BEFORE_WORD, _AFTER_WORD, _AFTER_NUMBER))
    before, after_word, after_number = frame
    pattern = rf"{before}\w+{after_word}\d+{after_number}"
    return [found.span() for found in re.finditer(pattern, text)]


def pairs_document(
    rng: np.random.Generator, tokenizer: Tokenizer, num_pairs: int, num_queries: int
) -> RecallDocument:
    """Keys with values, then `num_queries` of the keys again, in random order, with their values.

    Keys are drawn without replacement, one character each for up to 64 pairs and two beyond; values
    are two digits and may repeat.

    Raises:
        ConfigError: If `num_pairs` is not within 1..4096 or `num_queries` not within 1..num_pairs.
    """
    if not 1 <= num_pairs <= MAX_PAIRS:
        raise ConfigError(f"pairs must be within 1..{MAX_PAIRS}, received {num_pairs}")
    if not 1 <= num_queries <= num_pairs:
        raise ConfigError(f"queries must be within 1..{num_pairs} (pairs), received {num_queries}")
    single = num_pairs <= len(_KEY_CHARACTERS)
    keys = rng.permutation(len(_KEY_CHARACTERS) if single else MAX_PAIRS)[:num_pairs]
    values = rng.integers(0, 100, size=num_pairs)
    asked = rng.permutation(num_pairs)[:num_queries]
    pieces = [
        (
            _piece(tokenizer, _key(key, single)) + _piece(tokenizer, _PAIR_MIDDLE),
            _piece(tokenizer, f"{value:02d}"),
        )
        for key, value in zip(keys.tolist(), values.tolist(), strict=True)
    ]
    end = _piece(tokenizer, _PAIR_END)
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
    return RecallDocument(tokens, tuple(answers), None)


def _key(number: int, single: bool) -> str:
    if single:
        return _KEY_CHARACTERS[number]
    first, second = divmod(number, len(_KEY_CHARACTERS))
    return _KEY_CHARACTERS[first] + _KEY_CHARACTERS[second]


@functools.lru_cache(maxsize=1 << 14)
def _piece(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    return tuple(tokenizer.encode(text))
