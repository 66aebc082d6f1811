"""Equal parameters for every arm, through the width of the MLP."""

from __future__ import annotations

from typing import Any

import torch

from ham.config import ArmConfig, Config
from ham.errors import ConfigError
from ham.model.decoder import DecoderLM
from ham.model.model_config import ModelConfig

MLP_MULTIPLE = 8
TOLERANCE = 0.01


def plain_mlp_width(width: int) -> int:
    """The usual SwiGLU width, 8/3 of the model width, rounded to a multiple of 8."""
    return max(MLP_MULTIPLE, round(8 * width / 3 / MLP_MULTIPLE) * MLP_MULTIPLE)


def model_config(config: Config, arm: ArmConfig, vocabulary_size: int) -> ModelConfig:
    """The configuration of one arm's model, its MLP sized to match the first arm's parameters.

    Raises:
        ConfigError: If no MLP width brings the arm within 1 % of the first arm.
    """
    mlp_width = plain_mlp_width(config.model.width)
    candidate = _with_mlp(config, arm, vocabulary_size, mlp_width)
    reference = config.arms[0]
    if not config.model.match_parameters or arm == reference:
        return candidate
    target = parameter_count(_with_mlp(config, reference, vocabulary_size, mlp_width))
    per_unit = 3 * config.model.width * config.model.layers
    excess = parameter_count(candidate) - target
    steps = round(excess / per_unit / MLP_MULTIPLE)
    matched = _with_mlp(config, arm, vocabulary_size, mlp_width - steps * MLP_MULTIPLE)
    if matched.mlp_width < MLP_MULTIPLE:
        raise ConfigError(
            f"arm {arm.name!r} has {excess} parameters more than {reference.name!r} in its mixers; "
            "no MLP is small enough to make up for that"
        )
    count = parameter_count(matched)
    if abs(count - target) > TOLERANCE * target:
        raise ConfigError(
            f"arm {arm.name!r} has {count} parameters, {reference.name!r} {target}; an MLP width "
            f"in steps of {MLP_MULTIPLE} cannot bring them within {TOLERANCE:.0%}"
        )
    return matched


def parameter_count(config: ModelConfig) -> int:
    """Parameters of a model, without allocating it."""
    with torch.device("meta"):
        return DecoderLM(config).count_parameters()


def _with_mlp(config: Config, arm: ArmConfig, vocabulary_size: int, mlp_width: int) -> ModelConfig:
    return ModelConfig(
        arm=arm.name,
        mixer=arm.mixer,
        options=arm.options,
        vocabulary_size=vocabulary_size,
        layers=config.model.layers,
        width=config.model.width,
        heads=config.model.heads,
        mlp_width=mlp_width,
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
