"""What is asked of a trained model: the parts of an evaluation and their sizes.

Part of `ham.config`, which has these names as well.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from ham.config_types import Fraction, NonNegative, Positive, Strict
from ham.ruler.tasks import TASKS as RULER_TASKS


class LanguageModellingConfig(Strict):
    """Bits per byte on held-out documents, with the loss by position."""

    tokens: Positive = 65_536
    contexts: list[Positive] = Field(
        default_factory=lambda: [512],
        description="Lengths of the windows; longer ones than data.context show what lies beyond.",
    )
    position_bins: Positive = 8
    rare_share: Fraction | None = Field(
        default=0.2,
        description="Rare are the least frequent words of the training text that together make up "
        "this share of it; null: no classes of words.",
    )


class LmEvalConfig(Strict):
    """Tasks run by lm-eval in one process per model."""

    tasks: list[str] = Field(
        default_factory=lambda: [
            "held_out_last_word",
            "held_out_continuation",
            "held_out_perplexity",
        ],
        description="Tasks of this project, sets of `ham fetch-evals`, hub:NAME for any task of "
        "lm-eval with data of the Hugging Face hub, or the path of a task file (.yaml).",
    )
    limit: Positive | None = Field(default=None, description="Documents per task; null for all.")
    batch_size: Positive = 16
    untrained: bool = Field(
        default=True, description="Ask the model as it was before training too, as a chance line."
    )


class NeedleConfig(Strict):
    """RULER's retrieval tasks over lengths and depths."""

    tasks: Annotated[list[str], Field(min_length=1)] = Field(
        default_factory=lambda: ["niah_single_1", "niah_single_2"],
        description="niah_single_1..3, niah_multikey_1..3, niah_multivalue, niah_multiquery, vt.",
    )
    lengths: list[Positive] = Field(
        default_factory=lambda: [512],
        description="Tokens of prompt and answers; each task has a least length per tokenizer.",
    )
    task_lengths: dict[str, list[Positive]] = Field(
        default_factory=dict, description="Lengths of single tasks, instead of `lengths`."
    )
    depths: Annotated[list[Fraction], Field(min_length=1)] = Field(
        default_factory=lambda: [0.0, 0.25, 0.5, 0.75, 1.0]
    )
    samples: Positive = Field(
        default=20,
        description="Needles per length and depth; a task of several answers has as many in all.",
    )
    generate: bool = Field(
        default=False, description="Also generate answers and score them as RULER does."
    )
    generate_tasks: list[str] | None = Field(
        default=None, description="With `generate`: of these tasks only; null: of all."
    )
    generate_samples: Positive | None = Field(
        default=None,
        description="With `generate`: so many of the samples per length and depth, the first ones; "
        "null: all.",
    )

    @model_validator(mode="after")
    def _tasks_exist(self) -> NeedleConfig:
        generated = self.generate_tasks or []
        named = (*self.tasks, *self.task_lengths, *generated)
        unknown = [name for name in named if name not in RULER_TASKS]
        if unknown:
            raise ValueError(
                f"unknown needle task {unknown[0]!r}; known: {', '.join(sorted(RULER_TASKS))}"
            )
        unused = [name for name in self.task_lengths if name not in self.tasks]
        if unused:
            raise ValueError(f"task_lengths names {unused[0]!r}, which is not among the tasks")
        unasked = [name for name in generated if name not in self.tasks]
        if unasked:
            raise ValueError(f"generate_tasks names {unasked[0]!r}, which is not among the tasks")
        if len(set(self.tasks)) != len(self.tasks):
            raise ValueError(f"tasks must differ; received {self.tasks}")
        return self

    def lengths_of(self, task: str) -> list[int]:
        """At which lengths a task is asked."""
        return self.task_lengths.get(task, self.lengths)

    def generated_of(self, task: str, has_depth: bool) -> int:
        """How many samples of a task are generated, per depth or, without depths, in all."""
        if not self.generate or (
            self.generate_tasks is not None and task not in self.generate_tasks
        ):
            return 0
        samples = self.samples if self.generate_samples is None else self.generate_samples
        return min(samples, self.samples) * (1 if has_depth else len(self.depths))


class RecallConfig(Strict):
    """Multi-query associative recall."""

    pairs: list[Positive] = Field(default_factory=lambda: [2, 4, 8])
    samples: Positive = 20


class DialConfig(Strict):
    """One trained HAM, thresholds recalibrated for several fractions, no retraining."""

    fractions: list[Fraction] = Field(
        default_factory=lambda: [0.0, 0.0625, 0.125, 0.25, 0.5, 0.75, 1.0]
    )
    tokens: Positive = 16_384
    samples: NonNegative = Field(
        default=4,
        description="In place of the samples of needle and recall, at each fraction; 0: not asked.",
    )


class EvaluateConfig(Strict):
    """What is measured on a trained model; a missing part is not run."""

    language_modelling: LanguageModellingConfig | None = LanguageModellingConfig()
    lm_eval: LmEvalConfig | None = LmEvalConfig()
    needle: NeedleConfig | None = NeedleConfig()
    recall: RecallConfig | None = RecallConfig()
    dial: DialConfig | None = DialConfig()
