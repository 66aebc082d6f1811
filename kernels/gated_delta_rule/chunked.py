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

The backward pass is written by hand: autograd, which keeps and adds up many more matrices, took
61 ms for forward and backward at B4 T1024 H4 K64 on two CPU cores.

Letters beyond those of `kernels/chunks.py`: Y = B · H, X = M · Y, Z = (M + 1) · Y.
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
from ham.kernels.gated_delta_rule.layout import any_layout


class _Decay(NamedTuple):
    """Products of decays within a chunk, from differences of log decays, never above 1."""

    within_XCC: Tensor
    from_start_XC1: Tensor
    to_end_XC1: Tensor
    whole_X11: Tensor


def _decays(cumulative_XC: Tensor, dtype: torch.dtype) -> _Decay:
    last_X1 = cumulative_XC[:, -1:]
    return _Decay(
        decay_products(cumulative_XC, dtype),
        cumulative_XC.exp().to(dtype).unsqueeze(-1),
        (last_X1 - cumulative_XC).exp().to(dtype).unsqueeze(-1),
        last_X1.exp().to(dtype).unsqueeze(-1),
    )


def _carry_states(
    local_XCV: Tensor,
    key_part_XCK: Tensor,
    written_XCK: Tensor,
    whole_X11: Tensor,
    state_YKV: Tensor,
) -> tuple[Tensor, Tensor]:
    """Carry the state from chunk to chunk.

    Args:
        local_XCV: The part of the residuals that does not depend on the state.
        key_part_XCK: What multiplies the state before a chunk in its residuals.
        written_XCK: Keys with the weights that their residuals have in the state after the chunk.
        whole_X11: Decay over a chunk.
        state_YKV: First state, Y = B · H.

    Returns:
        The residuals `[X, C, V]`; the states before each chunk and after the last one,
        `[(M + 1) Y, K, V]`.
    """
    rows = state_YKV.shape[0]
    parts = (part.split(rows) for part in (local_XCV, key_part_XCK, written_XCK, whole_X11))
    residuals, states = [], [state_YKV]
    for local, key, written, whole in zip(*parts, strict=True):
        residuals.append(torch.baddbmm(local, key, states[-1], alpha=-1))
        states.append(torch.baddbmm(whole * states[-1], written.mT, residuals[-1]))
    return torch.cat(residuals), torch.cat(states)


def _carry_gradients(
    grad_residual_XCV: Tensor,
    grad_states_ZKV: Tensor,
    key_part_XCK: Tensor,
    written_XCK: Tensor,
    whole_X11: Tensor,
) -> None:
    """Adjoint of `_carry_states`, in place.

    Args:
        grad_residual_XCV: What reaches the residuals from within their chunk; made complete.
        grad_states_ZKV: What reaches the state before each chunk from its read-out and, at the
            end, the gradient of the final state; made complete.
    """
    rows = grad_states_ZKV.shape[0] - grad_residual_XCV.shape[0]
    before = grad_states_ZKV.split(rows)
    parts = (part.split(rows) for part in (grad_residual_XCV, key_part_XCK, written_XCK, whole_X11))
    for m, (residual, key, written, whole) in reversed([*enumerate(zip(*parts, strict=True))]):
        residual.baddbmm_(written, before[m + 1])
        before[m].addcmul_(whole, before[m + 1])
        before[m].baddbmm_(key.mT, residual, alpha=-1)


class _Chunks(torch.autograd.Function):
    """From chunks of inputs to read-outs, final state and residuals."""

    @staticmethod
    def forward(
        ctx: Any,
        q_XCK: Tensor,
        k_XCK: Tensor,
        v_XCV: Tensor,
        cumulative_XC: Tensor,
        beta_XC: Tensor,
        state_YKV: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        decay = _decays(cumulative_XC, q_XCK.dtype)
        beta_X1C, beta_XC1 = beta_XC.unsqueeze(-2), beta_XC.unsqueeze(-1)
        # Nothing in place here, see `decay_products`.
        similar_XCC = (k_XCK @ k_XCK.mT) * decay.within_XCC
        inverse_XCC = unit_triangular_inverse(similar_XCC * beta_X1C)
        key_part_XCK = inverse_XCC @ (decay.from_start_XC1 * k_XCK)
        written_XCK = (decay.to_end_XC1 * beta_XC1) * k_XCK
        residual_XCV, states_ZKV = _carry_states(
            inverse_XCC @ v_XCV, key_part_XCK, written_XCK, decay.whole_X11, state_YKV
        )
        readout_XCC = (q_XCK @ k_XCK.mT) * decay.within_XCC
        o_XCV = torch.baddbmm(
            (readout_XCC * beta_X1C) @ residual_XCV,
            decay.from_start_XC1 * q_XCK,
            states_ZKV[: len(q_XCK)],
        )
        ctx.save_for_backward(
            q_XCK,
            k_XCK,
            beta_XC,
            *decay,
            similar_XCC,
            inverse_XCC,
            readout_XCC,
            key_part_XCK,
            written_XCK,
            residual_XCV,
            states_ZKV,
        )
        return o_XCV, states_ZKV[len(q_XCK) :].clone(), residual_XCV

    @staticmethod
    @once_differentiable
    @full_precision
    def backward(
        ctx: Any, grad_o: Tensor, grad_final: Tensor, grad_residual_read: Tensor
    ) -> tuple[Tensor, ...]:
        q, k, beta, within, from_start, to_end, whole, *saved = ctx.saved_tensors
        similar, inverse, readout, key_part, written, residual, states = saved
        beta_row, beta_column = beta.unsqueeze(-2), beta.unsqueeze(-1)
        rows = len(states) - len(q)
        grad_o = grad_o.contiguous()

        grad_residual = readout.mT @ grad_o
        grad_beta = (grad_residual * residual).sum(-1)
        grad_residual.mul_(beta_column).add_(grad_residual_read)
        from_start_o = from_start * grad_o
        grad_states = torch.empty_like(states)
        torch.bmm(q.mT, from_start_o, out=grad_states[:-rows])
        grad_states[-rows:] = grad_final
        _carry_gradients(grad_residual, grad_states, key_part, written, whole)

        # Through the products within a chunk: first with respect to the triangular system and to
        # Q K^T, both already times the decay that they carry, then to k, q, beta and the decay.
        grad_right = inverse.mT @ grad_residual
        grad_system = (grad_right @ residual.mT).neg_().tril_(-1)
        grad_readout = (grad_o @ residual.mT).mul_(beta_row)
        flow_beta = grad_system * similar
        grad_beta += flow_beta.sum(-2)
        flow = flow_beta.mul_(beta_row).addcmul_(grad_readout, readout).double()
        grad_cumulative = flow.sum(-1) - flow.sum(-2)
        grad_system.mul_(within).mul_(beta_row)
        grad_readout.mul_(within)

        # Through the states before a chunk (read by q and k) and after it (written by k).
        grad_q = from_start_o @ states[:-rows].mT
        grad_k = (from_start * grad_right) @ states[:-rows].mT
        start = ((grad_q * q).sum(-1) - (grad_k * k).sum(-1)).double()
        grad_written = residual @ grad_states[rows:].mT
        weight = (grad_written * k).sum(-1)
        end = (weight * beta * to_end.squeeze(-1)).double()
        last = (grad_states[rows:] * states[:-rows]).sum((-1, -2)) * whole[:, 0, 0]
        grad_cumulative += start - end
        grad_cumulative[:, -1] += end.sum(-1) + last.double()
        grad_beta.addcmul_(weight, to_end.squeeze(-1))

        grad_q.baddbmm_(grad_readout, k)
        grad_k.baddbmm_(grad_system + grad_system.mT, k, beta=-1)
        grad_k.baddbmm_(grad_readout.mT, q)
        grad_k.addcmul_(to_end * beta_column, grad_written)
        return grad_q, grad_k, grad_right, grad_cumulative, grad_beta, grad_states[:rows]


@full_precision
@any_layout
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
        state = v_BTHV.new_zeros(batch, heads, key_size, v_BTHV.shape[-1])

    # The fill of the last chunk has zero log decay, key and beta, so it leaves the state alone.
    v_MBHCV = split_chunks(v_BTHV.to(dtype), chunk)
    o_XCV, final_state_YKV, residual_XCV = _Chunks.apply(
        split_chunks(q_BTHK.to(dtype) * scale, chunk).flatten(0, 2),
        split_chunks(k_BTHK.to(dtype), chunk).flatten(0, 2),
        v_MBHCV.flatten(0, 2),
        split_chunks(log_decay_BTH.double(), chunk).cumsum(-1).flatten(0, 2),
        split_chunks(beta_BTH.to(dtype), chunk).flatten(0, 2),
        state.to(dtype).flatten(0, 1),
    )
    return GatedDeltaRuleOutput(
        merge_chunks(o_XCV.view(v_MBHCV.shape), length).to(v_BTHV.dtype),
        final_state_YKV.unflatten(0, (batch, heads)),
        merge_chunks(v_MBHCV - residual_XCV.view(v_MBHCV.shape), length),
    )
