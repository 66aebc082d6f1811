"""Classes of tokens by the word they belong to: recalled or not, rare or frequent.

Words are what stands between white space, so that the classes are the same whatever the tokenizer:
every byte belongs to its word, and a token to the word of its last byte that is not white space.

- `recall`: the word and the one before it stood side by side earlier in the window. This is the
  associative-recall hit of Zoology (Arora et al., arXiv 2312.04927, section 3: the last token of a
  bigram that occurred earlier in the context), on words in place of tokens, because pairs of bytes
  nearly always repeat. Zoology leaves out bigrams that are frequent in training; `recall_rare` does
  so by the frequency of the word.
- `other`: every other word.
- `rare` and `frequent`: by how often the word occurs in the training text. The rare words are the
  least frequent ones that together make up at most a declared share of its words.

White space before a word that a byte tokenizer has as a token of its own, and words that a window
cuts, belong to no class.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ham.train.shards import TokenShard
from ham.train.tokenizer import ByteTokenizer, Tokenizer

TOKEN_CLASSES = ("recall", "other", "recall_rare", "rare", "frequent")
COUNTED_TOKENS = 1 << 22
"""Tokens of the training text whose words are counted, in stretches spread over all of it."""

_STRETCHES = 64
_UNKNOWN_BYTE = b"\xff"
_WORD = re.compile(rb"\S+")


@dataclass
class Spelling:
    """The bytes that tokens stand for; one tokenizer's, looked up once a token."""

    tokenizer: Tokenizer
    _known: dict[int, bytes] = field(default_factory=dict)

    def __call__(self, tokens: Iterable[int]) -> list[bytes]:
        """The bytes of each token.

        As many as the token has; where a token is part of a character that it does not complete,
        their values are not known and all 255.
        """
        return [self._known.get(token) or self._look_up(token) for token in map(int, tokens)]

    def _look_up(self, token: int) -> bytes:
        if isinstance(self.tokenizer, ByteTokenizer):
            found = bytes([token]) if token < 256 else b""
        else:
            # Behind another token, because some decoders drop the space of the first.
            before = self.tokenizer.encode("a")
            text = self.tokenizer.decode([*before, token])
            found = text.removeprefix(self.tokenizer.decode(before)).encode()
            size = self.tokenizer.count_bytes([*before, token])
            size -= self.tokenizer.count_bytes(before)
            found = found if len(found) == size else _UNKNOWN_BYTE * size
        self._known[token] = found
        return found


@dataclass(frozen=True)
class WordCounts:
    """How often words occur in the training text, and which of them are rare.

    Attributes:
        counts: Occurrences by word.
        rare_below: A word that occurs less often is rare.
    """

    counts: Mapping[bytes, int]
    rare_below: int

    @classmethod
    def of(cls, counts: Mapping[bytes, int], rare_share: float) -> WordCounts:
        """Rare words are the least frequent that make up at most `rare_share` of all words.

        Words of one count are rare together or not at all; a word that was not counted is rare.
        """
        allowed = rare_share * sum(counts.values())
        taken, below = 0, 1
        for count, words in sorted(Counter(counts.values()).items()):
            taken += count * words
            if taken > allowed:
                break
            below = count + 1
        return cls(counts, below)

    def rare(self, word: bytes) -> bool:
        """Whether a word is rare."""
        return self.counts.get(word, 0) < self.rare_below


def count_words(shard: TokenShard, spelling: Spelling, limit: int = COUNTED_TOKENS) -> Counter:
    """Occurrences of words in a shard, or in evenly spaced stretches of `limit` tokens in all."""
    tokens = shard.tokens
    starts, length = [0], len(tokens)
    if len(tokens) > limit:
        length = limit // _STRETCHES
        starts = np.linspace(0, len(tokens) - length, _STRETCHES).astype(int).tolist()
    counts: Counter = Counter()
    for start in starts:
        part = tokens[start : start + length].tolist()
        known = dict(zip(distinct := set(part), spelling(distinct), strict=True))
        known[shard.end_of_text] = b"\n"
        words = b"".join(map(known.__getitem__, part)).split()
        # The first and the last word of a stretch are cut.
        counts.update(words if len(starts) == 1 else words[1:-1])
    return counts


def classify(spelled: Sequence[bytes], words: WordCounts) -> dict[str, np.ndarray]:
    """Which tokens of a window belong to each class: boolean, one entry a token.

    Args:
        spelled: The bytes of each token of the window, in order.
        words: Of the training text.
    """
    text = b"".join(spelled)
    ends = np.cumsum([len(part) for part in spelled], dtype=np.int64)
    found = [
        match for match in _WORD.finditer(text) if match.start() > 0 and match.end() < len(text)
    ]
    kinds = {name: np.zeros(len(found), dtype=bool) for name in TOKEN_CLASSES}
    seen: set[tuple[bytes, bytes]] = set()
    before: bytes | None = None
    for index, match in enumerate(found):
        word = match.group()
        recalled = before is not None and (before, word) in seen
        if before is not None:
            seen.add((before, word))
        before = word
        rare = words.rare(word)
        kinds["recall"][index], kinds["other"][index] = recalled, not recalled
        kinds["rare"][index], kinds["frequent"][index] = rare, not rare
        kinds["recall_rare"][index] = recalled and rare
    owner = _owners(text, ends, found)
    held = owner >= 0
    classes = {}
    for name, kind in kinds.items():
        classes[name] = np.zeros(len(spelled), dtype=bool)
        classes[name][held] = kind[owner[held]]
    return classes


def _owners(text: bytes, ends: np.ndarray, found: Sequence[re.Match]) -> np.ndarray:
    """Index of the word that each token belongs to, -1 for none."""
    word_of_byte = np.full(len(text) + 1, -1)
    for index, match in enumerate(found):
        word_of_byte[match.start() : match.end()] = index
    values = np.frombuffer(text, dtype=np.uint8)
    blank = np.isin(values, np.frombuffer(b" \t\n\r\f\v", dtype=np.uint8))
    last = np.maximum.accumulate(np.where(blank, -1, np.arange(len(text))))
    starts = np.concatenate(([0], ends[:-1]))
    owner = np.full(len(ends), -1)
    long = ends > starts
    position = last[ends[long] - 1]
    owner[long] = np.where(position >= starts[long], word_of_byte[position], -1)
    return owner
