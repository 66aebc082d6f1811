"""What the tests of the Hugging Face side share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def saved(tiny_model, tmp_path: Path) -> Callable[..., Path]:
    """`saved("ham")`: a Hugging Face folder of a tiny model with the byte tokenizer."""
    from transformers.utils import logging

    from ham.hf import save
    from ham.train.tokenizer import ByteTokenizer

    logging.disable_progress_bar()

    def make(mixer: str, **options) -> Path:
        folder = tmp_path / f"{mixer}-folder"
        save(tiny_model(mixer, **options), ByteTokenizer(), folder)
        return folder

    return make
