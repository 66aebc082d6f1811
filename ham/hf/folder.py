"""Folders in the Hugging Face layout: `config.json`, `model.safetensors`, the tokenizer's files."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import torch

from ham.errors import ConfigError, MissingDataError
from ham.files import fsync, raise_if_disk_full
from ham.hf.modeling import HamForCausalLM
from ham.hf.tokenization import fast_tokenizer
from ham.model.checkpoint import load_model, read_description
from ham.model.decoder import DecoderLM
from ham.train.tokenizer import Tokenizer, load_tokenizer


def export(checkpoint: str | os.PathLike, folder: str | os.PathLike) -> None:
    """Write a trained model of this project as a Hugging Face folder.

    Args:
        checkpoint: Folder that `ham train` wrote.
        folder: Where to; must not exist or be empty. It appears when it is complete.

    Raises:
        MissingDataError, CorruptFileError: If the checkpoint cannot be read.
        ConfigError: If `folder` is in use, or the model is of another library.
        DiskFullError: If the file system is full.
    """
    model = load_model(checkpoint)
    if not isinstance(model, DecoderLM):
        raise ConfigError(
            f"{checkpoint} holds {model.config.mixer!r}, a model of another library; its folder is "
            "in the Hugging Face layout already"
        )
    tokenizer = load_tokenizer(model.config.tokenizer, Path(checkpoint))
    save(model, tokenizer, folder, read_description(checkpoint).get("facts"))


def save(
    model: DecoderLM,
    tokenizer: Tokenizer,
    folder: str | os.PathLike,
    facts: dict[str, Any] | None = None,
) -> None:
    """Write a model and its tokenizer as a Hugging Face folder; arguments as `export`.

    Raises:
        ConfigError: If `folder` is in use.
        DiskFullError: If the file system is full.
    """
    target = Path(folder).absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{folder} exists already; legal: a new or an empty folder")
    wrapped = HamForCausalLM.from_decoder(model, tokenizer.end_of_text, facts)
    fast = fast_tokenizer(tokenizer, model.config.max_positions)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as parent:
            made = Path(parent) / target.name
            wrapped.save_pretrained(made)
            fast.save_pretrained(made)
            for path in made.iterdir():
                fsync(path)
            os.replace(made, target)
    except OSError as error:
        raise_if_disk_full(error, target)
        raise


def load(folder: str | os.PathLike, device: str | torch.device = "cpu") -> HamForCausalLM:
    """Read a Hugging Face folder of this project, in evaluation mode.

    Raises:
        MissingDataError: If there is no model.
        ConfigError: If it holds another kind of model, or pickles only.
        CorruptFileError: If its weights cannot be read or do not fit its configuration.
    """
    if not Path(folder).is_dir():
        raise MissingDataError(f"{folder} is not a folder")
    return HamForCausalLM.from_pretrained(Path(folder)).to(device)
