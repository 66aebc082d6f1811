"""Small kernels that decoding of every architecture shares, one launch where torch has several.

Rounding as in the modules they stand for. Letters of the kernels as in `triton_step.py`; D model
width, F hidden width of the MLP, N slots of a dense cache.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ham.kernels.decode.triton_token import rms_scale, rounded, silu


@triton.jit
def add_rms_norm_kernel(
    p_x,
    p_y,
    p_gain,
    p_sum,
    p_normed,
    D: tl.constexpr,
    BD: tl.constexpr,
    EPSILON: tl.constexpr,
):
    """One row: x + y, and its RMSNorm."""
    i_b = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BD)
    mask = o_d < D
    b_x = tl.load(p_x + i_b * D + o_d, mask=mask, other=0.0)
    b_sum = b_x.to(tl.float32)
    if p_y is not None:
        b_y = tl.load(p_y + i_b * D + o_d, mask=mask, other=0.0)
        b_sum = rounded(b_sum + b_y.to(tl.float32), b_x)
        tl.store(p_sum + i_b * D + o_d, b_sum.to(p_sum.dtype.element_ty), mask=mask)
    b_gain = rounded(tl.load(p_gain + o_d, mask=mask, other=0.0), b_x)
    b_normed = b_sum * rms_scale(tl.sum(b_sum * b_sum), D, EPSILON) * b_gain
    tl.store(p_normed + i_b * D + o_d, b_normed.to(p_normed.dtype.element_ty), mask=mask)


@triton.jit
def silu_multiply_kernel(p_up, p_hidden, F: tl.constexpr, BF: tl.constexpr):
    """BF numbers of one row of the hidden layer."""
    i_b = tl.program_id(0).to(tl.int64)
    o_f = tl.program_id(1) * BF + tl.arange(0, BF)
    mask = o_f < F
    b_gate = tl.load(p_up + i_b * 2 * F + o_f, mask=mask, other=0.0)
    b_value = tl.load(p_up + i_b * 2 * F + F + o_f, mask=mask, other=0.0)
    b_hidden = silu(b_gate.to(tl.float32), b_gate) * b_value.to(tl.float32)
    tl.store(p_hidden + i_b * F + o_f, b_hidden.to(p_hidden.dtype.element_ty), mask=mask)


@triton.jit
def gated_rms_norm_kernel(
    p_o,
    p_gate,
    p_gain,
    p_y,
    V: tl.constexpr,
    BV: tl.constexpr,
    EPSILON: tl.constexpr,
):
    """One head: RMSNorm of its read-out times SiLU of its gates."""
    i_bh = tl.program_id(0).to(tl.int64)
    o_v = tl.arange(0, BV)
    mask = o_v < V
    b_o = tl.load(p_o + i_bh * V + o_v, mask=mask, other=0.0)
    b_gate = tl.load(p_gate + i_bh * V + o_v, mask=mask, other=0.0)
    b_gain = rounded(tl.load(p_gain + o_v, mask=mask, other=0.0), b_o)
    b_x = b_o.to(tl.float32)
    b_normed = rounded(b_x * rms_scale(tl.sum(b_x * b_x), V, EPSILON) * b_gain, b_o)
    b_y = b_normed * silu(b_gate.to(tl.float32), b_gate)
    tl.store(p_y + i_bh * V + o_v, b_y.to(p_y.dtype.element_ty), mask=mask)


@triton.jit
def rotated(p_x, p_cos, p_sin, position, o_k, K: tl.constexpr):
    """K numbers of a query or key, rotated."""
    mask = o_k < K
    low = o_k < K // 2
    o_angle = position * (K // 2) + tl.where(low, o_k, o_k - K // 2)
    b_x = tl.load(p_x + o_k, mask=mask, other=0.0).to(tl.float32)
    o_other = tl.where(low, o_k + K // 2, o_k - K // 2)
    b_other = tl.load(p_x + o_other, mask=mask, other=0.0).to(tl.float32)
    b_cos = tl.load(p_cos + o_angle, mask=mask, other=0.0)
    b_sin = tl.load(p_sin + o_angle, mask=mask, other=0.0)
    return b_x * b_cos + b_other * tl.where(low, -b_sin, b_sin)


@triton.jit(do_not_specialize=["N"])
def rope_append_kernel(
    p_qkv,
    p_cos,
    p_sin,
    p_positions,
    p_q,
    p_k_cache,
    p_v_cache,
    N,
    H: tl.constexpr,
    K: tl.constexpr,
    BK: tl.constexpr,
    RING: tl.constexpr,
):
    """One head: rotate query and key, put key and value into their slot."""
    i_b = (tl.program_id(0) // H).to(tl.int64)
    i_h = tl.program_id(0) % H
    o_k = tl.arange(0, BK)
    mask = o_k < K
    position = tl.load(p_positions + i_b)
    p_qkv += i_b * 3 * H * K + i_h * K
    b_q = rotated(p_qkv, p_cos, p_sin, position, o_k, K)
    b_k = rotated(p_qkv + H * K, p_cos, p_sin, position, o_k, K)
    b_v = tl.load(p_qkv + 2 * H * K + o_k, mask=mask, other=0.0)
    tl.store(p_q + (i_b * H + i_h) * K + o_k, b_q.to(p_q.dtype.element_ty), mask=mask)
    slot = position % N if RING else position
    o_cache = ((i_b * N + slot) * H + i_h) * K + o_k
    mask = mask & (slot < N)
    b_k = rounded(b_k, b_v).to(p_k_cache.dtype.element_ty)
    tl.store(p_k_cache + o_cache, b_k, mask=mask)
    tl.store(p_v_cache + o_cache, b_v.to(p_v_cache.dtype.element_ty), mask=mask)
