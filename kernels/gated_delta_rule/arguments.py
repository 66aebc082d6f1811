"""What goes into the gated delta rule and what comes out."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class GatedDeltaRuleOutput(NamedTuple):
    """Result of the gated delta rule over a sequence.

    Attributes:
        o_BTHV: Read-out `S_t^T q_t`, in the dtype of `v_BTHV`.
        final_state_BHKV: State after the last token, float32 (float64 for float64 inputs); with
            `cu_seqlens_N1` of every sequence, `[N, H, K, V]`.
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
        final_state_BHKV: State after the last token, float32 (float64 for float64 inputs); with
            `cu_seqlens_N1` of every sequence, `[N, H, K, V]`.
        score_BTH: How badly the state predicted each value, without gradient; float32 (float64 for
            float64 inputs). None if no score was asked for.
        score_BT: Its minimum, mean or maximum over heads; None unless asked for.
    """

    o_BTHV: Tensor
    final_state_BHKV: Tensor
    score_BTH: Tensor | None
    score_BT: Tensor | None = None


def check_arguments(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    log_decay_BTH: Tensor,
    beta_BTH: Tensor,
    initial_state_BHKV: Tensor | None,
    cu_seqlens_N1: Tensor | None = None,
) -> None:
    """Raise `ValueError` when shapes do not fit together; names what was received."""
    if q_BTHK.ndim != 4 or q_BTHK.shape[1] < 1:
        raise ValueError(f"q must be [B, T, G, K] with T >= 1, not {tuple(q_BTHK.shape)}")
    batch, time, key_heads, key_size = q_BTHK.shape
    heads, value_size = v_BTHV.shape[-2:]
    if key_heads < 1 or heads % key_heads:
        raise ValueError(
            f"the heads of v must be a multiple of those of q, not {heads} and {key_heads}"
        )
    sequences = batch
    if cu_seqlens_N1 is not None:
        sequences = _check_sequences(cu_seqlens_N1, batch)
    expected = {
        "k": (k_BTHK, (batch, time, key_heads, key_size)),
        "v": (v_BTHV, (batch, time, heads, value_size)),
        "log_decay": (log_decay_BTH, (batch, time, heads)),
        "beta": (beta_BTH, (batch, time, heads)),
        "initial_state": (initial_state_BHKV, (sequences, heads, key_size, value_size)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must be {shape} to fit q, not {tuple(tensor.shape)}")


def _check_sequences(cu_seqlens_N1: Tensor, batch: int) -> int:
    """Number of sequences; their lengths are not looked at, as that would wait for the device."""
    if cu_seqlens_N1.ndim != 1 or cu_seqlens_N1.shape[0] < 2:
        raise ValueError(f"cu_seqlens must be [N + 1], not {tuple(cu_seqlens_N1.shape)}")
    if cu_seqlens_N1.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"cu_seqlens must be int32 or int64, not {cu_seqlens_N1.dtype}")
    if batch != 1:
        raise ValueError(f"with cu_seqlens the batch must be 1, not {batch}")
    return cu_seqlens_N1.shape[0] - 1
