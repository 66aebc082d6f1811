"""The configuration of an experiment: what its one YAML file may say, typed and validated.

`ham.config_files` reads such files into these classes. The JSON schema in `workflow/schemas/` is
generated from them, and a test compares the two.
"""

from __future__ import annotations

import sys
from typing import Annotated, Literal

from pydantic import Field, model_validator

from ham.config_arms import (
    EVICTABLE_MIXER,
    EVICTED_MIXER,
    ArmConfig,
    BetweenConfig,
    ExternalConfig,
    PlacementConfig,
)
from ham.config_data import DataConfig, HubDataConfig
from ham.config_evaluate import (
    DialConfig,
    EvaluateConfig,
    LanguageModellingConfig,
    LmEvalConfig,
    NeedleConfig,
    RecallConfig,
)
from ham.config_types import Fraction, NonNegative, Positive, PositiveFloat, Strict
from ham.errors import UnusableModelError, unknown_choice

__all__ = [
    "EVICTED_MIXER",
    "ArmConfig",
    "BetweenConfig",
    "Config",
    "DataConfig",
    "DialConfig",
    "EvaluateConfig",
    "ExternalConfig",
    "HubDataConfig",
    "LanguageModellingConfig",
    "LmEvalConfig",
    "MeasureConfig",
    "NeedleConfig",
    "PlacementConfig",
    "RecallConfig",
    "SkeletonConfig",
    "TrainConfig",
    "TuningConfig",
]


class SkeletonConfig(Strict):
    """The decoder that all architectures share; only the sequence mixer differs between them."""

    layers: Positive = 2
    width: Positive = 128
    heads: Positive = 4
    mlp_width: Positive | None = Field(
        default=None,
        description="Of the first trained arm; null: 8/3 of the width. The others' follows from "
        "match_parameters.",
    )
    max_positions: Positive = Field(
        default=8192, description="Longest sequence that any model may be asked to read."
    )
    match_parameters: bool = Field(
        default=True,
        description="Size each MLP so that totals agree with the first arm within 1 %.",
    )
    kernels: Literal["auto", "triton", "torch", "reference"] = Field(
        default="auto",
        description="Provider of the operations in `kernels/`; auto: Triton where it can run.",
    )

    @model_validator(mode="after")
    def _heads_divide_width(self) -> SkeletonConfig:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        if (self.width // self.heads) % 2:
            raise ValueError(f"head size {self.width // self.heads} must be even for RoPE")
        return self


class TrainConfig(Strict):
    """Optimisation; the same for every architecture."""

    steps: Positive = 100
    batch_size: Positive = Field(default=8, description="Sequences per optimiser step.")
    accumulate: Positive = Field(default=1, description="Micro-batches per optimiser step.")
    learning_rate: PositiveFloat = 2e-3
    final_learning_rate_ratio: Fraction = 0.1
    warmup_fraction: Fraction = 0.05
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    gradient_clip: PositiveFloat = 1.0
    freeze_fraction: Fraction = Field(
        default=0.1, description="Last share of steps with routing thresholds frozen (ham.md 3.7)."
    )
    checkpoint_seconds: PositiveFloat = Field(
        default=120.0, description="Time between checkpoints of the complete training state."
    )
    log_every: Positive = 10
    validation_every: Positive = Field(default=50, description="Steps between validation losses.")
    validation_batches: Positive = 4
    calibration_batches: Positive = Field(
        default=32,
        description="Batches of the calibration split that set the routing thresholds. Text varies "
        "between documents: 8,000 tokens missed a validation share by up to 0.03, 65,000 by 0.008.",
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description="auto: bfloat16 autocast on a CUDA device, float32 elsewhere."
    )
    compile: bool = Field(default=False, description="Compile forward and backward.")
    launch: Literal["auto", "eager", "cuda_graph"] = Field(
        default="auto",
        description="auto: a whole step as one CUDA graph on a GPU where that is possible.",
    )

    @model_validator(mode="after")
    def _accumulation_divides_batch(self) -> TrainConfig:
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of accumulate {self.accumulate}"
            )
        return self


class TuningConfig(Strict):
    """The learning rates that every arm is tried at; the best by validation loss is used.

    The same rates, seed and steps for all arms, so that none is tuned more than another.
    """

    learning_rates: Annotated[list[PositiveFloat], Field(min_length=2)]
    seed: NonNegative = Field(default=1000, description="Never one of the reported seeds.")
    steps: Positive | None = Field(
        default=None, description="Steps of a tuning run; null for those of training."
    )

    @model_validator(mode="after")
    def _rates_differ(self) -> TuningConfig:
        if len(set(self.learning_rates)) != len(self.learning_rates):
            raise ValueError(f"learning_rates must differ; received {self.learning_rates}")
        return self


class MeasureConfig(Strict):
    """Speed and memory against context length."""

    contexts: list[Positive] = Field(default_factory=lambda: [128, 256, 512, 1024])
    batch_size: Positive = 1
    decode_tokens: Positive = Field(default=16, description="Timed decode steps per context.")
    repeats: Positive = Field(default=5, description="Timed repetitions; the median is reported.")
    warmup: NonNegative = 2


class WorkflowConfig(Strict):
    """How the pipeline runs its jobs; no number depends on it."""

    jobs_per_process: Positive = Field(
        default=1,
        description="More than one: at most so many consecutive jobs share a process (`ham "
        "batch`), and with it the import of torch and what was compiled for their arm.",
    )
    processes_per_gpu: Positive = Field(
        default=1,
        description="Batches at a time on a GPU; needs jobs_per_process. Several pay for small "
        "models under CUDA's multi-process service (README.md). Speeds in training rows are then "
        "those of a shared GPU and labelled so; what `measure` times is timed last, alone.",
    )
    studies: list[str] = Field(
        default_factory=list,
        description="Files of studies (`ham mqar`) that belong to the experiment, by their paths "
        "in the checkout; their rows enter its report and its claims.",
    )
    study_jobs: Positive = Field(
        default=4,
        description="Programs of a study, each of several runs, side by side in a process "
        "(`ham mqar run --jobs`).",
    )


class Config(Strict):
    """One experiment, from data to report."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]*$")]
    title: str = ""
    scale: Literal["smoke", "full"] = Field(
        default="smoke", description="smoke: the report says that its numbers prove nothing."
    )
    status: Literal["runnable", "not run"] = "runnable"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads_per_job: Positive = Field(default=1, description="CPU threads of one training job.")
    seeds: Annotated[list[NonNegative], Field(min_length=1)] = Field(default_factory=lambda: [0])
    data: DataConfig = DataConfig()
    model: SkeletonConfig = SkeletonConfig()
    arms: Annotated[list[ArmConfig], Field(min_length=1)]
    train: TrainConfig = TrainConfig()
    tuning: TuningConfig | None = Field(
        default=None, description="null: every arm is trained at train.learning_rate."
    )
    evaluate: EvaluateConfig = EvaluateConfig()
    measure: MeasureConfig | None = MeasureConfig()
    workflow: WorkflowConfig = WorkflowConfig()

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        names = [arm.name for arm in self.arms]
        if len(set(names)) != len(names):
            raise ValueError(f"arm names must differ; received {names}")
        for seeds in (self.seeds, *(arm.seeds for arm in self.arms if arm.seeds)):
            if len(set(seeds)) != len(seeds):
                raise ValueError(f"seeds must differ; received {seeds}")
        if self.tuning is not None and self.tuning.seed in self.all_seeds:
            raise ValueError(
                f"tuning.seed {self.tuning.seed} must not be one of the reported seeds "
                f"{self.all_seeds}"
            )
        for index, arm in enumerate(self.arms):
            if arm.placement is not None:
                try:
                    arm.placement.chosen(self.model.layers)
                except ValueError as error:
                    raise ValueError(f"arms.{index}.placement ({arm.name}): {error}") from error
            if arm.checkpoint_of is not None:
                self._check_checkpoint(index, arm)
            if arm.tuned_like is not None:
                self._check_tuned_like(index, arm)
        for key, length in self._lengths():
            if length > self.model.max_positions:
                raise ValueError(
                    f"{key} asks for {length} tokens, beyond model.max_positions "
                    f"{self.model.max_positions}"
                )
        return self

    def _check_checkpoint(self, index: int, arm: ArmConfig) -> None:
        key = f"arms.{index}.checkpoint_of ({arm.name})"
        trained = {other.name: other for other in self.arms if other.trained}
        if arm.checkpoint_of not in trained:
            raise ValueError(
                f"{key}: {arm.checkpoint_of!r} is not a trained arm; known: {', '.join(trained)}"
            )
        source = trained[arm.checkpoint_of]
        if source.mixer != EVICTABLE_MIXER or source.placement is not None:
            placed = "" if source.placement is None else " in chosen layers"
            raise ValueError(
                f"{key}: eviction needs a plain transformer; arm {source.name!r} has mixer "
                f"{source.architecture!r}{placed}; legal: mixer {EVICTABLE_MIXER!r} in every layer"
            )
        untrained = sorted(set(self.seeds_of(arm)) - set(self.seeds_of(source)))
        if untrained:
            raise ValueError(
                f"{key}: arm {source.name!r} is not trained with seed {untrained[0]}; its seeds "
                f"are {self.seeds_of(source)}"
            )

    def _check_tuned_like(self, index: int, arm: ArmConfig) -> None:
        legal = [one.name for one in self.arms[:index] if one.trained and not one.tuned_like]
        if arm.tuned_like not in legal:
            raise ValueError(
                f"arms.{index}.tuned_like ({arm.name}): {arm.tuned_like!r} is not an earlier arm "
                f"with a rate of its own; legal: {', '.join(legal) or 'none'}"
            )
        if not arm.trained:
            raise ValueError(f"arms.{index}.tuned_like: arm {arm.name!r} is not trained")

    def _lengths(self) -> list[tuple[str, int]]:
        """Every sequence length that this configuration will ask a model to read."""
        lengths = [("data.context", self.data.context)]
        evaluate = self.evaluate
        if evaluate.language_modelling:
            lengths += [
                ("evaluate.language_modelling.contexts", n)
                for n in evaluate.language_modelling.contexts
            ]
        if evaluate.needle:
            lengths += [
                (f"evaluate.needle, task {task},", n)
                for task in evaluate.needle.tasks
                for n in evaluate.needle.lengths_of(task)
            ]
        if self.measure:
            extra = self.measure.warmup + self.measure.decode_tokens
            lengths += [
                ("measure.contexts + warmup + decode_tokens", n + extra)
                for n in self.measure.contexts
            ]
        return lengths

    def arm(self, name: str) -> ArmConfig:
        """The arm called `name`.

        Raises:
            ConfigError: If there is none; the message lists the arms.
        """
        for arm in self.arms:
            if arm.name == name:
                return arm
        raise unknown_choice("model", name, [arm.name for arm in self.arms])

    def training(self, arm: ArmConfig) -> TrainConfig:
        """How `arm` is trained: as all are, but for steps of its own."""
        own = {} if arm.steps is None else {"steps": arm.steps}
        return self.train.model_copy(update=own)

    def tuned_as(self, arm: ArmConfig) -> ArmConfig:
        """The arm whose learning rate `arm` is trained at: its own, or the one it names."""
        return arm if arm.tuned_like is None else self.arm(arm.tuned_like)

    def seeds_of(self, arm: ArmConfig) -> list[int]:
        """The seeds that are reported of `arm`; one of weights that come from elsewhere."""
        seeds = self.seeds if arm.seeds is None else arm.seeds
        return seeds if arm.checkpoint is None else seeds[:1]

    @property
    def all_seeds(self) -> list[int]:
        """The seeds of any arm, in order."""
        return sorted({seed for arm in self.arms for seed in self.seeds_of(arm)})

    @property
    def reference(self) -> ArmConfig:
        """The arm whose number of parameters the others match: the first that is trained."""
        return next((arm for arm in self.arms if arm.trained), self.arms[0])

    def check_registry(self) -> Config:
        """Check what needs the registries: mixer names, their options, task names.

        Separate from validation because it imports torch. Returns `self` for chaining. A library
        that is not there is a warning: another machine may have it.

        Raises:
            HamError: As `check_arm` and `check_tasks`.
        """
        for arm in self.arms:
            try:
                self.check_arm(arm)
            except UnusableModelError as error:
                print(f"ham: warning: arm {arm.name!r} cannot run here: {error}", file=sys.stderr)
        return self.check_tasks()

    def check_arm(self, arm: ArmConfig) -> None:
        """Check the mixers of one arm and their options, or the model that it has instead.

        Raises:
            ConfigError: For a mixer or a model that is unknown or not usable, options that one
                refuses, or a checkpoint of pickles.
            MissingDataError, CorruptFileError: For a checkpoint that cannot be read.
            UnusableModelError: For a model of a library that is not there.
        """
        from ham.model.foreign import external_models
        from ham.model.registry import parse_options

        if arm.checkpoint is not None:
            external_models().check_checkpoint(arm.checkpoint)
        elif arm.external is not None:
            external_models().check_external(arm)
        else:
            parse_options(arm.mixer, arm.options, context=self.data.context)
        if arm.placement is not None:
            between = arm.placement.between
            parse_options(between.mixer, between.options, context=self.data.context)

    def check_tasks(self) -> Config:
        """Check the names of the lm-eval tasks; returns `self` for chaining.

        Raises:
            ConfigError: For an unknown one.
        """
        from ham.evaluate.tasks import check_task_names

        if self.evaluate.lm_eval:
            check_task_names(self.evaluate.lm_eval.tasks)
        return self
