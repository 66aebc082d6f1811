"""A text as tokens whose characters are known, and as pieces that can be shown."""

from __future__ import annotations

import itertools
import os
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ham.errors import ConfigError, MissingDataError
from ham.inspect.classes import classify_characters, classify_tokens
from ham.ruler.tasks import needle_spans
from ham.train.tokenizer import Tokenizer

# More than the mean of any tokenizer in use; what a long file has beyond is not read.
_BYTES_PER_TOKEN = 16
_VISIBLE = {"\n": "↵\n", "\t": "⇥\t", "\r": "␍", "\x7f": "␡"}


@dataclass(frozen=True)
class Piece:
    """What is shown as one: the fewest tokens that together are whole characters.

    Attributes:
        start, end: Its tokens [start, end).
        text: Its characters.
    """

    start: int
    end: int
    text: str


@dataclass(frozen=True)
class TokenText:
    """A text with its tokens.

    Attributes:
        text: The characters that the tokens stand for.
        ids: Token numbers.
        classes_T: Class of every token, uint8 indices into `ham.inspect.classes.CLASSES`.
        pieces: What to show, in order; together they hold every token once.
        note: What was cut off, or nothing.
    """

    text: str
    ids: list[int]
    classes_T: np.ndarray
    pieces: list[Piece]
    note: str = ""


def read_text(path: str | os.PathLike, max_tokens: int) -> tuple[str, str]:
    """The text of a file, at most what `max_tokens` tokens can hold, and what was left out.

    Raises:
        MissingDataError: If there is no such file.
        ConfigError: If it is empty or not UTF-8.
    """
    path, limit = Path(path), max_tokens * _BYTES_PER_TOKEN
    if not path.is_file():
        raise MissingDataError(f"{path} is not a file; --text takes a UTF-8 text file")
    size = path.stat().st_size
    with open(path, "rb") as handle:
        data = handle.read(limit)
    try:
        # Only a cut may leave an incomplete character, of at most three bytes, at the end.
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        if size <= limit or error.start < len(data) - 3:
            raise ConfigError(
                f"{path} is not UTF-8 text: byte {error.start} is {data[error.start]:#04x}"
            ) from error
        text = data[: error.start].decode("utf-8")
    if not text:
        raise ConfigError(f"{path} holds no text; nothing to inspect")
    return text, f"of {size:,} bytes of the file" if size > limit else ""


def tokenise(
    text: str,
    tokenizer: Tokenizer,
    max_tokens: int,
    needles: Sequence[str] = (),
    of_what: str = "",
) -> TokenText:
    """Tokens of a text, cut to `max_tokens`, with their classes.

    Args:
        text: Any text but the empty one.
        tokenizer: Bytes or a byte-level vocabulary.
        max_tokens: Most tokens to keep, at least 1; a character is never cut.
        needles: Strings whose every occurrence is a needle; the sentences that needle documents
            hide are needles too.
        of_what: What a note on a cut says was cut; the number of tokens when empty.

    Raises:
        ConfigError: If a needle is not in the text or the tokenizer does not say which bytes a
            token stands for.
    """
    ids = tokenizer.encode(text)
    ends = np.cumsum([tokenizer.count_bytes([token]) for token in ids])
    # Not `text`: a tokenizer may normalise what it reads.
    whole = tokenizer.decode(ids)
    if not len(ids) or ends[-1] != len(whole.encode("utf-8")):
        raise ConfigError(
            f"tokenizer {tokenizer.name!r} does not say which bytes each of its tokens stands for; "
            "legal here: byte, bpe-4096 and byte-level vocabularies of the hub"
        )
    needle_parts = [*needle_spans(whole), *_occurrences(whole, needles)]
    owners = _character_of_each_byte(whole)
    count = _whole_characters(ends, owners, min(max_tokens, len(ids)))
    note = ""
    if count < len(ids) or of_what:
        note = f"cut after the first {count:,} tokens {of_what or f'of {len(ids):,}'}"
    bounds = np.concatenate(([0], ends[:count]))
    token_spans = [
        (int(owners[start]), int(owners[end - 1]) + 1) for start, end in itertools.pairwise(bounds)
    ]
    classes_T = classify_tokens(whole, classify_characters(whole, needle_parts), token_spans)
    kept = whole[: token_spans[-1][1]]
    return TokenText(kept, ids[:count], classes_T, _pieces(whole, token_spans), note)


def shown(text: str) -> str:
    """`text` with everything invisible made visible; line breaks and tabs still act."""
    return "".join(_shown_character(character) for character in text)


def _shown_character(character: str) -> str:
    if character in _VISIBLE:
        return _VISIBLE[character]
    if character < " ":
        return chr(0x2400 + ord(character))
    category = unicodedata.category(character)
    if category.startswith("M"):
        return f"◌{character}"
    if category in ("Cc", "Cf", "Co", "Cn", "Zl", "Zp"):
        return f"⟨U+{ord(character):04X}⟩"
    return character


def _occurrences(text: str, needles: Sequence[str]) -> list[tuple[int, int]]:
    spans = []
    for needle in needles:
        found = -1 if not needle else text.find(needle)
        if found < 0:
            raise ConfigError(f"--needle {needle!r} does not occur in the text that is read")
        while found >= 0:
            spans.append((found, found + len(needle)))
            found = text.find(needle, found + 1)
    return spans


def _character_of_each_byte(text: str) -> np.ndarray:
    """Index of the character that each UTF-8 byte belongs to."""
    data = np.frombuffer(text.encode("utf-8"), dtype=np.uint8)
    return np.cumsum((data & 0xC0) != 0x80) - 1


def _whole_characters(ends: np.ndarray, owners: np.ndarray, count: int) -> int:
    """`count`, changed so that the tokens before it do not end inside a character."""

    def splits(number: int) -> bool:
        end = ends[number - 1]
        return end < len(owners) and owners[end] == owners[end - 1]

    lower = count
    while lower and splits(lower):
        lower -= 1
    if lower:
        return lower
    while splits(count):
        count += 1
    return count


def _pieces(text: str, spans: Sequence[tuple[int, int]]) -> list[Piece]:
    pieces: list[Piece] = []
    for index, (start, end) in enumerate(spans):
        if pieces and start < spans[index - 1][1]:
            first = pieces.pop()
            start = spans[first.start][0]
            pieces.append(Piece(first.start, index + 1, text[start:end]))
        else:
            pieces.append(Piece(index, index + 1, text[start:end]))
    return pieces
