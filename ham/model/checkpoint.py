"""Saving and loading a model: `model.safetensors`, `model.json`, the tokenizer beside them.

`model.json` is written last and carries the checksum of the weights, so a folder with a readable
`model.json` is complete. A folder that `ham export` wrote has a `config.json` instead and is read
as well, without transformers.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ham.errors import ConfigError, CorruptFileError, MissingDataError
from ham.failure import read_failure
from ham.files import atomic_writer, read_json, sha256_file, write_json
from ham.model.decoder import DecoderLM
from ham.model.foreign import external_models
from ham.model.language_model import LanguageModel, ModelFacts
from ham.model.model_config import ModelConfig

FORMAT_VERSION = 1
TOKENIZER_FILE = "tokenizer.json"
# The layout of `ham.hf`: `model_type` and the key of the configuration in `config.json`, and what
# stands before the names of the weights.
HF_CONFIG_FILE = "config.json"
HF_MODEL_TYPE = "ham-bench"
HF_CONFIG_KEY = "ham"
HF_STATE_PREFIX = "decoder."


def save_model(
    folder: str | os.PathLike,
    model: LanguageModel,
    tokenizer_folder: str | os.PathLike | None = None,
    facts: dict[str, Any] | None = None,
) -> None:
    """Write weights, thresholds and configuration.

    Args:
        folder: Where to; created when missing.
        model: The model.
        tokenizer_folder: Folder whose `tokenizer.json`, if any, is copied beside the weights.
        facts: Further facts for `model.json`, e.g. steps trained.
    """
    folder = Path(folder)
    weights = model.write(folder)
    if tokenizer_folder is not None and (Path(tokenizer_folder) / TOKENIZER_FILE).exists():
        _copy(Path(tokenizer_folder) / TOKENIZER_FILE, folder / TOKENIZER_FILE)
    write_json(
        folder / "model.json",
        {
            "format_version": FORMAT_VERSION,
            "config": model.config.to_dict(),
            "parameters": model.count_parameters(),
            "sha256": sha256_file(weights),
            "facts": facts or {},
        },
    )


def load_model(
    folder: str | os.PathLike,
    device: str | torch.device = "cpu",
    configure: Callable[[ModelFacts], ModelFacts] | None = None,
) -> LanguageModel:
    """Read a model in evaluation mode: one that this project wrote, or another causal one.

    Args:
        folder: Where it is.
        device: Where to.
        configure: Gets the stored configuration and returns the one to build around the weights.

    Raises:
        MissingDataError: If the folder holds no model.
        CorruptFileError: If the weights do not match their checksum or the configuration.
        ConfigError: If the configuration is not valid, or weights are in pickles only.
        UnusableModelError: If it is of a library that is not there, or does not run on the device.
    """
    folder = Path(folder)
    if is_foreign(folder):
        return _configured(external_models().load_foreign(folder, device), configure)
    description = read_description(folder)
    weights = folder / "model.safetensors"
    if not weights.exists():
        raise MissingDataError(f"{weights} does not exist")
    checksum = description["sha256"]
    if checksum is not None and sha256_file(weights) != checksum:
        raise CorruptFileError(
            f"{weights} does not match the checksum in model.json: truncated or changed; "
            "delete the folder and train again"
        )
    if "library" in description["config"]:
        found = external_models().load_trained(folder, description["config"], device)
        return _configured(found, configure)
    config = ModelConfig.from_dict(description["config"])
    model = DecoderLM(config if configure is None else configure(config))
    try:
        tensors = load_file(weights)
        model.load_state_dict(
            {name.removeprefix(HF_STATE_PREFIX): tensor for name, tensor in tensors.items()}
        )
    except (SafetensorError, RuntimeError) as error:
        raise CorruptFileError(f"{weights} does not fit its configuration: {error}") from error
    return model.to(device).eval()


def is_foreign(folder: Path) -> bool:
    """Whether a folder has the Hugging Face layout and a model of another project."""
    path = folder / HF_CONFIG_FILE
    if (folder / "model.json").exists() or not path.exists() or read_failure(folder):
        return False
    values = read_json(path)
    return isinstance(values, dict) and values.get("model_type") != HF_MODEL_TYPE


def read_description(folder: str | os.PathLike) -> dict[str, Any]:
    """The content of `model.json`, or the same of a Hugging Face folder, without a checksum.

    Raises:
        MissingDataError: If there is none.
        CorruptFileError: If it is not one of ours.
        ConfigError: If a Hugging Face folder holds another kind of model.
    """
    path = Path(folder) / "model.json"
    if not path.exists():
        failure = read_failure(Path(folder))
        if not failure and (Path(folder) / HF_CONFIG_FILE).exists():
            return read_hf_config(Path(folder) / HF_CONFIG_FILE)
        reason = f"training failed: {failure}" if failure else f"{path} does not exist"
        raise MissingDataError(f"{folder} holds no model: {reason}")
    description = read_json(path)
    missing = {"format_version", "config", "sha256"} - set(description)
    if missing or description["format_version"] != FORMAT_VERSION:
        raise CorruptFileError(
            f"{path} is not a model description of format {FORMAT_VERSION}"
            + (f"; it lacks {', '.join(sorted(missing))}" if missing else "")
        )
    return description


def read_hf_config(path: Path) -> dict[str, Any]:
    """A `config.json` that `ham.hf` wrote, in the form of a description without a checksum.

    Raises:
        MissingDataError: If there is no such file.
        CorruptFileError: If it is not JSON.
        ConfigError: If it describes another kind of model.
    """
    values = read_json(path)
    kind = values.get("model_type") if isinstance(values, dict) else None
    if kind != HF_MODEL_TYPE or not isinstance(values.get(HF_CONFIG_KEY), dict):
        raise ConfigError(
            f"{path} describes a model of type {kind!r}, its keys are {sorted(values)[:8]}; "
            f"legal: type {HF_MODEL_TYPE!r} and its configuration under {HF_CONFIG_KEY!r}"
        )
    return {
        "format_version": FORMAT_VERSION,
        "config": values[HF_CONFIG_KEY],
        "sha256": None,
        "facts": values.get("facts") or {},
    }


def _configured(
    model: LanguageModel, configure: Callable[[ModelFacts], ModelFacts] | None
) -> LanguageModel:
    """A model of another library is built from its own files; what we say of it may change."""
    if configure is not None:
        model.config = configure(model.config)
    return model


def _copy(source: Path, target: Path) -> None:
    with open(source, "rb") as reader, atomic_writer(target, "wb") as writer:
        shutil.copyfileobj(reader, writer)
