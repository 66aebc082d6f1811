"""The gated delta rule as matrix products over chunks of tokens.

With S the state before a chunk, c the cumulative log decay inside it, `Gamma_ij = exp(c_i - c_j)`
for i >= j and `gamma_i = exp(c_i)`, unrolling the recurrence gives

    r = (I + tril(Gamma o K K^T, -1) diag(beta))^-1 (V - diag(gamma) K S),   u = beta r,   p = V - r
    O = diag(gamma) Q S + tril(Gamma o Q K^T) u
    S' = gamma_C S + (diag(gamma_C / gamma) K)^T u

The write strength stands on the columns of the system, not on its rows as in the usual WY form
(Yang et al. 2024, arXiv 2412.06464, section 3.3): r is the residual itself, so the prediction is
exact even for beta = 0, where dividing the update by beta would not be. S enters r linearly, hence
`S' = A S + N` with A and N known for all chunks before the first state is: everything is batched
over chunks but one small product per chunk.
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
    unit_triangular_solve,
)
from ham.kernels.gated_delta_rule.arguments import GatedDeltaRuleOutput


def _pass_states(
    transition_BHMKK: Tensor, addition_BHMKV: Tensor, state_BHKV: Tensor
) -> tuple[Tensor, Tensor]:
    """Carry the state over the chunks; returns the state before each chunk and the last one."""
    batch, heads = state_BHKV.shape[:2]
    state_XKV = state_BHKV.flatten(0, 1)
    before = []
    transitions = transition_BHMKK.flatten(0, 1).unbind(1)
    additions = addition_BHMKV.flatten(0, 1).unbind(1)
    for transition_XKK, addition_XKV in zip(transitions, additions, strict=True):
        before.append(state_XKV)
        state_XKV = torch.baddbmm(addition_XKV, transition_XKK, state_XKV)
    before_BHMKV = torch.stack(before, 1).unflatten(0, (batch, heads))
    return before_BHMKV, state_XKV.unflatten(0, (batch, heads))


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
    value_size = v_BTHV.shape[-1]
    chunk = min(chunk_size, length)

    # The fill of the last chunk has zero log decay, key and beta, so it leaves the state alone.
    q_BHMCK = split_chunks(q_BTHK.to(dtype) * scale, chunk)
    k_BHMCK = split_chunks(k_BTHK.to(dtype), chunk)
    v_BHMCV = split_chunks(v_BTHV.to(dtype), chunk)
    beta_BHMC1 = split_chunks(beta_BTH.to(dtype), chunk).unsqueeze(-1)
    cumulative_BHMC = split_chunks(log_decay_BTH.double(), chunk).cumsum(-1)

    last_BHM1 = cumulative_BHMC[..., -1:]
    from_start_BHMC1 = cumulative_BHMC.exp().to(dtype).unsqueeze(-1)
    to_end_BHMC1 = (last_BHM1 - cumulative_BHMC).exp().to(dtype).unsqueeze(-1)
    whole_BHM11 = last_BHM1.exp().to(dtype).unsqueeze(-1)
    gamma_BHMCC = decay_matrix(cumulative_BHMC, dtype)

    weighted_k_BHMCK = beta_BHMC1 * k_BHMCK
    lower_BHMCC = gamma_BHMCC * (k_BHMCK @ weighted_k_BHMCK.mT)
    right = torch.cat([v_BHMCV, from_start_BHMC1 * k_BHMCK], -1)
    solution = unit_triangular_solve(lower_BHMCC, right)
    value_part_BHMCV, key_part_BHMCK = solution.split([value_size, key_size], -1)

    written_k_BHMKC = (to_end_BHMC1 * weighted_k_BHMCK).mT
    eye_KK = torch.eye(key_size, dtype=dtype, device=q_BTHK.device)
    state = initial_state_BHKV
    if state is None:
        state = v_BHMCV.new_zeros(batch, heads, key_size, value_size)
    before_BHMKV, final_state_BHKV = _pass_states(
        whole_BHM11 * eye_KK - written_k_BHMKC @ key_part_BHMCK,
        written_k_BHMKC @ value_part_BHMCV,
        state.to(dtype),
    )

    residual_BHMCV = value_part_BHMCV - key_part_BHMCK @ before_BHMKV
    within_BHMCC = gamma_BHMCC * (q_BHMCK @ k_BHMCK.mT)
    o_BHMCV = (from_start_BHMC1 * q_BHMCK) @ before_BHMKV
    o_BHMCV = o_BHMCV + within_BHMCC @ (beta_BHMC1 * residual_BHMCV)
    return GatedDeltaRuleOutput(
        merge_chunks(o_BHMCV, length).to(v_BTHV.dtype),
        final_state_BHKV,
        merge_chunks(v_BHMCV - residual_BHMCV, length),
    )
