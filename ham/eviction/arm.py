"""From the model of a trained transformer to the same weights with eviction."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from ham.config import EVICTED_MIXER

if TYPE_CHECKING:
    from ham.config import ArmConfig
    from ham.model.model_config import ModelConfig


def evicted_config(source: ModelConfig, arm: ArmConfig) -> ModelConfig:
    """The model of an arm with `eviction`: that of the arm whose checkpoint it reads, renamed.

    The names and shapes of the weights stay the same.
    """
    return dataclasses.replace(
        source,
        arm=arm.name,
        mixer=EVICTED_MIXER,
        options={**source.options, "eviction": arm.eviction.model_dump(exclude_none=True)},
    )
