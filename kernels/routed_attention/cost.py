"""FLOPs and bytes of attention over routed tokens.

A query-key pair costs `q . k` (2 K FLOPs) and its share of the sum of values (2 V). The softmax
itself is left out, as is usual. A backward pass is taken as two forward passes
(Kaplan et al. 2020, section 2.1).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ham.kernels.registry import Cost


def count_pairs(routed_BT: Tensor) -> int:
    """Exact number of visible pairs of a batch: routed j <= t, summed over t and sequences."""
    return int(routed_BT.cumsum(1).sum())


def cost(
    *,
    batch: int,
    time: int,
    heads: int,
    key_size: int,
    value_size: int,
    dtype: torch.dtype,
    routed_fraction: float = 1.0,
) -> Cost:
    """Cost over whole sequences with the routed tokens spread evenly; rounded to integers.

    Pairs: `routed_fraction * T (T + 1) / 2` a sequence. Bytes: q read and o written for every
    token, k and v read for the routed ones, in `dtype`; one byte of mask a token.
    """
    pairs = batch * routed_fraction * time * (time + 1) / 2
    row = heads * (key_size + value_size)
    tokens = batch * time
    moved = tokens * row * dtype.itemsize * (1.0 + routed_fraction) + tokens
    return Cost(flops=round(2 * row * pairs), bytes=round(moved))


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
