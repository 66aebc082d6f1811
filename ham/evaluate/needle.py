"""Needle in a haystack: RULER's retrieval tasks (`ham/ruler/README.md`), asked of one model.

Two scores. Teacher-forced, a sample counts as right if greedy decoding would give every token of
every answer, with the true answers before it in the context. Generated, RULER's own scorers look
for the answers in the model's text; a row also says for how many first answers both agree
(`generated_as_scored`). All samples of a task and length that are generated decode in one batch, on
a GPU by the kernels of `ham.decoding` where the model has them. For a model that routes, the rows
also say which needles entered the cache, in how many layers, and how often a needle was answered
given that.

Every model is asked the same questions: they follow from task, length, depth and number alone.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from ham.errors import ConfigError
from ham.evaluate.needle_rows import (
    EXPERIMENT,
    Asked,
    answer_rows,
    generation_rows,
    kept_rows,
    left_out_row,
    routed_rows,
    too_long_rows,
)
from ham.evaluate.part import EVALUATION_SEED, Cell, Fields, Subject
from ham.evaluate.scoring import RoutingCount
from ham.ruler.generator import RulerGenerator
from ham.ruler.haystacks import Essays
from ham.ruler.tasks import RulerTask, ruler_task

if TYPE_CHECKING:
    from ham.config import NeedleConfig
    from ham.ruler.sample import RulerSample
    from ham.train.shards import TokenShard
    from ham.train.tokenizer import Tokenizer

_DEPTH_STEPS = 10_000
_TOKENS_AT_ONCE = {"cpu": 1 << 15, "cuda": 1 << 19}
"""Tokens of prompts and answers that decode together, by device."""

DepthGroups = dict[float | None, list["RulerSample"]]


class Questions:
    """The questions of one tokenizer on one held-out split.

    Args:
        tokenizer: That of the model.
        shard: Its documents are the essays; read when a task first needs them.
    """

    def __init__(self, tokenizer: Tokenizer, shard: TokenShard):
        self.tokenizer = tokenizer
        self.shard = shard
        self._plain = RulerGenerator(tokenizer, Essays(np.empty(0, dtype=np.int64)))

    def minimum_length(self, task: str) -> int:
        """See `RulerGenerator`."""
        return self._plain.minimum_length(task)

    def ask(
        self, task: RulerTask, length: int, depths: Sequence[float], samples: int
    ) -> DepthGroups:
        """Samples by depth; a task of several answers has as many in one group, without a depth."""
        generator = self._with_essays if task.haystack == "essay" else self._plain
        groups: dict[float | None, int] = dict.fromkeys(depths, samples)
        if not task.has_depth:
            groups = {None: samples * len(depths)}
        made: DepthGroups = {}
        for depth, count in groups.items():
            step = _DEPTH_STEPS + 1 if depth is None else round(depth * _DEPTH_STEPS)
            key = (EVALUATION_SEED, zlib.crc32(task.name.encode()), length, step)
            made[depth] = [
                generator.sample(task.name, np.random.default_rng((*key, number)), length, depth)
                for number in range(count)
            ]
        return made

    @cached_property
    def _with_essays(self) -> RulerGenerator:
        return RulerGenerator(self.tokenizer, Essays.from_shard(self.tokenizer, self.shard))


def cells(subject: Subject) -> list[Cell]:
    """One cell per task and length.

    Raises:
        ConfigError: If a length is below the minimum of a task.
    """
    settings = subject.config.evaluate.needle
    if settings is None:
        return []
    questions = Questions(subject.tokenizer, subject.test)
    made = []
    for name in settings.tasks:
        task, minimum = ruler_task(name), questions.minimum_length(name)
        for length in settings.lengths_of(name):
            if length < minimum:
                raise ConfigError(
                    f"evaluate.needle asks {name} at {length} tokens; with tokenizer "
                    f"{subject.tokenizer.name!r} it has at least {minimum}"
                )
            made.append(_cell(subject, questions, settings, task, length))
    return made


def _cell(
    subject: Subject, questions: Questions, settings: NeedleConfig, task: RulerTask, length: int
) -> Cell:
    depths: Sequence[float | None] = settings.depths if task.has_depth else [None]
    generated = settings.generated_of(task.name, task.has_depth)
    metrics = ["accuracy", "answer_loss_nats"]
    if generated:
        metrics.append("string_match_all")
    return Cell(
        f"{task.name}, {length} tokens",
        [
            {"metric": metric, **coordinates(task.name, length, depth)}
            for depth in depths
            for metric in metrics
        ],
        lambda: Exam(subject, task, length, generated).rows(
            questions.ask(task, length, settings.depths, settings.samples)
        ),
    )


def coordinates(task: str, length: int, depth: float | None = None) -> Fields:
    """Where a needle stands in the plots."""
    return {
        "experiment": EXPERIMENT,
        "task": task,
        "x_name": "length",
        "x_value": length,
        "labels": {} if depth is None else {"depth": depth},
    }


@dataclass
class Exam:
    """One task at one length, asked of one model.

    Attributes:
        subject: The model.
        task: The task.
        length: Tokens of prompt and answers that were asked for.
        generate: How many samples of each depth are answered by generation too, the first ones.
    """

    subject: Subject
    task: RulerTask
    length: int
    generate: int = 0

    def rows(self, groups: DepthGroups) -> list[Fields]:
        """All rows of these samples; the ones beyond the model's range are counted, never cut."""
        limit = self.subject.model.config.max_positions
        asked = [sample for group in groups.values() for sample in group]
        fitting = [sample for sample in asked if len(sample.tokens) <= limit + 1]
        overall = coordinates(self.task.name, self.length)
        missing = len(asked) - len(fitting)
        rows = [left_out_row(overall, "samples_left_out", missing, len(asked))]
        if not fitting:
            error = f"all {len(asked)} samples are longer than the model's {limit} positions"
            expected = [coordinates(self.task.name, self.length, depth) for depth in groups]
            return rows + too_long_rows(expected, "accuracy", error)
        routing = RoutingCount()
        answered = self._score(fitting, routing)
        common = {"kv_fraction": self.subject.kv_fraction(routing, self.length)}
        if self.generate:
            chosen = [sample for group in groups.values() for sample in group[: self.generate]]
            able = [answered[id(sample)] for sample in chosen if id(sample) in answered]
            rows += self._generate(able, overall)
        for depth, group in groups.items():
            here = {**coordinates(self.task.name, self.length, depth), **common}
            own = [answered[id(sample)] for sample in group if id(sample) in answered]
            if own:
                rows += answer_rows(own, here)
                rows += generation_rows(own, here)
                rows += kept_rows(own, here, list(routing.routed))
        return rows + routed_rows(list(answered.values()), {**overall, **common})

    def _score(self, samples: list[RulerSample], routing: RoutingCount) -> dict[int, Asked]:
        scores = self.subject.score(
            [sample.tokens for sample in samples], routing, keep_routed=self.subject.model.routes
        )
        return {
            id(sample): Asked(sample, score) for sample, score in zip(samples, scores, strict=True)
        }

    def _generate(self, chosen: Sequence[Asked], overall: Fields) -> list[Fields]:
        """Fill in the generated texts; returns the rows of the samples without room for one."""
        from ham.model.generation import generate

        model, tokenizer = self.subject.model, self.subject.tokenizer
        limit = model.config.max_positions
        room = limit - self.task.new_tokens
        able = [asked for asked in chosen if len(asked.sample.prompt) <= room]
        missing = len(chosen) - len(able)
        rows = [left_out_row(overall, "generations_left_out", missing, len(chosen))]
        if not able:
            error = f"no prompt leaves room for {self.task.new_tokens} of {limit} positions"
            return rows + too_long_rows([overall], "string_match_all", error)
        texts = generate(
            model,
            [asked.sample.prompt.tolist() for asked in able],
            self.task.new_tokens,
            lambda tokens: tokens[-1] == tokenizer.end_of_text,
            batch_size=self._batch_size(),
            on_finished=self.subject.on_batch,
        )
        for asked, tokens in zip(able, texts, strict=True):
            asked.continued = tokens
            asked.generated = tokenizer.decode(tokens)
        return rows

    def _batch_size(self) -> int:
        """Every step of a batch costs nearly the same however many decode, as memory allows."""
        at_once = _TOKENS_AT_ONCE[self.subject.model.device.type]
        return max(1, at_once // (self.length + self.task.new_tokens))
