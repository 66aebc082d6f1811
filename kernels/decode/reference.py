"""What the decode kernels compute, in plain torch, of any precision: the definition.

One token per sequence; letters as in `ham.model.mixer`, R rows of the cache: one per sequence, or
one per sequence and head where every head decides for itself. Values are rounded to the dtype of
the activations where the layer rounds them (`ham.layer.HamMixer`), except that the sum of the short
convolution and the gated sum of both branches are rounded once instead of after each term.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ham.kernels.gated_delta_rule.reference import gated_delta_rule_step
from ham.model.blocks import NORM_EPSILON
from ham.routing import PREDICTION_FLOOR, VALUE_FLOOR


@dataclass
class Projected:
    """One token after convolution, norms and gates.

    Attributes:
        recurrent_q_BHK, recurrent_k_BHK: Of length one.
        attention_q_BHK, attention_k_BHK: Normed and rotated; None without gains.
        v_BHV: Value of both branches.
        log_decay_BH, beta_BH: Gates of the recurrence.
    """

    recurrent_q_BHK: Tensor
    recurrent_k_BHK: Tensor
    attention_q_BHK: Tensor | None
    attention_k_BHK: Tensor | None
    v_BHV: Tensor
    log_decay_BH: Tensor
    beta_BH: Tensor


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.element_size() < 4 else x


def convolve(qkv_BC: Tensor, weight_WC: Tensor, history_BWC: Tensor) -> tuple[Tensor, Tensor]:
    """Short convolution of the newest token; returns `mixed_BC` and the next history."""
    window_BWC = torch.cat((history_BWC.to(qkv_BC.dtype), qkv_BC[:, None]), dim=1)
    weights_WC = _wide(weight_WC.to(qkv_BC.dtype))
    mixed_BC = (_wide(window_BWC) * weights_WC).sum(1).to(qkv_BC.dtype)
    return mixed_BC, window_BWC[:, 1:].to(history_BWC.dtype)


def rms_norm(x: Tensor, gain: Tensor) -> Tensor:
    """RMSNorm of the last axis with a gain, in the dtype of `x`."""
    wide = _wide(x)
    scale = (wide.square().mean(-1, keepdim=True) + NORM_EPSILON).rsqrt()
    return (wide * scale * _wide(gain.to(x.dtype))).to(x.dtype)


def rotate(x_BHK: Tensor, cos_MK: Tensor, sin_MK: Tensor, positions_B: Tensor) -> Tensor:
    """Rotary positions, half-split; the tables have K / 2 columns."""
    cos, sin = cos_MK[positions_B.long(), None], sin_MK[positions_B.long(), None]
    first, second = _wide(x_BHK).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x_BHK.dtype)


def _unit(x: Tensor) -> Tensor:
    return F.normalize(_wide(x), dim=-1, eps=NORM_EPSILON).to(x.dtype)


def project(
    mixed_BC: Tensor,
    raw_B2H: Tensor,
    log_rate_H: Tensor,
    step_bias_H: Tensor,
    key_size: int,
    *,
    q_gain_K: Tensor | None = None,
    k_gain_K: Tensor | None = None,
    cos_MK: Tensor | None = None,
    sin_MK: Tensor | None = None,
    positions_B: Tensor | None = None,
) -> Projected:
    """What both branches need of the convolved projections; without gains only the recurrence."""
    heads = log_rate_H.shape[0]
    size = heads * key_size
    parts = mixed_BC.split((size, size, mixed_BC.shape[1] - 2 * size), dim=1)
    q_BHK, k_BHK, v_BHV = (part.unflatten(1, (heads, -1)) for part in parts)
    attention_q_BHK = attention_k_BHK = None
    if q_gain_K is not None:
        attention_q_BHK, attention_k_BHK = rms_norm(q_BHK, q_gain_K), rms_norm(k_BHK, k_gain_K)
        if cos_MK is not None:
            attention_q_BHK = rotate(attention_q_BHK, cos_MK, sin_MK, positions_B)
            attention_k_BHK = rotate(attention_k_BHK, cos_MK, sin_MK, positions_B)
    step_BH, write_BH = _wide(raw_B2H).chunk(2, dim=1)
    return Projected(
        _unit(F.silu(q_BHK)),
        _unit(F.silu(k_BHK)),
        attention_q_BHK,
        attention_k_BHK,
        F.silu(v_BHV),
        -log_rate_H.exp() * F.softplus(step_BH + step_bias_H),
        write_BH.sigmoid(),
    )


def recur(projected: Projected, state_BHKV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One step of the gated delta rule: `o_BHV`, the new state, the prediction."""
    return gated_delta_rule_step(
        projected.recurrent_q_BHK,
        projected.recurrent_k_BHK,
        projected.v_BHV,
        projected.log_decay_BH,
        projected.beta_BH,
        state_BHKV,
    )


def head_scores(score: str, prediction_BHV: Tensor, v_BHV: Tensor, beta_BH: Tensor) -> Tensor:
    """Routing score of each head, as `ham.routing` defines it; `post_update` is (1 - b) |v - p|."""
    p, v = prediction_BHV, v_BHV.to(prediction_BHV.dtype)
    v_norm, error = v.norm(dim=-1), (v - p).norm(dim=-1)
    if score == "cosine":
        p_norm = torch.maximum(p.norm(dim=-1), PREDICTION_FLOOR * v_norm)
        lengths = (p_norm * v_norm.clamp(min=VALUE_FLOOR)).clamp(min=VALUE_FLOOR**2)
        return 1 - (p * v).sum(-1) / lengths
    if score == "l2":
        return error / (v_norm + VALUE_FLOOR)
    return (beta_BH if score == "committed" else 1 - beta_BH) * error


def row_scores(score_BH: Tensor, reduction: str) -> Tensor:
    """Scores that decide, `score_R`: one per sequence, or with `per_head` one per head."""
    if reduction == "per_head":
        return score_BH.flatten()
    if reduction == "mean":
        return score_BH.mean(1)
    return score_BH.amin(1) if reduction == "min" else score_BH.amax(1)


def attend(q_HK: Tensor, k_HNK: Tensor, v_HNV: Tensor, scale: float) -> Tensor:
    """Read-out `o_HV` of one token over N cached ones, at least float32; 0 where N is 0."""
    weights_HN = torch.einsum("hk,hnk->hn", _wide(q_HK), _wide(k_HNK)).mul(scale).softmax(-1)
    return torch.einsum("hn,hnv->hv", weights_HN, _wide(v_HNV))


def combine(
    o_recurrent_BHV: Tensor,
    o_attention_BHV: Tensor,
    raw_B2H: Tensor,
    recurrent_gain_V: Tensor,
    attention_gain_V: Tensor,
) -> Tensor:
    """Both branches normed per head, gated and added, `y_BHV` (Eq. 12-13), in the gates' dtype."""
    dtype = raw_B2H.dtype
    recurrent_gate_BH, attention_gate_BH = _wide(raw_B2H).sigmoid().chunk(2, dim=1)
    recurrent = _wide(rms_norm(o_recurrent_BHV.to(dtype), recurrent_gain_V))
    attention = _wide(rms_norm(o_attention_BHV.to(dtype), attention_gain_V))
    return (recurrent_gate_BH[..., None] * recurrent + attention_gate_BH[..., None] * attention).to(
        dtype
    )


class ListCache:
    """Routed keys and values of R rows, as lists of single tokens."""

    def __init__(self, rows: int):
        self.keys: list[list[Tensor]] = [[] for _ in range(rows)]
        self.values: list[list[Tensor]] = [[] for _ in range(rows)]
        self.positions: list[list[int]] = [[] for _ in range(rows)]

    def append(
        self, k_RGK: Tensor, v_RGV: Tensor, routed_R: Sequence[bool], positions_R: Sequence[int]
    ) -> None:
        """Add the token of each row that was routed."""
        for row, routed in enumerate(routed_R):
            if routed:
                self.keys[row].append(k_RGK[row])
                self.values[row].append(v_RGV[row])
                self.positions[row].append(positions_R[row])

    def attend(self, q_RGK: Tensor, v_RGV: Tensor, scale: float) -> Tensor:
        """Read-outs `o_RGV`; `v_RGV` tells the shape where a row is empty."""
        outputs = [
            attend(q_GK, torch.stack(keys, 1), torch.stack(values, 1), scale)
            if keys
            else torch.zeros_like(_wide(v_GV))
            for q_GK, v_GV, keys, values in zip(q_RGK, v_RGV, self.keys, self.values, strict=True)
        ]
        return torch.stack(outputs)
