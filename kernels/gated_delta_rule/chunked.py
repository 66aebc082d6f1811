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

    within_BHMCC: Tensor
    from_start_BHMC1: Tensor
    to_end_BHMC1: Tensor
    whole_BHM11: Tensor


def _decays(cumulative_BHMC: Tensor, dtype: torch.dtype) -> _Decay:
    last_BHM1 = cumulative_BHMC[..., -1:]
    return _Decay(
        decay_products(cumulative_BHMC, dtype),
        cumulative_BHMC.exp().to(dtype).unsqueeze(-1),
        (last_BHM1 - cumulative_BHMC).exp().to(dtype).unsqueeze(-1),
        last_BHM1.exp().to(dtype).unsqueeze(-1),
    )


def _carry_states(
    value_part_BHMCV: Tensor,
    key_part_BHMCK: Tensor,
    written_k_BHMCK: Tensor,
    whole_BHM11: Tensor,
    state_BHKV: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Residuals, the state before each chunk, and the state after the last one."""
    heads = state_BHKV.shape[:2]
    state_XKV = state_BHKV.flatten(0, 1)
    residuals, before = [], []
    parts = (value_part_BHMCV, key_part_BHMCK, written_k_BHMCK, whole_BHM11)
    for value, key, written, whole in zip(
        *(part.flatten(0, 1).unbind(1) for part in parts), strict=True
    ):
        residual_XCV = torch.baddbmm(value, key, state_XKV, alpha=-1)
        before.append(state_XKV)
        residuals.append(residual_XCV)
        state_XKV = torch.baddbmm(whole * state_XKV, written.mT, residual_XCV)
    return (
        torch.stack(residuals, 1).unflatten(0, heads),
        torch.stack(before, 1).unflatten(0, heads),
        state_XKV.unflatten(0, heads),
    )


def _carry_gradients(
    grad_residual_BHMCV: Tensor,
    grad_before_BHMKV: Tensor,
    key_part_BHMCK: Tensor,
    written_k_BHMCK: Tensor,
    whole_BHM11: Tensor,
    grad_state_BHKV: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Adjoint of `_carry_states`.

    Args:
        grad_residual_BHMCV: What reaches the residuals from within their chunk.
        grad_before_BHMKV: What reaches the state before each chunk from its read-out.
        grad_state_BHKV: What reaches the final state.

    Returns:
        Complete gradients of the residuals, of the state after each chunk and of the first state.
    """
    heads = grad_state_BHKV.shape[:2]
    grad_XKV = grad_state_BHKV.flatten(0, 1)
    residuals, after = [], []
    parts = (grad_residual_BHMCV, grad_before_BHMKV, key_part_BHMCK, written_k_BHMCK, whole_BHM11)
    chunks = zip(*(part.flatten(0, 1).unbind(1) for part in parts), strict=True)
    for residual, readout, key, written, whole in reversed(list(chunks)):
        residual_XCV = torch.baddbmm(residual, written, grad_XKV)
        after.append(grad_XKV)
        residuals.append(residual_XCV)
        grad_XKV = torch.baddbmm(whole * grad_XKV + readout, key.mT, residual_XCV, alpha=-1)
    return (
        torch.stack(residuals[::-1], 1).unflatten(0, heads),
        torch.stack(after[::-1], 1).unflatten(0, heads),
        grad_XKV.unflatten(0, heads),
    )


class _Chunks(torch.autograd.Function):
    """From chunked inputs to read-out, final state and residual."""

    @staticmethod
    def forward(
        ctx: Any,
        q_BHMCK: Tensor,
        k_BHMCK: Tensor,
        v_BHMCV: Tensor,
        cumulative_BHMC: Tensor,
        beta_BHMC1: Tensor,
        state_BHKV: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        decay = _decays(cumulative_BHMC, q_BHMCK.dtype)
        weighted_k_BHMCK = beta_BHMC1 * k_BHMCK
        lower_BHMCC = (k_BHMCK @ weighted_k_BHMCK.mT).mul_(decay.within_BHMCC)
        inverse_BHMCC = unit_triangular_inverse(lower_BHMCC)
        key_part_BHMCK = inverse_BHMCC @ (decay.from_start_BHMC1 * k_BHMCK)
        residual_BHMCV, before_BHMKV, final_BHKV = _carry_states(
            inverse_BHMCC @ v_BHMCV,
            key_part_BHMCK,
            decay.to_end_BHMC1 * weighted_k_BHMCK,
            decay.whole_BHM11,
            state_BHKV,
        )
        readout_BHMCC = (q_BHMCK @ k_BHMCK.mT).mul_(decay.within_BHMCC)
        o_BHMCV = (decay.from_start_BHMC1 * q_BHMCK) @ before_BHMKV
        o_BHMCV += readout_BHMCC @ (beta_BHMC1 * residual_BHMCV)
        ctx.save_for_backward(
            q_BHMCK,
            k_BHMCK,
            beta_BHMC1,
            *decay,
            lower_BHMCC,
            inverse_BHMCC,
            readout_BHMCC,
            key_part_BHMCK,
            residual_BHMCV,
            before_BHMKV,
        )
        return o_BHMCV, final_BHKV, residual_BHMCV

    @staticmethod
    @once_differentiable
    @full_precision
    def backward(
        ctx: Any, grad_o_BHMCV: Tensor, grad_final_BHKV: Tensor, grad_residual_BHMCV: Tensor
    ) -> tuple[Tensor, ...]:
        q, k, beta, *decay, lower, inverse, readout, key_part, residual, before = ctx.saved_tensors
        within, from_start, to_end, whole = decay
        weighted_k = beta * k

        grad_update = readout.mT @ grad_o_BHMCV
        grad_residual, grad_after, grad_state = _carry_gradients(
            torch.addcmul(grad_residual_BHMCV, beta, grad_update),
            (from_start * q).mT @ grad_o_BHMCV,
            key_part,
            to_end * weighted_k,
            whole,
            grad_final_BHKV,
        )
        # Of the right-hand side V - diag(gamma) K S of the system.
        grad_right = inverse.mT @ grad_residual

        grad_lower = (grad_right @ residual.mT).neg_().tril_(-1)
        grad_readout = grad_o_BHMCV @ (beta * residual).mT
        flow = (grad_lower * lower).addcmul_(grad_readout, readout).double()
        grad_cumulative = flow.sum(-1) - flow.sum(-2)
        grad_lower.mul_(within)
        grad_readout.mul_(within)

        from_state_q = grad_o_BHMCV @ before.mT
        from_state_k = grad_right @ before.mT
        from_state_w = residual @ grad_after.mT
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
        last = (grad_after * before).sum((-1, -2)) * whole[..., 0, 0]
        grad_cumulative[..., -1] += end.sum(-1) + last.double()
        return grad_q, grad_k, grad_right, grad_cumulative, grad_beta, grad_state


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
    v_BHMCV = split_chunks(v_BTHV.to(dtype), chunk)
    o_BHMCV, final_state_BHKV, residual_BHMCV = _Chunks.apply(
        split_chunks(q_BTHK.to(dtype) * scale, chunk),
        split_chunks(k_BTHK.to(dtype), chunk),
        v_BHMCV,
        split_chunks(log_decay_BTH.double(), chunk).cumsum(-1),
        split_chunks(beta_BTH.to(dtype), chunk).unsqueeze(-1),
        state.to(dtype),
    )
    return GatedDeltaRuleOutput(
        merge_chunks(o_BHMCV, length).to(v_BTHV.dtype),
        final_state_BHKV,
        merge_chunks(v_BHMCV - residual_BHMCV, length),
    )
