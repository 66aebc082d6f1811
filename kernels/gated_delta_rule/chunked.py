"""The gated delta rule as matrix products over chunks of tokens.

With S the state before a chunk, c the cumulative log decay inside it, `Gamma_ij = exp(c_i - c_j)`
for i >= j, `gamma_i = exp(c_i)` and gamma_C its last entry, unrolling the recurrence gives

    r = (I + tril(Gamma o K K^T, -1) diag(beta))^-1 (V - diag(gamma) K S),   u = beta r,   p = V - r
    O = diag(gamma) Q S + tril(Gamma o Q K^T) u
    S' = gamma_C S + (diag(gamma_C / gamma) K)^T u

The write strength stands on the columns of the system, not on its rows as in the usual WY form
(Yang et al. 2024, arXiv 2412.06464, section 3.3): r is the residual itself, so the prediction is
exact even for beta = 0, where dividing the update by beta would not be. Everything is batched over
chunks but two products per chunk that carry the state.

The backward pass is written by hand: with autograd, forward and backward took 61 ms for
B4 T1024 H4 K64 on two CPU cores, because it keeps and adds up many `[C, C]` matrices.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ham.kernels.chunks import (
    compute_dtype,
    decay_products,
    full_precision,
    merge_chunks,
    split_chunks,
    unit_triangular_inverse,
)
from ham.kernels.gated_delta_rule.arguments import GatedDeltaRuleOutput


class _Decay(NamedTuple):
    """Products of decays within a chunk, from differences of log decays, never above 1."""

    within_MBHCC: Tensor
    from_start_MBHC1: Tensor
    to_end_MBHC1: Tensor
    whole_MBH11: Tensor


def _decays(cumulative_MBHC: Tensor, dtype: torch.dtype) -> _Decay:
    last_MBH1 = cumulative_MBHC[..., -1:]
    return _Decay(
        decay_products(cumulative_MBHC, dtype),
        cumulative_MBHC.exp().to(dtype).unsqueeze(-1),
        (last_MBH1 - cumulative_MBHC).exp().to(dtype).unsqueeze(-1),
        last_MBH1.exp().to(dtype).unsqueeze(-1),
    )


def _join_heads(x_MBHXY: Tensor) -> Tensor:
    """`[M, B * H, X, Y]`, always a view: what is written to it has to reach the original."""
    return x_MBHXY.view(x_MBHXY.shape[0], -1, *x_MBHXY.shape[3:])


def _carry_states(
    value_part_MBHCV: Tensor,
    key_part_MBHCK: Tensor,
    written_k_MBHCK: Tensor,
    whole_MBH11: Tensor,
    state_BHKV: Tensor,
) -> tuple[Tensor, Tensor]:
    """Turn the value part into residuals, in place, from chunk to chunk.

    Returns:
        The residuals and the states before each chunk and after the last, `[M + 1, B, H, K, V]`.
    """
    chunks = value_part_MBHCV.shape[0]
    states = state_BHKV.new_empty(chunks + 1, *state_BHKV.shape)
    states[0] = state_BHKV
    residual, key, written, whole, state = (
        _join_heads(x)
        for x in (value_part_MBHCV, key_part_MBHCK, written_k_MBHCK, whole_MBH11, states)
    )
    for m in range(chunks):
        residual[m].baddbmm_(key[m], state[m], alpha=-1)
        torch.mul(whole[m], state[m], out=state[m + 1])
        state[m + 1].baddbmm_(written[m].mT, residual[m])
    return value_part_MBHCV, states


def _carry_gradients(
    grad_residual_MBHCV: Tensor,
    grad_states: Tensor,
    key_part_MBHCK: Tensor,
    written_k_MBHCK: Tensor,
    whole_MBH11: Tensor,
) -> None:
    """Adjoint of `_carry_states`, in place.

    Args:
        grad_residual_MBHCV: What reaches the residuals from within their chunk; made complete.
        grad_states: `[M + 1, B, H, K, V]`; what reaches the state before each chunk from its
            read-out, and the gradient of the final state; made complete.
    """
    residual, state, key, written, whole = (
        _join_heads(x)
        for x in (grad_residual_MBHCV, grad_states, key_part_MBHCK, written_k_MBHCK, whole_MBH11)
    )
    for m in reversed(range(residual.shape[0])):
        residual[m].baddbmm_(written[m], state[m + 1])
        state[m].addcmul_(whole[m], state[m + 1])
        state[m].baddbmm_(key[m].mT, residual[m], alpha=-1)


class _Chunks(torch.autograd.Function):
    """From chunked inputs to read-out, final state and residual."""

    @staticmethod
    def forward(
        ctx: Any,
        q_MBHCK: Tensor,
        k_MBHCK: Tensor,
        v_MBHCV: Tensor,
        cumulative_MBHC: Tensor,
        beta_MBHC1: Tensor,
        state_BHKV: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        decay = _decays(cumulative_MBHC, q_MBHCK.dtype)
        weighted_k_MBHCK = beta_MBHC1 * k_MBHCK
        lower_MBHCC = (k_MBHCK @ weighted_k_MBHCK.mT).mul_(decay.within_MBHCC)
        inverse_MBHCC = unit_triangular_inverse(lower_MBHCC)
        key_part_MBHCK = inverse_MBHCC @ (decay.from_start_MBHC1 * k_MBHCK)
        residual_MBHCV, states = _carry_states(
            inverse_MBHCC @ v_MBHCV,
            key_part_MBHCK,
            decay.to_end_MBHC1 * weighted_k_MBHCK,
            decay.whole_MBH11,
            state_BHKV,
        )
        readout_MBHCC = (q_MBHCK @ k_MBHCK.mT).mul_(decay.within_MBHCC)
        o_MBHCV = readout_MBHCC @ (beta_MBHC1 * residual_MBHCV)
        o_MBHCV.addcmul_(decay.from_start_MBHC1, q_MBHCK @ states[:-1])
        ctx.save_for_backward(
            q_MBHCK,
            k_MBHCK,
            beta_MBHC1,
            *decay,
            lower_MBHCC,
            inverse_MBHCC,
            readout_MBHCC,
            key_part_MBHCK,
            residual_MBHCV,
            states,
        )
        return o_MBHCV, states[-1].clone(), residual_MBHCV

    @staticmethod
    @once_differentiable
    @full_precision
    def backward(
        ctx: Any, grad_o_MBHCV: Tensor, grad_final_BHKV: Tensor, grad_residual_MBHCV: Tensor
    ) -> tuple[Tensor, ...]:
        q, k, beta, *decay, lower, inverse, readout, key_part, residual, states = ctx.saved_tensors
        within, from_start, to_end, whole = decay
        weighted_k = beta * k
        grad_o_MBHCV = grad_o_MBHCV.contiguous()

        grad_update = readout.mT @ grad_o_MBHCV
        grad_residual = torch.addcmul(grad_residual_MBHCV.contiguous(), beta, grad_update)
        grad_states = torch.empty_like(states)
        torch.matmul((from_start * q).mT, grad_o_MBHCV, out=grad_states[:-1])
        grad_states[-1] = grad_final_BHKV
        _carry_gradients(grad_residual, grad_states, key_part, to_end * weighted_k, whole)
        # Of the right-hand side V - diag(gamma) K S of the system.
        grad_right = inverse.mT @ grad_residual

        grad_lower = (grad_right @ residual.mT).neg_().tril_(-1)
        grad_readout = grad_o_MBHCV @ (beta * residual).mT
        flow = (grad_lower * lower).addcmul_(grad_readout, readout).double()
        grad_cumulative = flow.sum(-1) - flow.sum(-2)
        grad_lower.mul_(within)
        grad_readout.mul_(within)

        from_state_q = grad_o_MBHCV @ states[:-1].mT
        from_state_k = grad_right @ states[:-1].mT
        from_state_w = residual @ grad_states[1:].mT
        grad_q = torch.addcmul(grad_readout @ k, from_start, from_state_q)
        grad_weighted_k = torch.addcmul(grad_lower.mT @ k, to_end, from_state_w)
        grad_k = torch.addcmul(grad_lower @ weighted_k, from_start, from_state_k, value=-1)
        grad_k += grad_readout.mT @ q
        grad_k.addcmul_(beta, grad_weighted_k)
        grad_beta = (grad_update * residual).sum(-1, keepdim=True)
        grad_beta += (grad_weighted_k * k).sum(-1, keepdim=True)

        start = (from_state_q * q).sub_(from_state_k * k).sum(-1, keepdim=True)
        end = ((from_state_w * weighted_k).sum(-1, keepdim=True) * to_end).squeeze(-1).double()
        grad_cumulative += (from_start * start).squeeze(-1).double() - end
        last = (grad_states[1:] * states[:-1]).sum((-1, -2)) * whole[..., 0, 0]
        grad_cumulative[..., -1] += end.sum(-1) + last.double()
        return grad_q, grad_k, grad_right, grad_cumulative, grad_beta, grad_states[0]


@full_precision
def chunked(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    log_decay_BTH: Tensor,
    beta_BTH: Tensor,
    *,
    initial_state_BHKV: Tensor | None,
    scale: float,
    chunk_size: int,
) -> GatedDeltaRuleOutput:
    """The gated delta rule in chunks of `chunk_size` tokens, any sequence length."""
    dtype = compute_dtype(q_BTHK, k_BTHK, v_BTHV, log_decay_BTH, beta_BTH, initial_state_BHKV)
    batch, length, heads, key_size = q_BTHK.shape
    chunk = min(chunk_size, length)
    state = initial_state_BHKV
    if state is None:
        state = v_BTHV.new_zeros(batch, heads, key_size, v_BTHV.shape[-1], dtype=dtype)

    # The fill of the last chunk has zero log decay, key and beta, so it leaves the state alone.
    v_MBHCV = split_chunks(v_BTHV.to(dtype), chunk)
    o_MBHCV, final_state_BHKV, residual_MBHCV = _Chunks.apply(
        split_chunks(q_BTHK.to(dtype) * scale, chunk),
        split_chunks(k_BTHK.to(dtype), chunk),
        v_MBHCV,
        split_chunks(log_decay_BTH.double(), chunk).cumsum(-1),
        split_chunks(beta_BTH.to(dtype), chunk).unsqueeze(-1),
        state.to(dtype),
    )
    return GatedDeltaRuleOutput(
        merge_chunks(o_MBHCV, length).to(v_BTHV.dtype),
        final_state_BHKV,
        merge_chunks(v_MBHCV - residual_MBHCV, length),
    )
