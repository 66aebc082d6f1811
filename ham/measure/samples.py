"""How many samples a minute one core makes, by its processor time: a busy machine counts less."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from ham.files import read_json
from ham.ruler.generator import RulerGenerator
from ham.ruler.haystacks import Essays
from ham.ruler.showcase import ESSAY
from ham.ruler.tasks import TASKS
from ham.study.data import draw_examples, generator
from ham.train.batches import BatchSampler
from ham.train.prepare import SUMMARY_FILE
from ham.train.recall_documents import pairs_document
from ham.train.shards import TokenShard
from ham.train.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from ham.study.config import MqarConfig

_SAMPLES = 500
_DEPTH = 0.3


class Speed(NamedTuple):
    """Samples a minute of one task; `tokens` of each at most."""

    task: str
    tokens: int
    per_minute: float

    def __str__(self) -> str:
        return f"{self.task:<36}{self.tokens:>7,} tokens{self.per_minute:>12,.0f} samples a minute"


class Haystack(NamedTuple):
    """Tokenised text to hide things in, and its tokenizer."""

    tokenizer: Tokenizer
    shard: TokenShard

    @classmethod
    def open(cls, data: Path | None) -> Haystack:
        """The test split of a data folder, or bytes of a built-in text.

        Raises:
            MissingDataError, CorruptFileError: If the folder lacks its files or they are damaged.
        """
        if data is None:
            return cls(ByteTokenizer(), _built_in(ByteTokenizer()))
        name = read_json(data / SUMMARY_FILE)["tokenizer"]["name"]
        return cls(load_tokenizer(name, data), TokenShard.open(data / "test.tokens"))


def needle_speeds(hay: Haystack, length: int, samples: int = _SAMPLES) -> Iterator[Speed]:
    """Of every task of RULER, at its minimum where that is longer."""
    made = RulerGenerator(hay.tokenizer, Essays.from_shard(hay.tokenizer, hay.shard))
    for task in TASKS:
        tokens = max(length, made.minimum_length(task))

        def make(seed: int, task: str = task, tokens: int = tokens) -> None:
            made.sample(task, np.random.default_rng(seed), tokens, _DEPTH)

        yield Speed(task, tokens, _per_minute(make, samples))


def recall_speeds(hay: Haystack, length: int, samples: int = _SAMPLES) -> Iterator[Speed]:
    """Of documents of pairs, each asked for once, and of rows of all kinds of recall documents."""

    def document(seed: int, pairs: int) -> list[int]:
        return pairs_document(np.random.default_rng(seed), hay.tokenizer, pairs, pairs).tokens

    pairs = 1
    while len(document(0, pairs + 1)) <= length:
        pairs += 1
    speed = _per_minute(lambda seed: document(seed, pairs), samples)
    yield Speed(f"recall, {pairs} pairs", len(document(0, pairs)), speed)
    # A row has one token more than the context, the last target.
    rows = BatchSampler(hay.shard, hay.tokenizer, length - 1, 1, recall_fraction=1.0, seed=0)
    yield Speed("training rows", length, _per_minute(rows.batch, samples))


def mqar_speeds(config: MqarConfig, samples: int = _SAMPLES) -> Iterator[Speed]:
    """Of every task of a study at its longest evaluated size, in batches as evaluation draws."""
    threads, batch = torch.get_num_threads(), config.evaluate.batch_size
    torch.set_num_threads(1)
    try:
        for task in config.reported_tasks:
            size = max(config.sizes(task), key=lambda size: (size.length, size.pairs))
            random = generator(torch.device("cpu"), "speed", *task.key)

            def make(_: int, task=task, size=size, random=random) -> None:
                vocabulary = config.vocabulary_size
                draw_examples(batch, size, task, random, vocabulary_size=vocabulary)

            speed = batch * _per_minute(make, -(-samples // batch))
            yield Speed(f"{task}, {size.pairs} pairs", size.length, speed)
    finally:
        torch.set_num_threads(threads)


def _per_minute(make: Callable[[int], object], calls: int) -> float:
    """Calls a minute; the first, which fills caches, is not timed."""
    make(0)
    begin = time.process_time()
    for seed in range(calls):
        make(seed)
    return 60 * calls / (time.process_time() - begin)


def _built_in(tokenizer: Tokenizer, copies: int = 2000) -> TokenShard:
    document = np.append(tokenizer.encode(ESSAY), tokenizer.end_of_text)
    return TokenShard(
        tokens=np.tile(document, copies).astype(np.uint16),
        document_offsets=len(document) * np.arange(copies + 1),
        byte_count=len(ESSAY.encode()) * copies,
        tokenizer_name=tokenizer.name,
        vocabulary_size=tokenizer.vocabulary_size,
        end_of_text=tokenizer.end_of_text,
        sha256="",
    )
