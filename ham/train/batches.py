"""Training batches as a pure function of the seed and the step.

No position is ever stored: a run resumed at step s reads exactly the rows that an undisturbed run
reads there, and every architecture reads the same rows in the same order.

Text rows are windows of `context` + 1 tokens of the shard's stream, in which an end-of-text token
closes each document. The windows of one epoch tile the stream from a random phase and come in a
random order, each at most once. With probability `recall_fraction`, a row is made of recall
documents instead and the window at its place in the order is skipped. Of such a row only what
follows from earlier tokens is a target, as in multi-query associative recall (arXiv 2312.04927):
random keys and values teach nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ham.errors import ConfigError
from ham.model.decoder import IGNORED
from ham.ruler.generator import RulerGenerator
from ham.ruler.haystacks import Essays
from ham.train.needle_documents import needles_document
from ham.train.recall_documents import RecallDocument, copies_document, pairs_document
from ham.train.shards import TokenShard
from ham.train.tokenizer import Tokenizer

MAX_TRAINING_PAIRS = 64
MOST_REPEATS = 30
"""Questions for a key beyond the first, on average, in a pairs document for training."""
COPY_ROWS, SAMPLE_ROWS, NEEDLE_ROWS = 0.15, 0.1, 0.4
"""Shares of recall rows that are copies, begin with samples of RULER, and are needles documents."""
NEEDLE_TASKS = ("niah_single_1", "niah_single_2", "niah_multikey_1", "niah_multikey_2")
"""RULER tasks that recall documents are taken from, each as often; their essays are training text,
in which a needle may stand between any two tokens."""

ROWS_TRIED = 100

# Streams of random numbers that must not depend on each other.
_EPOCH_STREAM, _RECALL_STREAM, _CHOICE_STREAM = 1, 2, 3


class Batch(NamedTuple):
    """Rows of one step.

    Attributes:
        inputs_BT: Int64 tokens.
        targets_BT: Int64; the inputs shifted by one, so row b, column t is to be predicted from
            columns 0..t of `inputs_BT`. `IGNORED`: not to be predicted, in recall rows.
        is_recall_B: Boolean; which rows are made of recall documents.
    """

    inputs_BT: Tensor
    targets_BT: Tensor
    is_recall_B: Tensor


class BatchSampler:
    """Draws the rows of any step.

    Args:
        shard: Token stream to read.
        tokenizer: The tokenizer of that shard.
        context: Tokens T of a row.
        batch_size: Rows B of a batch.
        recall_fraction: Probability that a row is made of recall documents, 0..1.
        seed: Decides the order, the phases and the recall documents.

    Raises:
        ConfigError: If the shard was made by another tokenizer or is shorter than one row.
    """

    def __init__(
        self,
        shard: TokenShard,
        tokenizer: Tokenizer,
        context: int,
        batch_size: int,
        recall_fraction: float,
        seed: int,
    ):
        if shard.tokenizer_name != tokenizer.name:
            raise ConfigError(
                f"the shard was made with tokenizer {shard.tokenizer_name!r}, not "
                f"{tokenizer.name!r}; run `ham prepare` again"
            )
        if len(shard.tokens) <= context:
            raise ConfigError(
                f"a context of {context} tokens needs a shard of at least {context + 1}, "
                f"it has {len(shard.tokens)}"
            )
        self.shard = shard
        self.tokenizer = tokenizer
        self.context = context
        self.batch_size = batch_size
        self.recall_fraction = recall_fraction
        self.seed = seed
        self.windows = max(1, (len(shard.tokens) - context) // context)
        self._needles = RulerGenerator(tokenizer, Essays(shard.tokens))
        self._needle_tasks = [
            task for task in NEEDLE_TASKS if context + 1 >= self._needles.minimum_length(task)
        ]
        # Bound to this object, so that dropping a sampler drops its permutations.
        self._epoch = functools.lru_cache(maxsize=2)(self._draw_epoch)

    def batch(self, step: int) -> Batch:
        """The batch of a step, from 0; the same for the same seed and step."""
        places = step * self.batch_size + np.arange(self.batch_size, dtype=np.uint64)
        chances = _uniform(places, self.seed, _CHOICE_STREAM)
        is_recall = chances < self.recall_fraction
        inputs = np.empty((self.batch_size, self.context), dtype=np.int64)
        targets = np.empty_like(inputs)
        for row, place in enumerate(places.tolist()):
            tokens, wanted = (
                self._recall_row(place) if is_recall[row] else (self._text_row(place), True)
            )
            inputs[row] = tokens[:-1]
            targets[row] = np.where(wanted, tokens, IGNORED)[1:]
        return Batch(*map(torch.from_numpy, (inputs, targets, is_recall)))

    def _text_row(self, place: int) -> np.ndarray:
        epoch, index = divmod(place, self.windows)
        phase, order = self._epoch(epoch)
        start = phase + int(order[index]) * self.context
        return self.shard.tokens[start : start + self.context + 1].astype(np.int64)

    def _draw_epoch(self, epoch: int) -> tuple[int, np.ndarray]:
        """Phase and order of the windows of one epoch."""
        rng = np.random.default_rng((self.seed, _EPOCH_STREAM, epoch))
        last = len(self.shard.tokens) - 1 - self.windows * self.context
        phase = int(rng.integers(min(self.context, last + 1)))
        return phase, rng.permutation(self.windows)

    def _recall_row(self, place: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of recall documents of one kind, and which of them are answers; at least one is.

        A row that ends before its first answer is drawn again: without a target its mean loss would
        be 0 / 0 where it is a micro-batch of its own.

        Raises:
            ConfigError: If the context is too short for any answer.
        """
        rng = np.random.default_rng((self.seed, _RECALL_STREAM, place))
        for _ in range(ROWS_TRIED):
            tokens, wanted = self._draw_recall_row(rng)
            if wanted[1:].any():
                return tokens, wanted
        raise ConfigError(
            f"{ROWS_TRIED} rows of {self.context} tokens had no answer of a recall document; "
            "data.recall_fraction above 0 needs a longer data.context"
        )

    def _draw_recall_row(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        tokens = np.empty(self.context + 1, dtype=np.int64)
        wanted = np.zeros(len(tokens), dtype=bool)
        start = 0
        for document in self._recall_documents(rng, len(tokens)):
            size = min(len(document.tokens), len(tokens) - start)
            tokens[start : start + size] = document.tokens[:size]
            for first, end in document.answers:
                wanted[start + first : start + end] = True
            start += size
            if start == len(tokens):
                break
        return tokens, wanted

    def _recall_documents(self, rng: np.random.Generator, length: int) -> Iterator[RecallDocument]:
        """Endless documents of one kind; samples of RULER end with those that fit `length`.

        All but these ask often: where each key was asked for once, models of five million
        parameters stayed at chance (81 M tokens, five arms; CHANGELOG.md).
        """
        kind = rng.random()
        if kind < COPY_ROWS:
            while True:
                yield copies_document(rng, self.tokenizer)
        if kind < COPY_ROWS + SAMPLE_ROWS and self._needle_tasks:
            yield from self._needle_samples(rng, length)
        elif kind < COPY_ROWS + SAMPLE_ROWS + NEEDLE_ROWS and self._needle_tasks:
            while True:
                yield needles_document(self._needles.pieces, self._needles.essays, rng)
        # Each octave of sizes gets the same share of first questions: small documents teach the
        # look-up that large ones then need. A pair takes two lines of three bytes.
        most = min(MAX_TRAINING_PAIRS, max(2, length // 12))
        while True:
            pairs = int(2 / (1 - rng.random() * (1 - 2 / (most + 1))))
            # A quarter, half or all of a row: keys return in the next document with other values,
            # so many short ones in a row contradict each other.
            lines = (length >> int(rng.integers(3))) // 3
            repeats = min(max(0, lines - 2 * pairs), MOST_REPEATS * pairs)
            yield pairs_document(rng, self.tokenizer, pairs, pairs, repeats)

    def _needle_samples(self, rng: np.random.Generator, room: int) -> Iterator[RecallDocument]:
        """Samples of RULER as long as another fits; log-uniform, as near needles teach far ones."""
        longest = room
        while True:
            task = self._needle_tasks[int(rng.integers(len(self._needle_tasks)))]
            least = self._needles.minimum_length(task)
            if room < least:
                return
            size = min(room, int(least * (longest / least) ** rng.random()))
            sample = self._needles.sample(task, rng, size, float(rng.random()))
            yield RecallDocument(sample.tokens.tolist(), sample.answers)
            room -= len(sample.tokens)


def _uniform(places: np.ndarray, seed: int, stream: int) -> np.ndarray:
    """Numbers in [0, 1) that depend on each place alone: splitmix64 of seed, stream and place."""
    with np.errstate(over="ignore"):
        state = places + np.uint64((seed * 0x9E3779B97F4A7C15 + stream) % 2**64)
        for _ in range(2):
            state = state + np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return (state >> np.uint64(11)).astype(np.float64) / 2**53
