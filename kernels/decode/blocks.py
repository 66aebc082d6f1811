"""Launches of the small kernels that decoding of every architecture shares.

They allocate nothing and never wait for the device. Letters as in `ham.model.mixer`; F hidden width
of the MLP, N slots of a dense cache, M positions in the rotary table.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ham.kernels.decode.arguments import ACTIVATIONS, check
from ham.kernels.decode.triton_blocks import (
    add_rms_norm_kernel,
    gated_rms_norm_kernel,
    rope_append_kernel,
    silu_multiply_kernel,
)
from ham.kernels.triton_launch import launch
from ham.model.blocks import NORM_EPSILON

HIDDEN_BLOCK = 1024
ROW_WARPS = 4


def add_rms_norm(
    x_BD: Tensor, y_BD: Tensor | None, gain_D: Tensor, sum_BD: Tensor | None, normed_BD: Tensor
) -> None:
    """Add a branch to the residual stream and norm the sum for the next branch.

    Args:
        x_BD: Residual stream.
        y_BD: Output of a branch, or None before the first one; then nothing is added.
        gain_D: Gain of the norm.
        sum_BD: Written: x + y; may be `x_BD` itself. None if `y_BD` is.
        normed_BD: Written: RMSNorm of the sum.

    Raises:
        ConfigError: For tensors that do not fit together.
    """
    batch, width = x_BD.shape
    check("x_BD", x_BD, (batch, width), *ACTIVATIONS)
    check("gain_D", gain_D, (width,), *ACTIVATIONS)
    check("normed_BD", normed_BD, (batch, width), *ACTIVATIONS)
    if y_BD is not None:
        check("y_BD", y_BD, (batch, width), *ACTIVATIONS)
        check("sum_BD", sum_BD, (batch, width), *ACTIVATIONS)
    launch(
        add_rms_norm_kernel,
        (batch,),
        x_BD,
        y_BD,
        gain_D,
        sum_BD,
        normed_BD,
        D=width,
        BD=triton.next_power_of_2(width),
        EPSILON=NORM_EPSILON,
        num_warps=ROW_WARPS,
    )


def silu_multiply(up_BF: Tensor, hidden_BF: Tensor) -> None:
    """SwiGLU between its two products.

    Args:
        up_BF: Gates, then values: `[B, 2 F]`.
        hidden_BF: Written: silu(gate) * value, `[B, F]`.

    Raises:
        ConfigError: For tensors that do not fit together.
    """
    batch, hidden = hidden_BF.shape
    check("up_BF", up_BF, (batch, 2 * hidden), *ACTIVATIONS)
    check("hidden_BF", hidden_BF, (batch, hidden), *ACTIVATIONS)
    launch(
        silu_multiply_kernel,
        (batch, triton.cdiv(hidden, HIDDEN_BLOCK)),
        up_BF,
        hidden_BF,
        F=hidden,
        BF=HIDDEN_BLOCK,
        num_warps=ROW_WARPS,
    )


def gated_rms_norm(o_BHV: Tensor, gate_BD: Tensor, gain_V: Tensor, y_BD: Tensor) -> None:
    """Output of the gated delta rule before its projection: RMSNorm per head, gated by SiLU.

    Args:
        o_BHV: Read-outs.
        gate_BD: Projections for the gates, D = H V.
        gain_V: Gain of the norm.
        y_BD: Written.

    Raises:
        ConfigError: For tensors that do not fit together.
    """
    batch, heads, value_size = o_BHV.shape
    check("o_BHV", o_BHV, (batch, heads, value_size), *ACTIVATIONS)
    check("gate_BD", gate_BD, (batch, heads * value_size), *ACTIVATIONS)
    check("gain_V", gain_V, (value_size,), *ACTIVATIONS)
    check("y_BD", y_BD, (batch, heads * value_size), *ACTIVATIONS)
    launch(
        gated_rms_norm_kernel,
        (batch * heads,),
        o_BHV,
        gate_BD,
        gain_V,
        y_BD,
        V=value_size,
        BV=triton.next_power_of_2(value_size),
        EPSILON=NORM_EPSILON,
        num_warps=1,
    )


def rope_append(
    qkv_BC: Tensor,
    cos_MK: Tensor,
    sin_MK: Tensor,
    positions_B: Tensor,
    q_BHK: Tensor,
    k_cache_BNHK: Tensor,
    v_cache_BNHK: Tensor,
    *,
    ring: bool = False,
) -> None:
    """Rotate queries and keys of one token and put keys and values into a dense cache.

    Args:
        qkv_BC: Projections: queries of all heads, keys, values; C = 3 H K.
        cos_MK, sin_MK: Float32 rotary tables with K / 2 columns.
        positions_B: Int32 or int64 position of the token in its sequence, below M.
        q_BHK: Written: rotated queries.
        k_cache_BNHK, v_cache_BNHK: The token goes into the slot of its position; a position of N
            or more is not stored.
        ring: Whether the slot is the position modulo N instead, as in a sliding window.

    Raises:
        ConfigError: For tensors that do not fit together.
    """
    batch, slots, heads, key_size = k_cache_BNHK.shape
    check("qkv_BC", qkv_BC, (batch, 3 * heads * key_size), *ACTIVATIONS)
    check("cos_MK", cos_MK, (cos_MK.shape[0], key_size // 2), torch.float32)
    check("sin_MK", sin_MK, cos_MK.shape, torch.float32)
    check("positions_B", positions_B, (batch,), torch.int32, torch.int64)
    check("q_BHK", q_BHK, (batch, heads, key_size), *ACTIVATIONS)
    check("k_cache_BNHK", k_cache_BNHK, (batch, slots, heads, key_size), *ACTIVATIONS)
    check("v_cache_BNHK", v_cache_BNHK, (batch, slots, heads, key_size), *ACTIVATIONS)
    launch(
        rope_append_kernel,
        (batch * heads,),
        qkv_BC,
        cos_MK,
        sin_MK,
        positions_B,
        q_BHK,
        k_cache_BNHK,
        v_cache_BNHK,
        slots,
        H=heads,
        K=key_size,
        BK=triton.next_power_of_2(key_size),
        RING=ring,
        num_warps=1,
    )
