"""Configuration of the study of multi-query associative recall (`ham mqar`)."""

from __future__ import annotations

import os
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from ham.config import ArmConfig, Fraction, NonNegative, Positive, PositiveFloat, Strict
from ham.config_files import describe_faults, read_yaml
from ham.errors import ConfigError

Filler = Literal["blank", "random"]
Layout = Literal["prefix", "scattered"]


class Size(Strict):
    """How large an example is.

    Attributes:
        length: Tokens T; even.
        pairs: Key-value pairs P, each asked for once; 4 P <= T.
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


class MqarTrain(Strict):
    """Training of every run."""

    steps: Positive = 3000
    batch_size: Positive = 64
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.1
    warmup_fraction: Fraction = Field(default=0.02, description="Linear warm-up, then cosine to 0.")
    gradient_clip: PositiveFloat = 1.0
    freeze_fraction: Fraction = Field(
        default=0.9, description="Share of the steps after which thresholds are calibrated once."
    )
    precision: Literal["float32", "bfloat16"] = "float32"
    mixture: Annotated[list[Size], Field(min_length=1)]


class MqarEvaluate(Strict):
    """Evaluation of every run, with frozen thresholds."""

    examples: Positive = 1000
    batch_size: Positive = 250
    sizes: Annotated[list[Size], Field(min_length=1)]


class MqarConfig(Strict):
    """One YAML file of `ham mqar run`.

    Attributes:
        seeds: Seeds that are reported; weights, data and their order depend on them.
        learning_rates: Peak rates. With more than one, each arm, filler and width is tuned on
            `tuning_seed`, which is never reported, by its accuracy on examples of their own.
    """

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]*$")]
    title: str = ""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    seeds: Annotated[list[NonNegative], Field(min_length=1)]
    tuning_seed: NonNegative = 1000
    learning_rates: Annotated[list[PositiveFloat], Field(min_length=1)]
    fillers: Annotated[list[Filler], Field(min_length=1)]
    layout: Layout = "prefix"
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
            ("fillers", self.fillers),
            ("widths", self.widths),
            ("learning_rates", self.learning_rates),
        ):
            if len(set(values)) != len(values):
                raise ValueError(f"{name} must differ; received {values}")
        for arm in self.arms:
            if not arm.trained:
                raise ValueError(
                    f"arm {arm.name!r} reads a checkpoint; the study trains all of its arms"
                )
        if self.tuning_seed in self.seeds:
            raise ValueError(
                f"tuning_seed {self.tuning_seed} must not be one of seeds {self.seeds}"
            )
        for width in self.widths:
            if width % self.heads:
                raise ValueError(f"width {width} must be a multiple of heads {self.heads}")
        most = max(size.pairs for size in (*self.train.mixture, *self.evaluate.sizes))
        if most >= self.vocabulary_size // 2:
            raise ValueError(f"vocabulary_size {self.vocabulary_size} holds no {most} keys")
        return self

    @property
    def longest(self) -> int:
        """The longest example in tokens."""
        return max(size.length for size in (*self.train.mixture, *self.evaluate.sizes))

    @property
    def training_context(self) -> int:
        """The longest training example in tokens."""
        return max(size.length for size in self.train.mixture)


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
    try:
        return MqarConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError(
            f"{source} is not valid:\n{describe_faults(error, MqarConfig)}"
        ) from error
