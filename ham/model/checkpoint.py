"""Saving and loading a model: `model.safetensors`, `model.json`, the tokenizer beside them.

`model.json` is written last and carries the checksum of the weights, so a folder with a readable
`model.json` is complete.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from ham.errors import CorruptFileError, MissingDataError
from ham.files import atomic_writer, read_json, sha256_file, write_json
from ham.model.decoder import DecoderLM, ModelConfig

FORMAT_VERSION = 1
TOKENIZER_FILE = "tokenizer.json"


def save_model(
    folder: str | os.PathLike,
    model: DecoderLM,
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
    weights = folder / "model.safetensors"
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    with atomic_writer(weights, "wb") as handle:
        handle.write(save(tensors))
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


def load_model(folder: str | os.PathLike, device: str | torch.device = "cpu") -> DecoderLM:
    """Read a model in evaluation mode.

    Raises:
        MissingDataError: If the folder holds no model.
        CorruptFileError: If the weights do not match their checksum or the configuration.
    """
    folder = Path(folder)
    description = read_description(folder)
    weights = folder / "model.safetensors"
    if not weights.exists():
        raise MissingDataError(f"{weights} does not exist")
    if sha256_file(weights) != description["sha256"]:
        raise CorruptFileError(
            f"{weights} does not match the checksum in model.json: truncated or changed; "
            "delete the folder and train again"
        )
    model = DecoderLM(ModelConfig.from_dict(description["config"]))
    try:
        model.load_state_dict(load_file(weights))
    except (SafetensorError, RuntimeError) as error:
        raise CorruptFileError(f"{weights} does not fit its model.json: {error}") from error
    return model.to(device).eval()


def read_description(folder: str | os.PathLike) -> dict[str, Any]:
    """The content of `model.json`.

    Raises:
        MissingDataError: If there is none.
        CorruptFileError: If it is not one of ours.
    """
    path = Path(folder) / "model.json"
    if not path.exists():
        raise MissingDataError(f"{folder} holds no model: {path} does not exist")
    description = read_json(path)
    missing = {"format_version", "config", "sha256"} - set(description)
    if missing or description["format_version"] != FORMAT_VERSION:
        raise CorruptFileError(
            f"{path} is not a model description of format {FORMAT_VERSION}"
            + (f"; it lacks {', '.join(sorted(missing))}" if missing else "")
        )
    return description


def _copy(source: Path, target: Path) -> None:
    with open(source, "rb") as reader, atomic_writer(target, "wb") as writer:
        shutil.copyfileobj(reader, writer)
