"""FLOPs and bytes of the short convolution with its maps."""

from __future__ import annotations

import torch

from ham.kernels.registry import Cost


def cost(
    *,
    batch: int,
    time: int,
    heads: int,
    key_size: int,
    value_size: int,
    width: int,
    dtype: torch.dtype,
    attention: bool = True,
) -> Cost:
    """2 W FLOPs for each channel and token; the maps are left out, as activations usually are.

    Bytes: the projections read, q, k and v written, and q and k once more for attention.
    """
    channels = heads * (2 * key_size + value_size)
    written = channels + (2 * heads * key_size if attention else 0)
    tokens = batch * time
    return Cost(2 * width * channels * tokens, tokens * (channels + written) * dtype.itemsize)
