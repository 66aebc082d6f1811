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


@triton.jit
def rows_of(p_weight, o_c, mask, C, W: tl.constexpr):
    """The W weights of the channels `o_c`, as a tuple of rows."""
    b_rows = ()
    for i_w in tl.static_range(W):
        b_row = tl.load(p_weight + i_w * C + o_c, mask=mask, other=0.0).to(tl.float32)
        b_rows += (b_row,)
    return b_rows


@triton.jit
def taps_at(p_x, o_t, o_c, mask, T, C, W: tl.constexpr):
    """The W blocks that the convolution at the times `o_t` reads, as a tuple; zeros before them."""
    b_taps = ()
    for i_w in tl.static_range(W):
        b_x = shifted(p_x, None, o_t + i_w - (W - 1), o_c, mask, T, C, W, False)
        b_taps += (b_x,)
    return b_taps


@triton.jit
def weighted(b_weights, b_taps, W: tl.constexpr):
    """The convolution."""
    b_y = b_weights[0] * b_taps[0]
    for i_w in tl.static_range(1, W):
        b_y += b_weights[i_w] * b_taps[i_w]
    return b_y


@triton.jit
def zeros_of(BT: tl.constexpr, BD: tl.constexpr, W: tl.constexpr):
    """W blocks of zeros."""
    b_sums = ()
    for _ in tl.static_range(W):
        b_sums += (tl.zeros([BT, BD], tl.float32),)
    return b_sums


@triton.jit
def add_products(b_sums, b_taps, b_dy, W: tl.constexpr):
    """Each of the W sums with the product of its tap and a gradient added, token by token."""
    b_added = ()
    for i_w in tl.static_range(W):
        b_added += (b_sums[i_w] + b_taps[i_w] * b_dy,)
    return b_added


@triton.jit
def store_column_sums(p_to, b_sums, o_c, mask, C, W: tl.constexpr):
    """Sums over the tokens, one row of the gradient for each weight."""
    for i_w in tl.static_range(W):
        tl.store(p_to + i_w * C + o_c, tl.sum(b_sums[i_w], 0)[None, :], mask=mask)


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
    EPSILON: tl.constexpr,
    UNIT: tl.constexpr,
):
    """Back through the maps of one head in one segment of STEPS blocks of BT tokens.

    Writes the gradient of the convolution's result, and this segment's share of the gradients of
    weights and gain. Their products are summed over blocks in registers, token by token, and over
    the tokens of a block once, at the end: a sum over tokens goes through shared memory.
    """
    i_s, i_b, i_h = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    p_x += i_b * T * C
    p_dy += i_b * T * C
    o_head = i_b * T * H * D + i_h * D
    p_drecurrent += o_head
    o_d = tl.arange(0, BD)[None, :]
    mask_d = o_d < D // 2
    o_low = FIRST + i_h * D + o_d
    o_high = o_low + D // 2
    b_dweights_low = zeros_of(BT, BD, W)
    b_dweights_high = zeros_of(BT, BD, W)
    if p_dattention is not None:
        p_dattention += o_head
        b_gain_low, b_gain_high = load_halves(p_gain, o_d, mask_d, D)
        b_dgain_low = tl.zeros([BT, BD], tl.float32)
        b_dgain_high = tl.zeros([BT, BD], tl.float32)
        if p_cos is not None:
            p_cos += i_b * rotation_stride
            p_sin += i_b * rotation_stride
    steps = tl.cdiv(tl.minimum(T - i_s * STEPS * BT, STEPS * BT), BT)
    for i_step in range(steps):
        o_t = (i_s * STEPS + i_step) * BT + tl.arange(0, BT)[:, None]
        mask = (o_t < T) & mask_d
        o_from = o_t * H * D + o_d
        b_taps_low = taps_at(p_x, o_t, o_low, mask_d, T, C, W)
        b_taps_high = taps_at(p_x, o_t, o_high, mask_d, T, C, W)
        b_dlow, b_dhigh = load_halves(p_drecurrent, o_from, mask, D)
        if p_dattention is not None:
            b_da_low, b_da_high = load_halves(p_dattention, o_from, mask, D)
            if p_cos is not None:
                b_cos, b_sin = rotation_at(p_cos, p_sin, o_t, o_d, mask, D)
        # Held over the loop they would cost 48 registers, and a third of the programs at a time.
        b_weights_low = rows_of(p_weight, o_low, mask_d, C, W)
        b_weights_high = rows_of(p_weight, o_high, mask_d, C, W)
        b_low = weighted(b_weights_low, b_taps_low, W)
        b_high = weighted(b_weights_high, b_taps_high, W)
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
            if p_cos is not None:
                b_turned = b_da_low * b_cos + b_da_high * b_sin
                b_da_high = b_da_high * b_cos - b_da_low * b_sin
                b_da_low = b_turned
            b_scale = tl.rsqrt(row_sum(b_low * b_low, b_high * b_high) / D + EPSILON)
            b_normed_low, b_normed_high = b_low * b_scale, b_high * b_scale
            b_dgain_low += b_da_low * b_normed_low
            b_dgain_high += b_da_high * b_normed_high
            b_da_low *= b_gain_low
            b_da_high *= b_gain_high
            b_along = row_sum(b_da_low * b_normed_low, b_da_high * b_normed_high) / D
            b_dlow += (b_da_low - b_normed_low * b_along) * b_scale
            b_dhigh += (b_da_high - b_normed_high * b_along) * b_scale
        tl.store(p_dy + o_t * C + o_low, b_dlow.to(p_dy.dtype.element_ty), mask=mask)
        tl.store(p_dy + o_t * C + o_high, b_dhigh.to(p_dy.dtype.element_ty), mask=mask)
        b_dweights_low = add_products(b_dweights_low, b_taps_low, b_dlow, W)
        b_dweights_high = add_products(b_dweights_high, b_taps_high, b_dhigh, W)
    i_row = i_b * segments + i_s
    p_dweight += i_row * W * C
    store_column_sums(p_dweight, b_dweights_low, o_low, mask_d, C, W)
    store_column_sums(p_dweight, b_dweights_high, o_high, mask_d, C, W)
    if p_dattention is not None:
        p_dgain += (i_row * H + i_h) * D
        tl.store(p_dgain + o_d, tl.sum(b_dgain_low, 0)[None, :], mask=mask_d)
        tl.store(p_dgain + D // 2 + o_d, tl.sum(b_dgain_high, 0)[None, :], mask=mask_d)


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
