"""A small experiment and models of transformers in it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from tiny_experiment import WORDS, experiment, external_arm
from tokenizers import Tokenizer as Library
from transformers import PreTrainedTokenizerFast

from ham.config import Config
from ham.external.model import ExternalLM
from ham.model.sizing import model_config
from ham.train.shards import ShardWriter
from ham.train.tokenizer import ByteTokenizer, train_bpe


@pytest.fixture
def build() -> Callable[..., ExternalLM]:
    """`build("llama", key=value)`: a model with new weights, in evaluation mode."""

    def make(model_type: str, **config: Any) -> ExternalLM:
        torch.manual_seed(0)
        described = experiment(external_arm(model_type, **config))
        return model_config(described, described.arms[1], 257).build().eval()

    return make


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Ten documents, some of their characters of several bytes."""
    rng = np.random.default_rng(0)
    return [" ".join(rng.choice([*WORDS, "café", "→"], size=120)) for _ in range(10)]


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    """Byte shards of all splits, all of the same documents."""
    folder = tmp_path_factory.mktemp("data")
    for split in ("train", "calibration", "validation", "test"):
        with ShardWriter(folder / f"{split}.tokens", ByteTokenizer()) as writer:
            for text in texts:
                writer.add(np.array(list(text.encode())), len(text.encode()))
    return folder


@pytest.fixture
def write_config(tmp_path: Path) -> Callable[[Config], str]:
    """Write a configuration; returns its path."""

    def write(config: Config) -> str:
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
        return str(path)

    return write


@pytest.fixture(scope="session")
def foreign(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    """A Hugging Face folder of a GPT-NeoX with a byte-level BPE of its own."""
    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("foreign") / "pythia"
    tokenizer = train_bpe(texts, 300)
    config = experiment(external_arm("gpt_neox", max_position_embeddings=64))
    network = model_config(config, config.arms[1], tokenizer.vocabulary_size).build().network
    network.save_pretrained(folder)
    library = Library.from_str(tokenizer.definition)
    PreTrainedTokenizerFast(tokenizer_object=library, eos_token="<|endoftext|>").save_pretrained(
        folder
    )
    return folder
