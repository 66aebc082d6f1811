"""FLOPs and bytes of the gated sum."""

from __future__ import annotations

import torch

from ham.kernels.registry import Cost


def cost(*, batch: int, time: int, heads: int, size: int, dtype: torch.dtype) -> Cost:
    """3 FLOPs a number; norms and gates are left out, as activations usually are.

    Bytes: both read-outs and the gates read, the sum written.
    """
    numbers = batch * time * heads * size
    return Cost(3 * numbers, (3 * numbers + 2 * batch * time * heads) * dtype.itemsize)
