"""Fixtures that several test folders share."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

# First of all: see there.
import triton_device  # noqa: F401

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Tests run side by side on two cores; more threads would only slow them down."""
    torch.set_num_threads(1)


@pytest.fixture
def tiny_model() -> Callable[..., Any]:
    """Build a small `DecoderLM`: `tiny_model("ham", target=0.5)`; same seed, same weights."""
    from ham.conformance import small_model

    return small_model
