"""FLOPs and bytes of the recurrence of Mamba-2.

Per token and head the recurrence goes over the P × S state three times: decay (1 FLOP an element),
write `x b^T` (2) and read-out `h c` (2), 5 in all. Vector work of order P + S is left out. A
backward pass is taken as two forward passes (Kaplan et al. 2020, section 2.1).
"""

from __future__ import annotations

import torch

from ham.kernels.registry import Cost


def cost(
    *,
    batch: int,
    time: int,
    heads: int,
    head_size: int,
    state_size: int,
    dtype: torch.dtype,
    groups: int = 1,
    initial_state: bool = False,
) -> Cost:
    """Cost of the recurrence; one decode step is `time=1, initial_state=True`.

    Bytes: x, b, c read and y written in `dtype`; dt, a and D read and the final state written
    (initial state read, if there is one) in float32, or float64 with float64.
    """
    element = dtype.itemsize
    state_element = max(element, 4)
    tokens = batch * time
    state = batch * heads * head_size * state_size
    moved = tokens * (2 * heads * head_size + 2 * groups * state_size) * element
    moved += (tokens * heads + 2 * heads) * state_element
    moved += state * (2 if initial_state else 1) * state_element
    return Cost(flops=5 * tokens * heads * head_size * state_size, bytes=moved)


def chunked_flops(
    *,
    batch: int,
    time: int,
    heads: int,
    head_size: int,
    state_size: int,
    chunk_size: int,
    groups: int = 1,
) -> int:
    """FLOPs of the matrix products of the chunked form, as `chunked.py` carries them out.

    Per chunk of C tokens: `C B^T` 2 C² S once for each group of heads; per head the product within
    the chunk 2 C² P, the state added 2 C P S, the state read 2 C P S, and the state pass 2 P S. A
    last partial chunk counts in full, as it is filled up.
    """
    C, P, S = min(chunk_size, time), head_size, state_size
    chunks = batch * -(-time // C)
    return chunks * (groups * 2 * C * C * S + heads * (2 * C * C * P + 4 * C * P * S + 2 * P * S))
