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
    key_heads: int | None = None,
    sequences: int | None = None,
) -> Cost:
    """Cost of the recurrence; one decode step is `time=1, initial_state=True`.

    Bytes: q, k, v read and o written in `dtype`; log decay and beta read, prediction and final
    state written (initial state read, if there is one) in float32, or float64 with float64.

    Args:
        batch: Rows.
        time: Tokens of a row.
        heads: Value heads.
        key_size: K.
        value_size: V.
        dtype: Of q, k and v.
        initial_state: Whether there is one.
        key_heads: Heads of q and k. Default: those of v.
        sequences: Sequences that share the one row. Default: one per row.
    """
    element = dtype.itemsize
    state_element = max(element, 4)
    tokens = batch * time * heads
    key_tokens = tokens if key_heads is None else batch * time * key_heads
    count = batch if sequences is None else sequences
    state = count * heads * key_size * value_size
    moved = (key_tokens * 2 * key_size + tokens * 2 * value_size) * element
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
