"""What goes into the recurrence of Mamba-2 and what comes out."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class SsdOutput(NamedTuple):
    """Result of the recurrence over a sequence.

    Attributes:
        y_BTHP: Read-out `h_t c_t + D x_t`, in the dtype of `x_BTHP`.
        final_state_BHPS: State after the last token, float32 (float64 for float64 inputs).
    """

    y_BTHP: Tensor
    final_state_BHPS: Tensor


def over_heads(group_BGX: Tensor, heads: int, dim: int = 1) -> Tensor:
    """Repeat each of G groups along `dim` for its H / G heads; G = 1 is left to broadcasting."""
    groups = group_BGX.shape[dim]
    if groups in (1, heads):
        return group_BGX
    return torch.repeat_interleave(group_BGX, heads // groups, dim)


def check_arguments(
    x_BTHP: Tensor,
    dt_BTH: Tensor,
    a_H: Tensor,
    b_BTS: Tensor,
    c_BTS: Tensor,
    d_H: Tensor,
    initial_state_BHPS: Tensor | None,
) -> None:
    """Raise `ValueError` when shapes do not fit together; names what was received."""
    if x_BTHP.ndim != 4 or x_BTHP.shape[1] < 1:
        raise ValueError(f"x must be [B, T, H, P] with T >= 1, not {tuple(x_BTHP.shape)}")
    batch, time, heads, head_size = x_BTHP.shape
    if b_BTS.ndim not in (3, 4) or (b_BTS.ndim == 4 and heads % b_BTS.shape[2]):
        raise ValueError(
            f"b must be [B, T, S] or [B, T, G, S] with G a divisor of H = {heads}, "
            f"not {tuple(b_BTS.shape)}"
        )
    projection = (batch, time, *b_BTS.shape[2:])
    state_size = b_BTS.shape[-1]
    expected = {
        "dt": (dt_BTH, (batch, time, heads)),
        "a": (a_H, (heads,)),
        "b": (b_BTS, projection),
        "c": (c_BTS, projection),
        "d": (d_H, (heads,)),
        "initial_state": (initial_state_BHPS, (batch, heads, head_size, state_size)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must be {shape} to fit x, not {tuple(tensor.shape)}")
