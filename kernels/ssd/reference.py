"""The recurrence of Mamba-2 one token at a time: the definition that every provider is held to.

Dao and Gu 2024, arXiv 2405.21060, equation 2 with a scalar decay per head:

    h_t = exp(dt_t a) h_{t-1} + dt_t x_t b_t^T,   y_t = h_t c_t + D x_t
"""

from __future__ import annotations

import torch
from torch import Tensor

from ham.kernels.chunks import compute_dtype, full_precision
from ham.kernels.ssd.arguments import SsdOutput, over_heads


@full_precision
def ssd_step(
    x_BHP: Tensor,
    dt_BH: Tensor,
    a_H: Tensor,
    b_BS: Tensor,
    c_BS: Tensor,
    d_H: Tensor,
    state_BHPS: Tensor,
) -> tuple[Tensor, Tensor]:
    """One token of the recurrence, for decoding.

    Args:
        x_BHP: Input.
        dt_BH: Step size, positive already.
        a_H: Decay rate of each head, negative.
        b_BS: Input projection, shared by the heads, or `[B, G, S]`, one for each group of heads.
        c_BS: Output projection, of the same shape.
        d_H: Skip weight of each head.
        state_BHPS: State before this token; not modified.

    Returns:
        `y_BHP` in the dtype of `x_BHP`, and the new state in float32 (float64 if any input is
        float64).
    """
    dtype = compute_dtype(x_BHP, dt_BH, a_H, b_BS, c_BS, d_H, state_BHPS)
    x, dt = x_BHP.to(dtype), dt_BH.to(dtype).unsqueeze(-1)
    decay_BH11 = (dt * a_H.to(dtype).unsqueeze(-1)).exp().unsqueeze(-1)
    b_BHS, c_BHS = (
        over_heads(each.to(dtype).view(each.shape[0], -1, each.shape[-1]), x.shape[1])
        for each in (b_BS, c_BS)
    )
    state = decay_BH11 * state_BHPS.to(dtype) + (dt * x).unsqueeze(-1) * b_BHS.unsqueeze(-2)
    y_BHP = (state @ c_BHS.unsqueeze(-1)).squeeze(-1) + d_H.to(dtype).unsqueeze(-1) * x
    return y_BHP.to(x_BHP.dtype), state


def reference(
    x_BTHP: Tensor,
    dt_BTH: Tensor,
    a_H: Tensor,
    b_BTS: Tensor,
    c_BTS: Tensor,
    d_H: Tensor,
    *,
    initial_state_BHPS: Tensor | None,
    chunk_size: int,
) -> SsdOutput:
    """The recurrence as a loop over `ssd_step`; `chunk_size` has no effect."""
    del chunk_size
    state = initial_state_BHPS
    if state is None:
        batch, _, heads, head_size = x_BTHP.shape
        dtype = compute_dtype(x_BTHP, dt_BTH, a_H, b_BTS, c_BTS, d_H)
        state = x_BTHP.new_zeros(batch, heads, head_size, b_BTS.shape[-1], dtype=dtype)
    outputs = []
    sequences = (x_BTHP, dt_BTH, b_BTS, c_BTS)
    for x, dt, b, c in zip(*(tensor.unbind(1) for tensor in sequences), strict=True):
        y_BHP, state = ssd_step(x, dt, a_H, b, c, d_H, state)
        outputs.append(y_BHP)
    return SsdOutput(torch.stack(outputs, 1), state)
