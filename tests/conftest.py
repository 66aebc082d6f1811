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
    from ham.model.decoder import DecoderLM
    from ham.model.model_config import ModelConfig

    def build(mixer: str, seed: int = 0, dtype: torch.dtype = torch.float32, **options: Any):
        options = {**DEFAULT_OPTIONS.get(mixer, {}), **options}
        torch.manual_seed(seed)
        model = DecoderLM(
            ModelConfig(
                arm=mixer.replace("_", "-"),
                mixer=mixer,
                options=options,
                vocabulary_size=257,
                layers=2,
                width=32,
                heads=2,
                mlp_width=64,
                max_positions=1024,
                context=128,
                tokenizer="byte",
            )
        )
        if model.routes:
            set_thresholds(model)
        return model.to(dtype).eval()

    return build


DEFAULT_OPTIONS = {
    "sliding_window": {"window": 24},
    "mamba2": {"state_size": 16, "head_dim": 16},
    "ham": {"target": 0.3},
    "gated_delta_rule_window": {"window": 24},
}


def set_thresholds(model: Any) -> None:
    """Give an untrained model's routers the thresholds of their targets on random tokens."""
    from ham.model.calibration import calibrate

    generator = torch.Generator().manual_seed(1)
    calibrate(model, [torch.randint(0, 256, (4, 128), generator=generator)])
