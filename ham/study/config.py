"""Configuration of the study of multi-query associative recall (`ham mqar`)."""

from __future__ import annotations

import os
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from ham.config import ArmConfig, Fraction, NonNegative, Positive, PositiveFloat, Strict
from ham.config_files import read_yaml, validated

Filler = Literal["blank", "random"]
Layout = Literal["prefix", "scattered"]


class Size(Strict):
    """How large an example is.

    Attributes:
        length: Tokens T; even.
        pairs: Keys P, each asked for once; 4 P <= T.
        weight: Batches of this size in one cycle of the training mixture.
    """

    length: Annotated[int, Field(ge=4)]
    pairs: Positive
    weight: Positive = 1

    @model_validator(mode="after")
    def _fits(self) -> Size:
        if self.length % 2 or 4 * self.pairs > self.length:
            raise ValueError(
                f"a length must be even and hold 4 tokens a pair; received length {self.length} "
                f"with {self.pairs} pairs"
            )
        return self

    def __str__(self) -> str:
        return f"{self.length}/{self.pairs}"


class Task(Strict):
    """What the examples look like; `ham.study.data` defines it.

    Attributes:
        filler: What stands between: token 0, or any token.
        layout: Where the pairs stand: first, or scattered over the first half.
        passes: How often the list of pairs is read out (2 or more: repeats).
        updates: Keys that come once more with another value, which is then the right one.
        mixture: Training sizes of this task, instead of the study's.
        sizes: Evaluated sizes of this task, instead of the study's.
        rates_from: Another task whose tuned learning rates this one uses, instead of its own.
    """

    filler: Filler
    layout: Layout = "prefix"
    passes: Positive = 1
    updates: NonNegative = 0
    mixture: Annotated[list[Size], Field(min_length=1)] | None = None
    sizes: Annotated[list[Size], Field(min_length=1)] | None = None
    rates_from: str | None = None

    @model_validator(mode="after")
    def _one_variant(self) -> Task:
        if self.passes > 1 and self.updates:
            raise ValueError(
                "repeats and overwrites do not go together; received passes "
                f"{self.passes} with updates {self.updates}"
            )
        return self

    @property
    def variant(self) -> str:
        """`plain`, `repeats-N` or `overwrites-N`."""
        if self.passes > 1:
            return f"repeats-{self.passes}"
        return f"overwrites-{self.updates}" if self.updates else "plain"

    @property
    def key(self) -> tuple[str, ...]:
        """What tells its random numbers from those of other tasks."""
        plain = () if self.variant == "plain" else (self.variant,)
        return (self.filler, self.layout, *plain)

    def __str__(self) -> str:
        """Its name in file names, tables and on the command line."""
        place = "" if self.layout == "prefix" else f"-{self.layout}"
        variant = "" if self.variant == "plain" else f"-{self.variant}"
        return f"{self.filler}{place}{variant}"

    def written(self, size: Size) -> int:
        """Key-value pairs written in an example, repeats and updates counted."""
        return size.pairs * self.passes + self.updates

    def fault(self, size: Size) -> str | None:
        """Why an example of `size` does not fit this task, or None."""
        written = self.written(size)
        if self.updates > size.pairs:
            return f"task {self}: {size} has fewer keys than the {self.updates} updates"
        # A scattered pair or query has one of the two-token slots of its half.
        needed = 4 * written if self.layout == "scattered" else 2 * (written + size.pairs)
        if needed > size.length:
            return f"task {self}: {size} needs {needed} tokens"
        return None


class MqarTrain(Strict):
    """Training of every run."""

    steps: Positive = 3000
    tuning_steps: Positive | None = Field(
        default=None, description="Steps of the runs that only choose a rate; default: steps."
    )
    batch_size: Positive = 64
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.1
    warmup_fraction: Fraction = Field(default=0.02, description="Linear warm-up, then cosine to 0.")
    gradient_clip: PositiveFloat = 1.0
    freeze_fraction: Fraction = Field(
        default=0.9, description="Share of the steps after which thresholds are calibrated once."
    )
    precision: Literal["float32", "bfloat16"] = "float32"
    launch: Literal["auto", "graph", "eager"] = Field(
        default="auto", description="CUDA graphs or eager steps; auto: graphs on a GPU."
    )
    runs_per_program: Positive = Field(
        default=16,
        description="Most runs of an arm and width (seeds, rates, tasks with one mixture) that "
        "train in one program; 1: each alone. Results agree to rounding.",
    )
    mixture: Annotated[list[Size], Field(min_length=1)]

    @property
    def for_tuning(self) -> MqarTrain:
        """The same for a run that only chooses a learning rate."""
        return self.model_copy(update={"steps": self.tuning_steps or self.steps})


class MqarEvaluate(Strict):
    """Evaluation of every run, with frozen thresholds."""

    examples: Positive = 1000
    batch_size: Positive = 250
    sizes: Annotated[list[Size], Field(min_length=1)]


class MqarConfig(Strict):
    """One YAML file of `ham mqar run`.

    Attributes:
        seeds: Seeds that are reported; weights, data and their order depend on them.
        learning_rates: Peak rates. With more than one, each arm, task and width is tuned on
            `tuning_seed`, which is never reported, by its accuracy on examples of their own, at
            sizes no longer than those trained on.
        only: Names of the tasks to report; all of them by default. A task that they take rates
            from is tuned all the same.
    """

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]*$")]
    title: str = ""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    seeds: Annotated[list[NonNegative], Field(min_length=1)]
    tuning_seed: NonNegative = 1000
    learning_rates: Annotated[list[PositiveFloat], Field(min_length=1)]
    tasks: Annotated[list[Task], Field(min_length=1)]
    only: Annotated[list[str], Field(min_length=1)] | None = None
    widths: Annotated[list[Positive], Field(min_length=1)]
    layers: Positive = 2
    heads: Positive = 2
    vocabulary_size: Annotated[int, Field(ge=8)] = 8192
    arms: Annotated[list[ArmConfig], Field(min_length=1)]
    train: MqarTrain
    evaluate: MqarEvaluate

    @model_validator(mode="after")
    def _consistent(self) -> MqarConfig:
        for name, values in (
            ("arms", [arm.name for arm in self.arms]),
            ("seeds", self.seeds),
            ("tasks", [str(task) for task in self.tasks]),
            ("widths", self.widths),
            ("learning_rates", self.learning_rates),
        ):
            if len(set(values)) != len(values):
                raise ValueError(f"{name} must differ; received {values}")
        for arm in self.arms:
            if not arm.trained or not arm.mixer:
                raise ValueError(
                    f"arm {arm.name!r} is {arm.architecture!r}; the study trains all of its arms, "
                    "each with a mixer of its own"
                )
        if self.tuning_seed in self.seeds:
            raise ValueError(
                f"tuning_seed {self.tuning_seed} must not be one of seeds {self.seeds}"
            )
        for width in self.widths:
            if width % self.heads:
                raise ValueError(f"width {width} must be a multiple of heads {self.heads}")
        return self

    @model_validator(mode="after")
    def _known_tasks(self) -> MqarConfig:
        names = [str(task) for task in self.tasks]
        unknown = [name for name in self.only or () if name not in names]
        if unknown:
            raise ValueError(f"only: unknown tasks {unknown}; known: {', '.join(names)}")
        return self

    @model_validator(mode="after")
    def _tasks_fit(self) -> MqarConfig:
        tuned = [str(task) for task in self.tasks if task.rates_from is None]
        for task in self.tasks:
            if task.rates_from is not None and task.rates_from not in tuned:
                raise ValueError(
                    f"task {task} takes rates from {task.rates_from!r}, which is not tuned; "
                    f"tuned tasks: {', '.join(tuned) or 'none'}"
                )
            if len(self.learning_rates) > 1 and not self.trained_sizes(task):
                raise ValueError(
                    f"task {task}: a learning rate is chosen at sizes no longer than those trained "
                    f"on; every evaluated size is longer than {self.training_context(task)}"
                )
            pairs = [size.pairs for size in self.sizes(task)]
            if len(set(pairs)) != len(pairs):
                raise ValueError(f"task {task}: evaluated sizes must differ in pairs: {pairs}")
            for size in (*self.mixture(task), *self.sizes(task)):
                if (fault := task.fault(size)) is not None:
                    raise ValueError(fault)
                if size.pairs >= self.vocabulary_size // 2:
                    raise ValueError(
                        f"vocabulary_size {self.vocabulary_size} holds no {size.pairs} keys"
                    )
        return self

    @property
    def reported_tasks(self) -> list[Task]:
        """The tasks whose runs are reported."""
        return [task for task in self.tasks if self.only is None or str(task) in self.only]

    @property
    def tuned_tasks(self) -> list[Task]:
        """The tasks on which a learning rate is chosen."""
        needed = {task.rates_from or str(task) for task in self.reported_tasks}
        return [task for task in self.tasks if str(task) in needed]

    def mixture(self, task: Task) -> list[Size]:
        """The sizes that a task trains on."""
        return task.mixture or self.train.mixture

    def sizes(self, task: Task) -> list[Size]:
        """The sizes that a task is evaluated at."""
        return task.sizes or self.evaluate.sizes

    def training_context(self, task: Task) -> int:
        """The longest training example of a task in tokens."""
        return max(size.length for size in self.mixture(task))

    def longest(self, task: Task) -> int:
        """The longest example of a task in tokens."""
        return max(size.length for size in (*self.mixture(task), *self.sizes(task)))

    def trained_sizes(self, task: Task) -> list[Size]:
        """The evaluated sizes that are no longer than the longest training example."""
        return [s for s in self.sizes(task) if s.length <= self.training_context(task)]


def load_mqar_config(path: str | os.PathLike) -> MqarConfig:
    """Read and validate a configuration of the study.

    Raises:
        MissingDataError: If the file does not exist.
        ConfigError: If it is not valid; one line per fault.
    """
    return parse_mqar_config(read_yaml(path), source=str(path))


def parse_mqar_config(values: dict[str, Any], source: str) -> MqarConfig:
    """Validate a plain dictionary.

    Raises:
        ConfigError: With one line per fault.
    """
    return validated(MqarConfig, values, source)
