"""The model of an arm: its sizes, and the checkpoint that it reads."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from ham.config import ArmConfig, Config
from ham.errors import ConfigError
from ham.eviction.arm import evicted_config
from ham.model.checkpoint import is_foreign, load_model, read_description
from ham.model.foreign import external_models
from ham.model.language_model import LanguageModel, ModelFacts
from ham.model.model_config import ModelConfig
from ham.model.sizing import model_config


def load_arm(
    config: Config, arm: ArmConfig, checkpoint: Path, device: torch.device
) -> LanguageModel:
    """Read a model in evaluation mode and check that the configuration describes it.

    An arm with `checkpoint_of` gets the weights of that arm, and its own eviction. One with
    `checkpoint` gets its name, and the training context where its positions reach as far.

    Raises:
        MissingDataError, CorruptFileError: If the checkpoint is missing or damaged.
        ConfigError: If it is of another arm, mixer or tokenizer.
        UnusableModelError: If the model is of a library that is not there or does not run here.
    """
    source = arm if arm.checkpoint_of is None else config.arm(arm.checkpoint_of)

    def described(found: ModelFacts) -> ModelFacts:
        if arm.checkpoint is not None:
            context = min(config.data.context, found.max_positions)
            return dataclasses.replace(found, arm=arm.name, context=context)
        for what, received, expected in (
            ("arm", found.arm, source.name),
            ("mixer", found.mixer, source.architecture),
            ("tokenizer", found.tokenizer, config.data.tokenizer),
        ):
            if received != expected:
                raise ConfigError(
                    f"{checkpoint} holds a model with {what} {received!r}; the configuration "
                    f"asks for {expected!r}"
                )
        return found if arm.trained else evicted_config(found, arm)

    return load_model(checkpoint, device, described)


def read_checkpoint(arm: ArmConfig, given: Path | None) -> Path:
    """The folder that a job reads: the one given, else the arm's own `checkpoint`.

    Raises:
        ConfigError: If there is neither.
    """
    if given is None and arm.checkpoint is None:
        raise ConfigError(f"arm {arm.name!r} names no checkpoint; give --checkpoint FOLDER")
    return given or Path(arm.checkpoint)


def model_outline(config: Config, arm: ArmConfig, vocabulary_size: int) -> LanguageModel:
    """The model of an arm on the meta device: its sizes, without memory.

    Raises:
        ConfigError, MissingDataError, CorruptFileError: As `load_arm` and `model_config`.
        UnusableModelError: If it is of a library that is not there.
    """
    with torch.device("meta"):
        if arm.checkpoint is None:
            return model_config(config, arm, vocabulary_size).build()
        if is_foreign(Path(arm.checkpoint)):
            return external_models().outline_foreign(arm.checkpoint)
        values = read_description(arm.checkpoint)["config"]
        kind = external_models().ExternalModelConfig if "library" in values else ModelConfig
        return kind(**values).build()
