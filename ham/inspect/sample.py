"""A fixed text to inspect: a stretch of a held-out document, then a needle document."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from ham.errors import ConfigError, MissingDataError
from ham.ruler.generator import RulerGenerator
from ham.ruler.haystacks import Essays
from ham.train.shards import TokenShard
from ham.train.tokenizer import Tokenizer

PARAGRAPH_CHARACTERS = 1200
HAYSTACK_TOKENS = 384
ESSAY_CHARACTERS = 200_000
NEEDLE_TASK = "niah_single_2"
NEEDLE_DEPTH = 0.5
_SEED = 20260322
_CLOSES = re.compile(r"[.!?][\"”’']?\s")


def sample_text(shard_path: Path, tokenizer: Tokenizer) -> str:
    """The sample of a shard; the same shard gives the same text.

    The stretch begins at the first blank line of the second third of the shard's first document,
    past titles and tables of contents. The needle stands in the middle of its own document.

    Args:
        shard_path: A `.tokens` file, normally `test.tokens`.
        tokenizer: That of the model; the shard must have been made with it.

    Raises:
        MissingDataError: If there is no such shard or it holds no document.
        CorruptFileError: If it is truncated or changed.
        ConfigError: If it was made with another tokenizer or is too short for a needle document.
    """
    shard = TokenShard.open(shard_path)
    made = (shard.tokenizer_name, shard.vocabulary_size)
    if made != (tokenizer.name, tokenizer.vocabulary_size):
        raise ConfigError(
            f"{shard_path} was made with tokenizer {made[0]!r} ({made[1]} tokens); the model has "
            f"{tokenizer.name!r} ({tokenizer.vocabulary_size} tokens)"
        )
    first = next(shard.documents(), None)
    if first is None:
        raise MissingDataError(f"{shard_path} holds no document; run `ham prepare` again")
    generator = RulerGenerator(tokenizer, Essays.from_shard(tokenizer, shard, ESSAY_CHARACTERS))
    length = generator.minimum_length(NEEDLE_TASK) + HAYSTACK_TOKENS
    needle = generator.sample(NEEDLE_TASK, np.random.default_rng(_SEED), length, NEEDLE_DEPTH)
    # The haystack is cut at tokens, which may be inside a character.
    hidden = tokenizer.decode(needle.tokens.tolist()).replace("\ufffd", "")
    return f"{_stretch(tokenizer.decode(first))}\n\n{hidden}"


def _stretch(text: str) -> str:
    """Whole sentences, about `PARAGRAPH_CHARACTERS` of them in characters."""
    begin = text.find("\n\n", len(text) // 3)
    text = text[max(begin, 0) :].lstrip()[: 2 * PARAGRAPH_CHARACTERS]
    end = _CLOSES.search(text, PARAGRAPH_CHARACTERS)
    return text[: end.start() + 1] if end else text[:PARAGRAPH_CHARACTERS]
