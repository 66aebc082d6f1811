"""Equal parameters for every arm, through the width of the MLP."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from ham.config import ArmConfig, Config
from ham.errors import ConfigError
from ham.eviction.arm import evicted_config
from ham.model.foreign import external_models
from ham.model.language_model import ModelFacts
from ham.model.model_config import ModelConfig

MLP_MULTIPLE = 8
TOLERANCE = 0.01


def plain_mlp_width(width: int) -> int:
    """The usual SwiGLU width, 8/3 of the model width, rounded to a multiple of 8."""
    return max(MLP_MULTIPLE, round(8 * width / 3 / MLP_MULTIPLE) * MLP_MULTIPLE)


@dataclass(frozen=True)
class Sizing:
    """An arm's model with the MLP that brings its parameters closest to a target.

    Attributes:
        model: The model, sized.
        plain: Parameters with the usual MLP width.
        parameters: Parameters as sized.
        target: What was aimed at.
        fault: Why `parameters` miss the target by more than `TOLERANCE`; empty if they do not.
    """

    model: ModelConfig
    plain: int
    parameters: int
    target: int
    fault: str = ""


def model_config(config: Config, arm: ArmConfig, vocabulary_size: int) -> ModelFacts:
    """The configuration of one arm's model, its MLP sized to match the first arm's parameters.

    A model of another library whose MLP cannot be sized is left as it is, and says so (`matched`).

    Raises:
        ConfigError: If no MLP width brings the arm within 1 % of the first arm, or another library
            refuses the configuration.
        UnusableModelError: If the other library is not there.
    """
    plain, reference = plain_model(config, arm, vocabulary_size), config.reference
    if not config.model.match_parameters or arm == reference:
        return plain
    target = parameter_count(plain_model(config, reference, vocabulary_size))
    if arm.external is not None:
        return external_models().matched_config(plain, arm, target)
    sizing = sized(plain, parameter_count(plain), target)
    if sizing.fault:
        raise ConfigError(f"arm {arm.name!r} beside {reference.name!r}: {sizing.fault}")
    return sizing.model


def sized(plain: ModelConfig, count: int, target: int) -> Sizing:
    """Size the MLP of a model to `target` parameters, as near as its steps of 8 allow.

    Args:
        plain: The model with an MLP width to begin with.
        count: Its parameters.
        target: Parameters wanted.
    """
    per_step = 3 * plain.width * plain.layers * MLP_MULTIPLE
    steps = max(round((target - count) / per_step), 1 - plain.mlp_width // MLP_MULTIPLE)
    width = plain.mlp_width + steps * MLP_MULTIPLE
    parameters = count + steps * per_step
    fault = ""
    if abs(parameters - target) > TOLERANCE * target:
        fault = (
            f"{parameters:,} parameters with the nearest MLP width, {width}, against {target:,}; "
            f"the width goes in steps of {MLP_MULTIPLE} from {MLP_MULTIPLE} up, and they must "
            f"agree within {TOLERANCE:.0%}"
        )
    return Sizing(replace(plain, mlp_width=width), count, parameters, target, fault)


def parameter_count(config: ModelFacts) -> int:
    """Parameters of a model, without allocating it."""
    with torch.device("meta"):
        return config.build().count_parameters()


def plain_model(config: Config, arm: ArmConfig, vocabulary_size: int) -> ModelFacts:
    """The configuration of one arm's model with the usual MLP width."""
    if arm.external is not None:
        return external_models().external_config(config, arm, vocabulary_size)
    if arm.checkpoint_of is not None:
        return evicted_config(
            plain_model(config, config.arm(arm.checkpoint_of), vocabulary_size), arm
        )
    return ModelConfig(
        arm=arm.name,
        mixer=arm.mixer,
        options=arm.options,
        vocabulary_size=vocabulary_size,
        layers=config.model.layers,
        width=config.model.width,
        heads=config.model.heads,
        mlp_width=config.model.mlp_width or plain_mlp_width(config.model.width),
        max_positions=config.model.max_positions,
        context=config.data.context,
        tokenizer=config.data.tokenizer,
        kernels=config.model.kernels,
        placement=_placement(config, arm),
    )


def _placement(config: Config, arm: ArmConfig) -> dict[str, Any] | None:
    if arm.placement is None:
        return None
    return {
        "layers": arm.placement.chosen(config.model.layers),
        "mixer": arm.placement.between.mixer,
        "options": arm.placement.between.options,
    }
