"""How many samples a minute one core makes, by its processor time: a busy machine counts less."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ham.files import read_json
from ham.ruler.generator import RulerGenerator
from ham.ruler.haystacks import Essays
from ham.ruler.showcase import ESSAY
from ham.ruler.tasks import TASKS
from ham.train.tokenizer import ByteTokenizer, load_tokenizer

_SAMPLES = 500
_DEPTH = 0.3


class Speed(NamedTuple):
    """Samples a minute of one task; `tokens` of each at most."""

    task: str
    tokens: int
    per_minute: float


def open_generator(data: Path | None) -> RulerGenerator:
    """A generator on the test split of a data folder, or on bytes of a built-in text.

    Raises:
        MissingDataError, CorruptFileError: If the folder lacks its files or they are damaged.
    """
    if data is None:
        return RulerGenerator(ByteTokenizer(), Essays.from_texts(ByteTokenizer(), [ESSAY] * 2000))
    from ham.train.prepare import SUMMARY_FILE
    from ham.train.shards import TokenShard

    name = read_json(data / SUMMARY_FILE)["tokenizer"]["name"]
    tokenizer = load_tokenizer(name, data)
    return RulerGenerator(
        tokenizer, Essays.from_shard(tokenizer, TokenShard.open(data / "test.tokens"))
    )


def measure(generator: RulerGenerator, length: int, samples: int = _SAMPLES) -> Iterator[Speed]:
    """Speed of every task, at its minimum where that is longer; the first sample is not timed."""
    for task in TASKS:
        tokens = max(length, generator.minimum_length(task))
        generator.sample(task, np.random.default_rng(0), tokens, _DEPTH)
        begin = time.process_time()
        for seed in range(samples):
            generator.sample(task, np.random.default_rng(seed), tokens, _DEPTH)
        yield Speed(task, tokens, 60 * samples / (time.process_time() - begin))
