"""FLOPs and bytes of attention over routed tokens.

A query-key pair costs `q . k` (2 K FLOPs) and its share of the sum of values (2 V). The softmax
itself is left out, as is usual. A backward pass is taken as two forward passes
(Kaplan et al. 2020, section 2.1).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ham.kernels.registry import Cost


def count_pairs(routed_BT: Tensor, window: int = 0) -> int:
    """Exact number of visible pairs of a batch: j <= t routed or recent, over t and sequences."""
    batch, time = routed_BT.shape
    recent = min(window, time)
    as_routed = int(routed_BT.cumsum(1)[:, : time - recent].sum())
    return as_routed + batch * _recent_pairs(time, recent)


def _recent_pairs(time: int, window: int) -> int:
    return window * time - window * (window - 1) // 2


def cost(
    *,
    batch: int,
    time: int,
    heads: int,
    key_size: int,
    value_size: int,
    dtype: torch.dtype,
    routed_fraction: float = 1.0,
    key_heads: int | None = None,
    window: int = 0,
) -> Cost:
    """Cost over whole sequences with the routed tokens spread evenly; rounded to integers.

    Pairs: with w = min(window, T), `routed_fraction * (T - w) (T - w + 1) / 2` a sequence outside
    the window and `w T - w (w - 1) / 2` in it. Bytes: q read and o written for every token, k and v
    read for the routed ones, or for all with a window, in `dtype`; one byte of mask a token. The
    null key and the routing scores are left out.
    """
    recent = min(window, time)
    outside = time - recent
    pairs = batch * (routed_fraction * outside * (outside + 1) / 2 + _recent_pairs(time, recent))
    size = key_size + value_size
    keys = 1.0 if window else routed_fraction
    tokens = batch * time
    numbers = tokens * size * (heads + (key_heads or heads) * keys)
    return Cost(
        flops=round(2 * heads * size * pairs), bytes=round(numbers * dtype.itemsize + tokens)
    )


def cached_cost(
    *,
    batch: int,
    queries: int,
    keys: int,
    heads: int,
    key_size: int,
    value_size: int,
    dtype: torch.dtype,
) -> Cost:
    """Cost of `queries` new tokens that each see all `keys` cached ones.

    Bytes: q read and o written, keys and values read in `dtype`, 8 bytes a position on either
    side and 8 a count.
    """
    row = heads * (key_size + value_size)
    moved = batch * ((queries + keys) * (row * dtype.itemsize + 8) + 8)
    return Cost(flops=2 * batch * queries * keys * row, bytes=moved)
