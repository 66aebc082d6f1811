"""The definition, in plain torch, in the precision of the inputs: every map is its own pass."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ham.kernels.convolved_heads.arguments import EPSILON, ConvolvedHeads, Rotation


def convolve(x_BTC: Tensor, weight_WC: Tensor, history_BWC: Tensor | None) -> Tensor:
    """Depthwise causal convolution over time.

    A sum of W shifted products: on a CPU this is faster than a grouped `conv1d`, and a compiler
    fuses it.
    """
    size, length = weight_WC.shape[0], x_BTC.shape[1]
    if history_BWC is None:
        padded = F.pad(x_BTC, (0, 0, size - 1, 0))
    else:
        padded = torch.cat((history_BWC.to(x_BTC.dtype), x_BTC), dim=1)
    weight_WC = weight_WC.to(x_BTC.dtype)
    y_BTC = padded[:, :length] * weight_WC[0]
    for shift in range(1, size):
        y_BTC = y_BTC + padded[:, shift : shift + length] * weight_WC[shift]
    return y_BTC


def unit_vectors(x: Tensor) -> Tensor:
    """Scale the last axis to length one, computed in float32 or wider; keeps the dtype."""
    wide = x.float() if x.element_size() < 4 else x
    return F.normalize(wide, dim=-1, eps=EPSILON).to(x.dtype)


def rotate(x_BTHK: Tensor, rotation: Rotation) -> Tensor:
    """Rotary positions, half-split layout, computed in float32 or wider; keeps the dtype."""
    cos, sin = rotation.cos.unsqueeze(-2), rotation.sin.unsqueeze(-2)
    wide = x_BTHK.to(cos.dtype) if x_BTHK.element_size() < 4 else x_BTHK
    first, second = wide.chunk(2, dim=-1)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return rotated.to(x_BTHK.dtype)


def reference(
    x_BTC: Tensor,
    weight_WC: Tensor,
    *,
    heads: int,
    key_size: int,
    q_gain_K: Tensor | None,
    k_gain_K: Tensor | None,
    rotation: Rotation | None,
    history_BWC: Tensor | None,
) -> ConvolvedHeads:
    """One pass over the data for each map."""
    mixed_BTC = convolve(x_BTC, weight_WC, history_BWC)
    width = heads * key_size
    q_BTHK, k_BTHK, v_BTHV = (
        part.unflatten(-1, (heads, -1))
        for part in mixed_BTC.split((width, width, mixed_BTC.shape[-1] - 2 * width), dim=-1)
    )
    attention: list[Tensor | None] = [None, None]
    if q_gain_K is not None:
        attention = [
            F.rms_norm(part, part.shape[-1:], gain.to(part.dtype), EPSILON)
            for part, gain in ((q_BTHK, q_gain_K), (k_BTHK, k_gain_K))
        ]
        if rotation is not None:
            attention = [rotate(part, rotation) for part in attention]
    return ConvolvedHeads(
        unit_vectors(F.silu(q_BTHK)), unit_vectors(F.silu(k_BTHK)), F.silu(v_BTHV), *attention
    )
