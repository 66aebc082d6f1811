"""The gated delta rule one token at a time: the definition that every provider is held to.

Yang, Kautz and Hatamizadeh 2024, arXiv 2412.06464, equation 10, with the decay applied before the
prediction:

    p_t = a_t S_{t-1}^T k_t,   S_t = a_t S_{t-1} + k_t (beta_t (v_t - p_t))^T,   o_t = S_t^T q_t
"""

from __future__ import annotations

import torch
from torch import Tensor

from ham.kernels.chunks import compute_dtype, full_precision
from ham.kernels.gated_delta_rule.arguments import GatedDeltaRuleOutput
from ham.kernels.gated_delta_rule.layout import any_layout


def _read(state_BHKV: Tensor, key_BHK: Tensor) -> Tensor:
    return (key_BHK.unsqueeze(-2) @ state_BHKV).squeeze(-2)


@full_precision
def gated_delta_rule_step(
    q_BHK: Tensor,
    k_BHK: Tensor,
    v_BHV: Tensor,
    log_decay_BH: Tensor,
    beta_BH: Tensor,
    state_BHKV: Tensor,
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """One token of the gated delta rule, for decoding.

    Args:
        q_BHK: Query.
        k_BHK: Key.
        v_BHV: Value.
        log_decay_BH: Logarithm of the decay a, at most 0.
        beta_BH: Write strength in 0..1.
        state_BHKV: State before this token; not modified.
        scale: Multiplies the query. Default: K ** -0.5.

    Returns:
        `o_BHV` in the dtype of `v_BHV`, the new state, and the prediction; the last two in
        float32 (float64 if any input is float64).
    """
    dtype = compute_dtype(q_BHK, k_BHK, v_BHV, log_decay_BH, beta_BH, state_BHKV)
    query, key, value = q_BHK.to(dtype), k_BHK.to(dtype), v_BHV.to(dtype)
    state = state_BHKV.to(dtype)
    decay = log_decay_BH.to(dtype).exp().unsqueeze(-1)
    prediction = decay * _read(state, key)
    update = beta_BH.to(dtype).unsqueeze(-1) * (value - prediction)
    state = decay.unsqueeze(-1) * state + key.unsqueeze(-1) * update.unsqueeze(-2)
    output = _read(state, query * (q_BHK.shape[-1] ** -0.5 if scale is None else scale))
    return output.to(v_BHV.dtype), state, prediction


@any_layout
def reference(
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
    """The recurrence as a loop over `gated_delta_rule_step`; `chunk_size` has no effect."""
    del chunk_size
    inputs = (q_BTHK, k_BTHK, v_BTHV, log_decay_BTH, beta_BTH)
    state = initial_state_BHKV
    if state is None:
        batch, _, heads, key_size = k_BTHK.shape
        state = v_BTHV.new_zeros(
            batch, heads, key_size, v_BTHV.shape[-1], dtype=compute_dtype(*inputs)
        )
    outputs, predictions = [], []
    for token in zip(*(tensor.unbind(1) for tensor in inputs), strict=True):
        output, state, prediction = gated_delta_rule_step(*token, state, scale=scale)
        outputs.append(output)
        predictions.append(prediction)
    return GatedDeltaRuleOutput(torch.stack(outputs, 1), state, torch.stack(predictions, 1))
