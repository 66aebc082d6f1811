"""The model of an arm: what is checked of it beforehand, its sizes, and the checkpoint it reads."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import torch

from ham.config import ArmConfig, Config
from ham.errors import ConfigError, UnusableModelError
from ham.eviction.arm import evicted_config
from ham.model.checkpoint import is_foreign, load_model, read_description
from ham.model.foreign import external_models
from ham.model.language_model import LanguageModel, ModelFacts, UnusableLM
from ham.model.model_config import ModelConfig
from ham.model.sizing import model_config


def load_arm(
    config: Config, arm: ArmConfig, checkpoint: Path, device: torch.device
) -> LanguageModel:
    """Read a model in evaluation mode and check that the configuration describes it.

    An arm with `checkpoint_of` gets the weights of that arm, and its own eviction. One with
    `checkpoint` gets its name, and the training context where its positions reach as far.

    Returns:
        Where the model cannot be used here, an `UnusableLM` that says why whenever it is asked.

    Raises:
        MissingDataError, CorruptFileError: If the checkpoint is missing or damaged.
        ConfigError: If it is of another arm, mixer or tokenizer.
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

    try:
        return load_model(checkpoint, device, described)
    except UnusableModelError as error:
        return unusable(config, arm, str(error))


def unusable(config: Config, arm: ArmConfig, reason: str) -> UnusableLM:
    """A stand-in for the model of an arm that cannot be used here."""
    facts = ModelConfig(
        arm=arm.name,
        mixer=arm.architecture,
        vocabulary_size=0,
        layers=config.model.layers,
        width=config.model.width,
        heads=config.model.heads,
        mlp_width=0,
        max_positions=config.model.max_positions,
        context=config.data.context,
        tokenizer=config.data.tokenizer,
    )
    return UnusableLM(facts, reason)


def check_arm(arm: ArmConfig) -> None:
    """Check what an arm says about a model of another library or a checkpoint.

    A library that is not there is a warning: the other arms go on, and the rows of this one say so.

    Raises:
        ConfigError: For an unknown model type or key, or a checkpoint of pickles.
        MissingDataError, CorruptFileError: For a checkpoint that cannot be read.
    """
    try:
        if arm.checkpoint is not None:
            external_models().check_checkpoint(arm.checkpoint)
        elif arm.external is not None:
            external_models().check_external(arm)
    except UnusableModelError as error:
        print(f"ham: warning: arm {arm.name!r} cannot run here: {error}", file=sys.stderr)


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
