"""Finds passages that two sets of documents share, to prove that no split leaks into another.

A passage is a run of at least `words` consecutive words, compared without case, punctuation and
line breaks, so that verse, wrapped prose and re-typed quotations are all caught. Runs are found by
comparing 64-bit hashes: a chance collision is a false alarm, never a miss.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")


@dataclass(frozen=True)
class SharedPassage:
    """A passage that stands in a held-out document and in another set.

    Attributes:
        document: Index of the held-out document.
        other: Index of one document of the other set that holds its first words.
        words: Length of the passage in words.
        text: The passage, in lower case without punctuation.
    """

    document: int
    other: int
    words: int
    text: str


def shared_passages(
    held_out: Sequence[str], others: Sequence[str], words: int = 20
) -> list[SharedPassage]:
    """Every maximal passage of at least `words` words of `held_out` that occurs in `others`.

    Args:
        held_out: Texts to examine.
        others: Texts they must not share passages with.
        words: Shortest passage that counts.
    """
    vocabulary: dict[str, int] = {}
    other_hashes = [_window_hashes(_numbers(text, vocabulary)[1], words) for text in others]
    lengths = [len(hashes) for hashes in other_hashes]
    stacked = np.concatenate([*other_hashes, np.empty(0, np.uint64)])
    order = np.argsort(stacked, kind="stable")
    in_order = stacked[order]
    bounds = np.cumsum(lengths)

    found = []
    for index, text in enumerate(held_out):
        tokens, numbers = _numbers(text, vocabulary)
        hashes = _window_hashes(numbers, words)
        place = np.searchsorted(in_order, hashes)
        inside = place < len(in_order)
        hit = np.zeros(len(hashes), bool)
        hit[inside] = in_order[place[inside]] == hashes[inside]
        for start, end in _runs(hit):
            other = int(np.searchsorted(bounds, order[place[start]], side="right"))
            count = end - start + words - 1
            found.append(
                SharedPassage(index, other, count, " ".join(tokens[start : start + count]))
            )
    return found


def _numbers(text: str, vocabulary: dict[str, int]) -> tuple[list[str], np.ndarray]:
    tokens = _WORD.findall(text.lower())
    numbers = [vocabulary.setdefault(token, len(vocabulary) + 1) for token in tokens]
    return tokens, np.array(numbers, dtype=np.uint64)


def _window_hashes(numbers: np.ndarray, words: int) -> np.ndarray:
    """One hash for each window of `words` numbers: a polynomial in an odd multiplier mod 2^64."""
    count = len(numbers) - words + 1
    if count < 1:
        return np.empty(0, np.uint64)
    multiplier = np.uint64(0x9E3779B97F4A7C15)
    hashes = np.zeros(count, np.uint64)
    # Mixing each number first keeps short vocabularies from cancelling in the polynomial.
    mixed = (numbers ^ (numbers >> np.uint64(7))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(31)
    for offset in range(words):
        hashes = hashes * multiplier + mixed[offset : offset + count]
    return hashes


def _runs(flags: np.ndarray) -> list[tuple[int, int]]:
    """Start and end of every run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flags.astype(np.int8), [0]])))
    return [(int(start), int(end)) for start, end in edges.reshape(-1, 2)]
