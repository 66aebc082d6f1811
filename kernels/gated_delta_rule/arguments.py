"""What goes into the gated delta rule and what comes out."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class GatedDeltaRuleOutput(NamedTuple):
    """Result of the gated delta rule over a sequence.

    Attributes:
        o_BTHV: Read-out `S_t^T q_t`, in the dtype of `v_BTHV`.
        final_state_BHKV: State after the last token, float32 (float64 for float64 inputs).
        prediction_BTHV: `p_t = a_t S_{t-1}^T k_t`, what the memory expected before it saw `v_t`;
            float32 (float64 for float64 inputs).
    """

    o_BTHV: Tensor
    final_state_BHKV: Tensor
    prediction_BTHV: Tensor


class ScoredOutput(NamedTuple):
    """Result of the gated delta rule with routing scores in place of predictions.

    Attributes:
        o_BTHV: Read-out `S_t^T q_t`, in the dtype of `v_BTHV`.
        final_state_BHKV: State after the last token, float32 (float64 for float64 inputs).
        score_BTH: How badly the state predicted each value, without gradient; float32 (float64 for
            float64 inputs).
    """

    o_BTHV: Tensor
    final_state_BHKV: Tensor
    score_BTH: Tensor


def check_arguments(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    log_decay_BTH: Tensor,
    beta_BTH: Tensor,
    initial_state_BHKV: Tensor | None,
) -> None:
    """Raise `ValueError` when shapes do not fit together; names what was received."""
    if q_BTHK.ndim != 4 or q_BTHK.shape[1] < 1:
        raise ValueError(f"q must be [B, T, H, K] with T >= 1, not {tuple(q_BTHK.shape)}")
    batch, time, heads, key_size = q_BTHK.shape
    value_size = v_BTHV.shape[-1]
    expected = {
        "k": (k_BTHK, (batch, time, heads, key_size)),
        "v": (v_BTHV, (batch, time, heads, value_size)),
        "log_decay": (log_decay_BTH, (batch, time, heads)),
        "beta": (beta_BTH, (batch, time, heads)),
        "initial_state": (initial_state_BHKV, (batch, heads, key_size, value_size)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must be {shape} to fit q, not {tuple(tensor.shape)}")
