"""Reading a causal language model from a Hugging Face folder: safetensors alone, no code.

Two kinds of folder: what `ham train` wrote of an external arm, with a `model.json` that names the
library, and one of anybody else, with its own tokenizer.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import torch

from ham.errors import (
    ConfigError,
    CorruptFileError,
    MissingDataError,
    UnusableModelError,
    unknown_of_many,
)
from ham.external.configuration import ExternalModelConfig, network_of
from ham.external.library import configuration_class, known_types, one_line, quiet
from ham.external.model import ExternalLM
from ham.files import read_json
from ham.hf.source import refuse_pickled_adapter, stored_shapes, weight_files
from ham.model.checkpoint import HF_CONFIG_FILE
from ham.train.tokenizer import OWN_NAME, TOKENIZER_FILE

LONGEST_CONTEXT = 2048
"""Default length of an input, in tokens; positions may go much further."""

UNLIMITED_POSITIONS = 1 << 20
"""Where a configuration names no longest sequence, e.g. of a recurrent model."""


def check_checkpoint(folder: str | os.PathLike) -> None:
    """Check, without importing a library, that a folder holds weights that may be read.

    Raises:
        MissingDataError: If there is no folder, configuration or weights.
        CorruptFileError: If the configuration is not JSON.
        ConfigError: If weights are pickles, or the configuration asks for files that may be.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise MissingDataError(f"checkpoint {folder} is not a folder")
    if (folder / "model.json").exists():
        return
    values = read_json(folder / HF_CONFIG_FILE)
    if not isinstance(values, dict) or not isinstance(values.get("model_type"), str):
        raise CorruptFileError(f"{folder / HF_CONFIG_FILE} names no model_type")
    if "transformers_weights" in values:
        raise ConfigError(
            f"{folder / HF_CONFIG_FILE} sets transformers_weights to "
            f"{values['transformers_weights']!r}; legal: model.safetensors, so leave it out"
        )
    refuse_pickled_adapter(folder)
    weight_files(folder)


def load_foreign(folder: str | os.PathLike, device: str | torch.device = "cpu") -> ExternalLM:
    """A model that was trained elsewhere, in evaluation mode and float32.

    Raises:
        MissingDataError, CorruptFileError, ConfigError: As `check_checkpoint`; also without a
            `tokenizer.json`, for an unknown model type, and for weights that do not fit.
        UnusableModelError: If the library is not there, or the model does not run on the device.
    """
    folder = Path(folder)
    described, configuration = _describe(folder)
    return _load(folder, described, configuration, device)


def outline_foreign(folder: str | os.PathLike) -> ExternalLM:
    """The same model on the meta device: sizes without weights.

    Raises:
        As `load_foreign`.
    """
    described, configuration = _describe(Path(folder))
    with torch.device("meta"):
        return ExternalLM(described, network_of(configuration, described.model_type))


def _describe(folder: Path) -> tuple[ExternalModelConfig, Any]:
    check_checkpoint(folder)
    model_type = read_json(folder / HF_CONFIG_FILE)["model_type"]
    library = _library_of(model_type)
    if not (folder / TOKENIZER_FILE).exists():
        raise MissingDataError(
            f"{folder / TOKENIZER_FILE} does not exist; `AutoTokenizer.from_pretrained(...)"
            ".save_pretrained(FOLDER)` writes one"
        )
    configuration = _read_configuration(folder, library, model_type)
    positions = getattr(configuration, "max_position_embeddings", None)
    described = ExternalModelConfig(
        arm=folder.name,
        library=library,
        model_type=model_type,
        vocabulary_size=configuration.vocab_size,
        max_positions=positions or UNLIMITED_POSITIONS,
        context=min(positions or LONGEST_CONTEXT, LONGEST_CONTEXT),
        tokenizer=OWN_NAME,
    )
    return described, configuration


def load_trained(
    folder: str | os.PathLike, values: dict[str, Any], device: str | torch.device = "cpu"
) -> ExternalLM:
    """A model that `ham train` wrote, in evaluation mode.

    Args:
        folder: The checkpoint.
        values: `ExternalModelConfig.to_dict` of it.
        device: Where to.

    Raises:
        ConfigError: If `values` are not such a description.
        CorruptFileError: If the weights do not fit the configuration.
        UnusableModelError: If the library is not there, or the model does not run on the device.
    """
    try:
        described = ExternalModelConfig(**values)
    except TypeError as error:
        raise ConfigError(f"not a description of an external model: {error}") from error
    configuration = _read_configuration(Path(folder), described.library, described.model_type)
    return _load(Path(folder), described, configuration, device)


def _library_of(model_type: str) -> str:
    own = known_types("transformers")
    if model_type in own:
        return "transformers"
    try:
        others = known_types("fla")
    except UnusableModelError as error:
        unknown = unknown_of_many("model_type of a checkpoint", model_type, own)
        raise UnusableModelError(f"{unknown}; {error}") from error
    if model_type in others:
        return "fla"
    raise unknown_of_many("model_type of a checkpoint", model_type, own | others)


def _read_configuration(folder: Path, library: str, model_type: str) -> Any:
    configuration = configuration_class(library, model_type)
    try:
        with quiet():
            return configuration.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # each class checks in its own way
        raise ConfigError(
            f"{folder / HF_CONFIG_FILE} is not a {model_type!r} configuration: {one_line(error)}"
        ) from error


def _check_size(folder: Path, described: ExternalModelConfig, configuration: Any) -> None:
    """Refuse a configuration of a far larger model than the weights before memory is taken for it.

    A key that is missing means the default of the library, which may be a model of billions.
    """
    stored = sum(math.prod(shape) for shape in stored_shapes(weight_files(folder)).values())
    with torch.device("meta"):
        outline = ExternalLM(described, network_of(configuration, described.model_type))
    expected = outline.count_parameters()
    if expected > 2 * stored:
        raise CorruptFileError(
            f"the weights in {folder} do not fit its config.json, which describes "
            f"{expected:,} parameters: the files hold {stored:,} numbers"
        )


def _load(
    folder: Path, described: ExternalModelConfig, configuration: Any, device: str | torch.device
) -> ExternalLM:
    from transformers import AutoModelForCausalLM

    _check_size(folder, described, configuration)
    try:
        with quiet():
            network, report = AutoModelForCausalLM.from_pretrained(
                folder,
                config=configuration,
                dtype=torch.float32,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except ImportError as error:
        raise UnusableModelError(f"{folder} needs a package: {one_line(error)}") from error
    except Exception as error:  # safetensors and transformers report a bad file in many ways
        raise CorruptFileError(
            f"the weights in {folder} cannot be read: {type(error).__name__}: {one_line(error)}"
        ) from error
    # Weights that are missing would be drawn at random, without an error.
    faults = [f"{name} is missing" for name in sorted(report["missing_keys"])]
    faults += [f"{one[0]} has another shape" for one in sorted(report["mismatched_keys"])]
    if faults:
        raise CorruptFileError(
            f"the weights in {folder} do not fit its config.json: {'; '.join(faults[:3])}"
            + (f" and {len(faults) - 3} more" if len(faults) > 3 else "")
        )
    model = ExternalLM(described, network).to(device).eval()
    model.check_runs()
    return model
