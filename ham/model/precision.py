"""The arithmetic of a run: one rule for training, evaluation, generation and measurement."""

from __future__ import annotations

import contextlib

import torch


def precision_context(
    device: torch.device, precision: str = "auto"
) -> contextlib.AbstractContextManager:
    """Autocast as `train.precision` asks for.

    Args:
        device: Where the model computes.
        precision: `float32`, `bfloat16`, or `auto`: bfloat16 autocast on a GPU, float32 elsewhere.
    """
    if is_reduced(device.type, precision):
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return contextlib.nullcontext()


def is_reduced(device_type: str, precision: str) -> bool:
    """Whether `precision` means bfloat16 on a device of that type."""
    return precision == "bfloat16" or (precision == "auto" and device_type == "cuda")


def cache_dtype(weights: torch.Tensor) -> torch.dtype:
    """Dtype of keys and values in a decoding memory: that of autocast, else of the weights."""
    device = weights.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return weights.dtype
