"""The recurrence of Mamba-2 as matrix products over chunks (Dao and Gu 2024, section 6).

With h the state before a chunk, c the cumulative sum of `dt a` inside it and
`Gamma_ij = exp(c_i - c_j)` for i >= j:

    Y = (Gamma o C B^T) (dt X) + diag(exp(c)) C h^T + D X
    h' = exp(c_C) h + (dt X)^T diag(exp(c_C - c)) B

`C B^T` is shared by the heads of a group. Everything is batched over chunks but the sum of states.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ham.kernels.chunks import (
    compute_dtype,
    decay_matrix,
    full_precision,
    merge_chunks,
    split_chunks,
)
from ham.kernels.ssd.arguments import SsdOutput, over_heads


def _pass_states(
    decay_MBH11: Tensor, addition_MBHPS: Tensor, state_BHPS: Tensor
) -> tuple[Tensor, Tensor]:
    """Carry the state over the chunks; returns the state before each chunk and the last one."""
    before = []
    for decay, addition in zip(decay_MBH11, addition_MBHPS, strict=True):
        before.append(state_BHPS)
        state_BHPS = torch.addcmul(addition, decay, state_BHPS)
    return torch.stack(before), state_BHPS


@full_precision
def chunked(
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
    """The recurrence in chunks of `chunk_size` tokens, any sequence length."""
    dtype = compute_dtype(x_BTHP, dt_BTH, a_H, b_BTS, c_BTS, d_H, initial_state_BHPS)
    batch, length, heads, head_size = x_BTHP.shape
    chunk = min(chunk_size, length)

    # The fill of the last chunk has dt = 0: no decay and no input.
    x_MBHCP = split_chunks(x_BTHP.to(dtype), chunk)
    dt_MBHC = split_chunks(dt_BTH.to(dtype), chunk)
    b_MBGCS, c_MBGCS = (
        split_chunks((each if each.ndim == 4 else each.unsqueeze(2)).to(dtype), chunk)
        for each in (b_BTS, c_BTS)
    )
    b_MBHCS, c_MBHCS = (over_heads(each, heads, 2) for each in (b_MBGCS, c_MBGCS))
    a_H1 = a_H.double().unsqueeze(-1)
    cumulative_MBHC = (dt_MBHC.double() * a_H1).cumsum(-1)

    last_MBH1 = cumulative_MBHC[..., -1:]
    from_start_MBHC1 = cumulative_MBHC.exp().to(dtype).unsqueeze(-1)
    to_end_MBHC1 = (last_MBH1 - cumulative_MBHC).exp().to(dtype).unsqueeze(-1)
    whole_MBH11 = last_MBH1.exp().to(dtype).unsqueeze(-1)

    input_MBHCP = dt_MBHC.unsqueeze(-1) * x_MBHCP
    state = initial_state_BHPS
    if state is None:
        state = x_MBHCP.new_zeros(batch, heads, head_size, b_BTS.shape[-1])
    before_MBHPS, final_state_BHPS = _pass_states(
        whole_MBH11, (to_end_MBHC1 * input_MBHCP).mT @ b_MBHCS, state.to(dtype)
    )

    product_MBHCC = over_heads(c_MBGCS @ b_MBGCS.mT, heads, 2)
    within_MBHCC = decay_matrix(cumulative_MBHC, dtype) * product_MBHCC
    y_MBHCP = within_MBHCC @ input_MBHCP
    y_MBHCP = y_MBHCP + from_start_MBHC1 * (c_MBHCS @ before_MBHPS.mT)
    y_BTHP = merge_chunks(y_MBHCP, length) + d_H.to(dtype).unsqueeze(-1) * x_BTHP.to(dtype)
    return SsdOutput(y_BTHP.to(x_BTHP.dtype), final_state_BHPS)
