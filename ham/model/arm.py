"""The model of an arm, from the checkpoint that it reads."""

from __future__ import annotations

from pathlib import Path

import torch

from ham.config import ArmConfig, Config
from ham.errors import ConfigError
from ham.eviction.arm import evicted_config
from ham.model.checkpoint import load_model
from ham.model.decoder import DecoderLM
from ham.model.model_config import ModelConfig


def load_arm(config: Config, arm: ArmConfig, checkpoint: Path, device: torch.device) -> DecoderLM:
    """Read a model in evaluation mode and check that the configuration describes it.

    An arm with `checkpoint_of` gets the weights of that arm, and its own eviction.

    Raises:
        MissingDataError, CorruptFileError: If the checkpoint is missing or damaged.
        ConfigError: If it is of another arm, mixer or tokenizer.
    """
    source = arm if arm.trained else config.arm(arm.checkpoint_of)

    def described(found: ModelConfig) -> ModelConfig:
        for what, received, expected in (
            ("arm", found.arm, source.name),
            ("mixer", found.mixer, source.mixer),
            ("tokenizer", found.tokenizer, config.data.tokenizer),
        ):
            if received != expected:
                raise ConfigError(
                    f"{checkpoint} holds a model with {what} {received!r}; the configuration "
                    f"asks for {expected!r}"
                )
        return found if arm.trained else evicted_config(found, arm)

    return load_model(checkpoint, device, described)
