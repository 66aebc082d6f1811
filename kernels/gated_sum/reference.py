"""The definition, in plain torch, in the precision of the inputs."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

EPSILON = 1e-6
"""Of both norms."""


def reference(
    recurrent_BTHV: Tensor,
    attended_BTHV: Tensor,
    gates_BTH: Tensor,
    recurrent_gain_V: Tensor,
    attention_gain_V: Tensor,
) -> Tensor:
    """One pass over the data for each map."""
    recurrent_gate_BTH, attention_gate_BTH = gates_BTH.sigmoid().chunk(2, dim=-1)
    return recurrent_gate_BTH[..., None] * _norm(
        recurrent_BTHV, recurrent_gain_V
    ) + attention_gate_BTH[..., None] * _norm(attended_BTHV, attention_gain_V)


def _norm(x: Tensor, gain: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], gain.to(x.dtype), EPSILON)
