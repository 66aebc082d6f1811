"""What may be loaded from a model folder: safetensors that fit `config.json`, and no pickle.

The checks run before transformers opens anything, so that each fault has one message.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ham.errors import ConfigError, CorruptFileError, MissingDataError
from ham.files import read_json
from ham.model.checkpoint import HF_CONFIG_FILE, HF_STATE_PREFIX, read_hf_config
from ham.model.decoder import DecoderLM
from ham.model.model_config import ModelConfig

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


def check_model_source(source: str | os.PathLike | None, options: Mapping[str, Any]) -> None:
    """Check what `from_pretrained(source, **options)` would load; a name on a hub passes.

    Raises:
        MissingDataError: If the folder holds no model.
        ConfigError: For options that ask for pickles, a folder with pickles only, a model of
            another kind, or a configuration that is not valid.
        CorruptFileError: If files cannot be read or weights do not fit the configuration.
    """
    for name in ("use_safetensors", "weights_only"):
        if options.get(name) is False:
            raise ConfigError(f"{name}=False would load a pickle; legal: {name}=True")
    adapter = (options.get("adapter_kwargs") or {}).get("_adapter_model_path")
    if adapter is not None and Path(adapter).is_dir():
        refuse_pickled_adapter(Path(adapter))
    if source is None:
        return
    folder = Path(source) / (options.get("subfolder") or "")
    if folder.is_file():
        raise ConfigError(f"{folder} is a file; give the folder that holds it and config.json")
    if folder.is_dir():
        refuse_pickled_adapter(folder)
        check_folder(folder)


def check_folder(folder: Path) -> ModelConfig:
    """Check that a folder holds a whole model of this project; returns its configuration.

    Raises:
        MissingDataError, ConfigError, CorruptFileError: As `check_model_source`.
    """
    files = weight_files(folder)
    config = ModelConfig.from_dict(read_hf_config(folder / HF_CONFIG_FILE)["config"])
    _check_names_and_shapes(folder, stored_shapes(files), _expected_shapes(config))
    return config


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder.

    Raises:
        ConfigError: If the folder has weights in pickles only.
        MissingDataError: If it has no weights, or lacks a file that its index names.
    """
    index = folder / INDEX_FILE
    if (folder / WEIGHTS_FILE).exists():
        return [folder / WEIGHTS_FILE]
    if index.exists():
        names = sorted(set(read_json(index).get("weight_map", {}).values()))
        missing = [name for name in names if not (folder / name).is_file()]
        if missing or not names:
            raise MissingDataError(f"{index} names files that are not there: {missing}")
        return [folder / name for name in names]
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLE_SUFFIXES)
    if pickles:
        raise ConfigError(
            f"{folder} holds weights in {', '.join(pickles)} only: pickles run code when they are "
            f"read and are never loaded; legal: {WEIGHTS_FILE}"
        )
    raise MissingDataError(f"{folder} holds no model: {WEIGHTS_FILE} does not exist")


def refuse_pickled_adapter(folder: Path) -> None:
    """Check that a folder holds no adapter in a pickle.

    Raises:
        ConfigError: If it does.
    """
    if (folder / "adapter_model.bin").exists():
        raise ConfigError(
            f"{folder / 'adapter_model.bin'} is a pickle and is never loaded; "
            "legal: adapter_model.safetensors"
        )


def stored_shapes(files: list[Path]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in safetensors files.

    Raises:
        CorruptFileError: If one is not complete.
    """
    shapes = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as stored:
                names = list(stored.keys())
                shapes |= {name: tuple(stored.get_slice(name).get_shape()) for name in names}
        except SafetensorError as error:
            raise CorruptFileError(
                f"{path} is not a complete safetensors file: {error}; write the model again"
            ) from error
    return shapes


def _expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        state = DecoderLM(config).state_dict()
    return {f"{HF_STATE_PREFIX}{name}": tuple(tensor.shape) for name, tensor in state.items()}


def _check_names_and_shapes(
    folder: Path, found: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]]
) -> None:
    faults = [f"{name} is missing" for name in sorted(expected.keys() - found.keys())]
    faults += [f"{name} is not part of it" for name in sorted(found.keys() - expected.keys())]
    faults += [
        f"{name} has shape {found[name]} instead of {expected[name]}"
        for name in sorted(expected.keys() & found.keys())
        if found[name] != expected[name]
    ]
    if faults:
        raise CorruptFileError(
            f"the weights in {folder} do not fit its config.json: {'; '.join(faults[:3])}"
            + (f" and {len(faults) - 3} more" if len(faults) > 3 else "")
        )
