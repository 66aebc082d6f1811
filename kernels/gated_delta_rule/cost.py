"""FLOPs and bytes of the gated delta rule.

Per token and head the recurrence multiplies and adds over the K × V state four times: prediction
`S^T k` (2 FLOPs an element), decay (1), write `k u^T` (2) and read-out `S^T q` (2), 7 in all.
Vector work of order K + V is left out. A backward pass is taken as two forward passes
(Kaplan et al. 2020, section 2.1).
"""

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
    dtype: torch.dtype,
    initial_state: bool = False,
) -> Cost:
    """Cost of the recurrence; one decode step is `time=1, initial_state=True`.

    Bytes: q, k, v read and o written in `dtype`; log decay and beta read, prediction and final
    state written (initial state read, if there is one) in float32, or float64 with float64.
    """
    element = dtype.itemsize
    state_element = max(element, 4)
    tokens = batch * time * heads
    state = batch * heads * key_size * value_size
    moved = tokens * (2 * key_size + 2 * value_size) * element
    moved += tokens * (2 + value_size) * state_element
    moved += state * (2 if initial_state else 1) * state_element
    return Cost(flops=7 * tokens * key_size * value_size, bytes=moved)


def chunked_flops(
    *, batch: int, time: int, heads: int, key_size: int, value_size: int, chunk_size: int
) -> int:
    """FLOPs of the matrix products of the chunked form, as `chunked.py` carries them out.

    Per chunk of C tokens and head: `K K^T` and `Q K^T` 4 C² K, inverse of a triangle C³ / 3, its
    products with V and K 2 C² (V + K), residual, update and read-out of the state 2 C K V each,
    product within the chunk 2 C² V. A last partial chunk counts in full, as it is filled up.
    """
    C, K, V = min(chunk_size, time), key_size, value_size
    chunks = batch * heads * -(-time // C)
    square = 4 * C * C * K + 2 * C * C * (V + K) + 2 * C * C * V
    return chunks * (square + C**3 // 3 + 6 * C * K * V)
