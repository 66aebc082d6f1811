"""Types and checks of the short convolution with its maps per head."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

EPSILON = 1e-6
"""Of both norms."""


class Rotation(NamedTuple):
    """Rotary tables of the tokens at hand, half a head wide.

    Attributes:
        cos, sin: Float32 `[T, K / 2]`, or `[B, T, K / 2]` where sequences stand elsewhere.
    """

    cos: Tensor
    sin: Tensor


class ConvolvedHeads(NamedTuple):
    """What both branches of a layer read.

    Attributes:
        recurrent_q_BTHK, recurrent_k_BTHK: Unit vectors.
        v_BTHV: Values.
        attention_q_BTHK, attention_k_BTHK: Normed and rotated; None unless asked for.
    """

    recurrent_q_BTHK: Tensor
    recurrent_k_BTHK: Tensor
    v_BTHV: Tensor
    attention_q_BTHK: Tensor | None = None
    attention_k_BTHK: Tensor | None = None


def check_arguments(
    x_BTC: Tensor,
    weight_WC: Tensor,
    heads: int,
    key_size: int,
    q_gain_K: Tensor | None,
    k_gain_K: Tensor | None,
    rotation: Rotation | None,
    history_BWC: Tensor | None,
) -> None:
    """Raise `ValueError` for shapes that do not fit together."""
    batch, length, channels = x_BTC.shape
    values = channels - 2 * heads * key_size
    if values <= 0 or values % heads:
        raise ValueError(
            f"x_BTC must have channels for q, k and v of {heads} heads of size {key_size}, and v "
            f"of any multiple of {heads}; it has {channels}"
        )
    if weight_WC.ndim != 2 or weight_WC.shape[1] != channels:
        raise ValueError(f"weight_WC must be [W, {channels}], not {list(weight_WC.shape)}")
    if (q_gain_K is None) != (k_gain_K is None):
        raise ValueError("q_gain_K and k_gain_K belong together: give both or neither")
    for name, gain_K in (("q_gain_K", q_gain_K), ("k_gain_K", k_gain_K)):
        if gain_K is not None and gain_K.shape != (key_size,):
            raise ValueError(f"{name} must be [{key_size}], not {list(gain_K.shape)}")
    if rotation is not None:
        legal = ((length, key_size // 2), (batch, length, key_size // 2))
        if q_gain_K is None or any(tuple(table.shape) not in legal for table in rotation):
            raise ValueError(
                f"rotation needs gains and tables of shape {legal[0]} or {legal[1]}, not "
                f"{tuple(rotation.cos.shape)}"
            )
    history = (batch, weight_WC.shape[0] - 1, channels)
    if history_BWC is not None and history_BWC.shape != history:
        raise ValueError(f"history_BWC must be {list(history)}, not {list(history_BWC.shape)}")
