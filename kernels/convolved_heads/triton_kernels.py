"""Triton kernels of the short convolution with its maps per head.

Letters: B batch, T time, C channels, H heads, D size of a head, W width of the convolution; `p_x`
a pointer, `i_x` a program index, `o_x` offsets, `b_x` a block in registers. A head is held as two
halves, low and high, because the rotation mixes them. All arithmetic is float32.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def shifted(p_x, p_history, o_t, o_c, mask, T, C, W: tl.constexpr, HISTORY: tl.constexpr):
    """Inputs at the times `o_t`, some of which lie before the first token."""
    inside = (o_t >= 0) & (o_t < T)
    b_x = tl.load(p_x + o_t * C + o_c, mask=inside & mask, other=0.0).to(tl.float32)
    if HISTORY:
        before = (o_t < 0) & (o_t >= 1 - W)
        b_x += tl.load(p_history + (o_t + W - 1) * C + o_c, mask=before & mask, other=0.0).to(
            tl.float32
        )
    return b_x


@triton.jit
def convolved(
    p_x, p_history, p_weight, o_t, o_c, mask, T, C, W: tl.constexpr, HISTORY: tl.constexpr
):
    """The convolution at the times `o_t` in the channels `o_c`."""
    b_y = tl.zeros([o_t.shape[0], o_c.shape[1]], tl.float32)
    for i_w in tl.static_range(W):
        b_weight = tl.load(p_weight + i_w * C + o_c, mask=mask, other=0.0).to(tl.float32)
        b_x = shifted(p_x, p_history, o_t + i_w - (W - 1), o_c, mask, T, C, W, HISTORY)
        b_y += b_weight * b_x
    return b_y


@triton.jit
def row_sum(b_low, b_high):
    """Sum over a head, kept as a column."""
    return tl.sum(b_low + b_high, 1)[:, None]


@triton.jit
def rotation_at(p_cos, p_sin, o_t, o_d, mask, D: tl.constexpr):
    """Rows of the rotary tables."""
    o_table = o_t * (D // 2) + o_d
    b_cos = tl.load(p_cos + o_table, mask=mask, other=0.0)
    return b_cos, tl.load(p_sin + o_table, mask=mask, other=0.0)


@triton.jit
def store_halves(p_to, b_low, b_high, o_to, mask, D: tl.constexpr):
    """Both halves of a head."""
    tl.store(p_to + o_to, b_low.to(p_to.dtype.element_ty), mask=mask)
    tl.store(p_to + o_to + D // 2, b_high.to(p_to.dtype.element_ty), mask=mask)


@triton.jit
def load_halves(p_from, o_from, mask, D: tl.constexpr):
    """Both halves of a head in float32."""
    b_low = tl.load(p_from + o_from, mask=mask, other=0.0).to(tl.float32)
    return b_low, tl.load(p_from + o_from + D // 2, mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["T"])
def forward_kernel(
    p_x,
    p_history,
    p_weight,
    p_gain,
    p_cos,
    p_sin,
    p_recurrent,
    p_attention,
    T,
    rotation_stride,
    FIRST: tl.constexpr,
    C: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    W: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
    EPSILON: tl.constexpr,
    UNIT: tl.constexpr,
):
    """BT tokens of one head of q, k (UNIT) or v, whose channels begin at FIRST."""
    i_b = tl.program_id(1).to(tl.int64)
    i_h = tl.program_id(2)
    HISTORY: tl.constexpr = p_history is not None
    p_x += i_b * T * C
    if HISTORY:
        p_history += i_b * (W - 1) * C
    o_t = tl.program_id(0) * BT + tl.arange(0, BT)[:, None]
    o_d = tl.arange(0, BD)[None, :]
    mask_d = o_d < D // 2
    mask = (o_t < T) & mask_d
    o_c = FIRST + i_h * D + o_d
    b_low = convolved(p_x, p_history, p_weight, o_t, o_c, mask_d, T, C, W, HISTORY)
    o_c += D // 2
    b_high = convolved(p_x, p_history, p_weight, o_t, o_c, mask_d, T, C, W, HISTORY)
    o_to = (i_b * T + o_t) * H * D + i_h * D + o_d
    b_silu_low, b_silu_high = b_low * tl.sigmoid(b_low), b_high * tl.sigmoid(b_high)
    if UNIT:
        b_square = row_sum(b_silu_low * b_silu_low, b_silu_high * b_silu_high)
        b_scale = 1.0 / tl.maximum(tl.sqrt(b_square), EPSILON)
        b_silu_low *= b_scale
        b_silu_high *= b_scale
    store_halves(p_recurrent, b_silu_low, b_silu_high, o_to, mask, D)
    if p_attention is not None:
        b_scale = tl.rsqrt(row_sum(b_low * b_low, b_high * b_high) / D + EPSILON)
        b_low *= b_scale * tl.load(p_gain + o_d, mask=mask_d, other=0.0).to(tl.float32)
        b_high *= b_scale * tl.load(p_gain + D // 2 + o_d, mask=mask_d, other=0.0).to(tl.float32)
        if p_cos is not None:
            o_table = i_b * rotation_stride
            b_cos, b_sin = rotation_at(p_cos + o_table, p_sin + o_table, o_t, o_d, mask, D)
            b_turned = b_low * b_cos - b_high * b_sin
            b_high = b_high * b_cos + b_low * b_sin
            b_low = b_turned
        store_halves(p_attention, b_low, b_high, o_to, mask, D)


@triton.jit
def silu_slope(b_y):
    """Derivative of silu."""
    b_gate = tl.sigmoid(b_y)
    return b_gate * (1.0 + b_y * (1.0 - b_gate))


@triton.jit(do_not_specialize=["T", "segments"])
def map_gradient_kernel(
    p_x,
    p_weight,
    p_gain,
    p_cos,
    p_sin,
    p_drecurrent,
    p_dattention,
    p_dy,
    p_dweight,
    p_dgain,
    T,
    segments,
    rotation_stride,
    FIRST: tl.constexpr,
    C: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    W: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
    STEPS: tl.constexpr,
    BW: tl.constexpr,
    EPSILON: tl.constexpr,
    UNIT: tl.constexpr,
):
    """Back through the maps of one head in one segment of STEPS blocks of BT tokens.

    Writes the gradient of the convolution's result, and this segment's share of the gradients of
    weights and gain.
    """
    i_s, i_b, i_h = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    p_x += i_b * T * C
    p_dy += i_b * T * C
    o_table = i_b * rotation_stride
    o_d = tl.arange(0, BD)[None, :]
    mask_d = o_d < D // 2
    o_low = FIRST + i_h * D + o_d
    o_high = o_low + D // 2
    o_w = tl.arange(0, BW)[:, None]
    b_dweight_low = tl.zeros([BW, BD], tl.float32)
    b_dweight_high = tl.zeros([BW, BD], tl.float32)
    if p_dattention is not None:
        b_gain_low = tl.load(p_gain + o_d, mask=mask_d, other=0.0).to(tl.float32)
        b_gain_high = tl.load(p_gain + D // 2 + o_d, mask=mask_d, other=0.0).to(tl.float32)
        b_dgain_low = tl.zeros([1, BD], tl.float32)
        b_dgain_high = tl.zeros([1, BD], tl.float32)
    steps = tl.cdiv(tl.minimum(T - i_s * STEPS * BT, STEPS * BT), BT)
    for i_step in range(steps):
        o_t = (i_s * STEPS + i_step) * BT + tl.arange(0, BT)[:, None]
        mask = (o_t < T) & mask_d
        o_from = (i_b * T + o_t) * H * D + i_h * D + o_d
        b_low = convolved(p_x, None, p_weight, o_t, o_low, mask_d, T, C, W, False)
        b_high = convolved(p_x, None, p_weight, o_t, o_high, mask_d, T, C, W, False)
        b_dlow, b_dhigh = load_halves(p_drecurrent, o_from, mask, D)
        if UNIT:
            b_unit_low, b_unit_high = b_low * tl.sigmoid(b_low), b_high * tl.sigmoid(b_high)
            b_norm = tl.sqrt(row_sum(b_unit_low * b_unit_low, b_unit_high * b_unit_high))
            b_scale = 1.0 / tl.maximum(b_norm, EPSILON)
            b_unit_low *= b_scale
            b_unit_high *= b_scale
            b_along = row_sum(b_unit_low * b_dlow, b_unit_high * b_dhigh)
            b_along = tl.where(b_norm > EPSILON, b_along, 0.0)
            b_dlow = (b_dlow - b_unit_low * b_along) * b_scale
            b_dhigh = (b_dhigh - b_unit_high * b_along) * b_scale
        b_dlow *= silu_slope(b_low)
        b_dhigh *= silu_slope(b_high)
        if p_dattention is not None:
            b_da_low, b_da_high = load_halves(p_dattention, o_from, mask, D)
            if p_cos is not None:
                b_cos, b_sin = rotation_at(p_cos + o_table, p_sin + o_table, o_t, o_d, mask, D)
                b_turned = b_da_low * b_cos + b_da_high * b_sin
                b_da_high = b_da_high * b_cos - b_da_low * b_sin
                b_da_low = b_turned
            b_scale = tl.rsqrt(row_sum(b_low * b_low, b_high * b_high) / D + EPSILON)
            b_normed_low, b_normed_high = b_low * b_scale, b_high * b_scale
            b_dgain_low += tl.sum(b_da_low * b_normed_low, 0)[None, :]
            b_dgain_high += tl.sum(b_da_high * b_normed_high, 0)[None, :]
            b_da_low *= b_gain_low
            b_da_high *= b_gain_high
            b_along = row_sum(b_da_low * b_normed_low, b_da_high * b_normed_high) / D
            b_dlow += (b_da_low - b_normed_low * b_along) * b_scale
            b_dhigh += (b_da_high - b_normed_high * b_along) * b_scale
        tl.store(p_dy + o_t * C + o_low, b_dlow.to(p_dy.dtype.element_ty), mask=mask)
        tl.store(p_dy + o_t * C + o_high, b_dhigh.to(p_dy.dtype.element_ty), mask=mask)
        for i_w in tl.static_range(W):
            o_x = o_t + i_w - (W - 1)
            b_x = shifted(p_x, None, o_x, o_low, mask_d, T, C, W, False)
            b_dweight_low += tl.where(o_w == i_w, tl.sum(b_dlow * b_x, 0)[None, :], 0.0)
            b_x = shifted(p_x, None, o_x, o_high, mask_d, T, C, W, False)
            b_dweight_high += tl.where(o_w == i_w, tl.sum(b_dhigh * b_x, 0)[None, :], 0.0)
    i_row = i_b * segments + i_s
    p_dweight += i_row * W * C + o_w * C
    tl.store(p_dweight + o_low, b_dweight_low, mask=mask_d & (o_w < W))
    tl.store(p_dweight + o_high, b_dweight_high, mask=mask_d & (o_w < W))
    if p_dattention is not None:
        o_gain = (i_row * H + i_h) * D + o_d
        tl.store(p_dgain + o_gain, b_dgain_low, mask=mask_d)
        tl.store(p_dgain + o_gain + D // 2, b_dgain_high, mask=mask_d)


@triton.jit(do_not_specialize=["T"])
def input_gradient_kernel(
    p_dy,
    p_weight,
    p_dx,
    T,
    C: tl.constexpr,
    W: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
):
    """Back through the convolution: each input served the W outputs from its own time on."""
    i_b = tl.program_id(2).to(tl.int64)
    p_dy += i_b * T * C
    o_t = tl.program_id(0) * BT + tl.arange(0, BT)[:, None]
    o_c = tl.program_id(1) * BC + tl.arange(0, BC)[None, :]
    mask_c = o_c < C
    b_dx = tl.zeros([BT, BC], tl.float32)
    for i_w in tl.static_range(W):
        b_weight = tl.load(p_weight + i_w * C + o_c, mask=mask_c, other=0.0).to(tl.float32)
        b_dx += b_weight * shifted(p_dy, None, o_t + (W - 1) - i_w, o_c, mask_c, T, C, W, False)
    tl.store(
        p_dx + (i_b * T + o_t) * C + o_c,
        b_dx.to(p_dx.dtype.element_ty),
        mask=(o_t < T) & mask_c,
    )
