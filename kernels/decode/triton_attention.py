"""Kernels 2 and 3: one query per head over the pages of the routed cache, then both branches.

Memory bound: every key and value is read once and used once, so products are elementwise and summed
in float32. Each row of a tile keeps a running softmax of its own, the rows are merged after the
last tile, and no tile waits for a sum over warps. Softmax runs in units of log2. Letters of the
kernels as in `triton_step.py`; BN keys of a tile, BS splits padded to a power of two.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ham.kernels.decode.triton_token import rms_scale, rounded, sums_of_two

LOG2_E = tl.constexpr(1.4426950408889634)
# Stands for minus infinity: differences of it are 0, not NaN.
LOWEST = tl.constexpr(-3.0e38)


@triton.jit
def pages_of(p_table, token, end, o_n, PAGE: tl.constexpr, BN: tl.constexpr):
    """Address of the page of each row of the tile that starts at `token`: one, or a vector."""
    if BN <= PAGE:
        page = tl.load(p_table + token // PAGE, mask=token < end, other=0)
    else:
        page = tl.load(p_table + (token + o_n) // PAGE, mask=token + o_n < end, other=0)
    return page


@triton.jit
def tile_pointers(
    page,
    offset,
    token,
    o_n,
    o_d,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    BN: tl.constexpr,
    ELEMENT: tl.constexpr,
):
    """Pointers to `[BN, BD]` keys or values of one head, which start `offset` bytes into a page."""
    # Said of the pointer: what is known of the number is forgotten when it becomes one.
    p_run = tl.multiple_of((page + offset).to(tl.pointer_type(ELEMENT)), 16)
    o_in_run = ((token + o_n) % PAGE)[:, None] * D + o_d[None, :]
    if BN <= PAGE:
        # The tile lies within one page.
        p_tile = p_run + (token % PAGE) * D + (o_n[:, None] * D + o_d[None, :])
    else:
        p_tile = p_run[:, None] + o_in_run
    return p_tile


@triton.jit
def softmax_rows(
    b_q,
    page,
    key_run,
    value_run,
    p_table,
    token,
    end,
    o_n,
    o_k,
    o_v,
    b_max,
    b_sum,
    b_o,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    BN: tl.constexpr,
    PAGE: tl.constexpr,
    ELEMENT: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Add the tile at `token` to the running softmax of each row; returns the next tile's pages.

    Full tiles come without masks: the compiler interleaves predicated loads with the sums before
    them, until only two of eight are under way.
    """
    p_k = tile_pointers(page, key_run, token, o_n, o_k, K, PAGE, BN, ELEMENT)
    p_v = tile_pointers(page, value_run, token, o_n, o_v, V, PAGE, BN, ELEMENT)
    mask = token + o_n < end
    mask_k, mask_v = (o_k < K)[None, :], (o_v < V)[None, :]
    if MASKED:
        mask_k, mask_v = mask[:, None] & mask_k, mask[:, None] & mask_v
    b_k = tl.load(p_k, mask=mask_k, other=0.0) if MASKED or K != BK else tl.load(p_k)
    b_v = tl.load(p_v, mask=mask_v, other=0.0) if MASKED or V != BV else tl.load(p_v)
    # Asked for one tile ahead: keys would wait for their address otherwise.
    page = pages_of(p_table, token + BN, end, o_n, PAGE, BN)
    b_score = tl.sum(b_k.to(tl.float32) * b_q[None, :], 1)
    if MASKED:
        b_score = tl.where(mask, b_score, LOWEST)
    b_new = tl.maximum(b_max, b_score)
    b_fade = tl.exp2(b_max - b_new)
    b_weight = tl.exp2(b_score - b_new)
    if MASKED:
        b_weight = tl.where(mask, b_weight, 0.0)
    b_sum = b_sum * b_fade + b_weight
    b_o = b_o * b_fade[:, None] + b_weight[:, None] * b_v.to(tl.float32)
    return page, b_new, b_sum, b_o


@triton.jit
def finish_head(
    p_partial_o,
    p_partial_lm,
    p_o,
    p_raw,
    p_recurrent_gain,
    p_attention_gain,
    p_y,
    i_bh,
    H: tl.constexpr,
    V: tl.constexpr,
    BV: tl.constexpr,
    S: tl.constexpr,
    BS: tl.constexpr,
    EPSILON: tl.constexpr,
):
    """Merge the splits of one head, then norm, gate and add both branches (Eq. 12-13)."""
    o_s = tl.arange(0, BS)
    o_v = tl.arange(0, BV)
    mask_v = o_v < V
    # Past the first-level cache: with one launch, other multiprocessors wrote this just now.
    p_lm = p_partial_lm + (i_bh * S + o_s) * 2
    b_sum = tl.load(p_lm, mask=o_s < S, other=0.0, cache_modifier=".cg")
    b_max = tl.load(p_lm + 1, mask=o_s < S, other=LOWEST, cache_modifier=".cg")
    # Splits without keys have written no read-out. A sum that is NaN counts as one with keys.
    mask = (b_sum != 0.0)[:, None] & mask_v[None, :]
    p_split = p_partial_o + (i_bh * S + o_s[:, None]) * V + o_v[None, :]
    b_split = tl.load(p_split, mask=mask, other=0.0, cache_modifier=".cg")
    b_weight = tl.exp2(b_max - tl.max(b_max))
    total = tl.sum(b_sum * b_weight)
    b_attention = tl.sum(b_split * b_weight[:, None], 0) / tl.where(total == 0.0, 1.0, total)

    i_b, i_h = i_bh // H, i_bh % H
    b_recurrent = tl.load(p_o + i_bh * V + o_v, mask=mask_v, other=0.0)
    like = b_recurrent
    b_recurrent = b_recurrent.to(tl.float32)
    b_attention = rounded(b_attention, like)
    recurrent_squares, attention_squares = sums_of_two(
        b_recurrent * b_recurrent, b_attention * b_attention
    )
    b_gain = tl.load(p_recurrent_gain + o_v, mask=mask_v, other=0.0)
    b_recurrent *= rms_scale(recurrent_squares, V, EPSILON) * rounded(b_gain, like)
    b_gain = tl.load(p_attention_gain + o_v, mask=mask_v, other=0.0)
    b_attention *= rms_scale(attention_squares, V, EPSILON) * rounded(b_gain, like)
    recurrent_gate = tl.sigmoid(tl.load(p_raw + i_b * 2 * H + i_h).to(tl.float32))
    attention_gate = tl.sigmoid(tl.load(p_raw + i_b * 2 * H + H + i_h).to(tl.float32))
    b_y = recurrent_gate * rounded(b_recurrent, like) + attention_gate * rounded(b_attention, like)
    tl.store(p_y + i_bh * V + o_v, b_y.to(p_y.dtype.element_ty), mask=mask_v)


@triton.jit(do_not_specialize=["P"])
def attention_kernel(
    p_q,
    p_table,
    p_counts,
    p_active,
    p_partial_o,
    p_partial_lm,
    p_arrivals,
    p_o,
    p_raw,
    p_recurrent_gain,
    p_attention_gain,
    p_y,
    scale,
    P,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    BN: tl.constexpr,
    S: tl.constexpr,
    BS: tl.constexpr,
    PAGE: tl.constexpr,
    ELEMENT: tl.constexpr,
    KEY_OFFSET: tl.constexpr,
    VALUE_OFFSET: tl.constexpr,
    PER_HEAD: tl.constexpr,
    FUSED: tl.constexpr,
    EPSILON: tl.constexpr,
):
    """One of S shares of the keys of one head; shares are cut here, from the count."""
    i_bh = tl.program_id(0).to(tl.int64)
    i_s = tl.program_id(1)
    i_b = i_bh // H
    row = i_bh if PER_HEAD else i_b
    i_g = 0 if PER_HEAD else i_bh % H
    if p_active is not None:
        idle = tl.load(p_active + i_b) == 0
        if idle:
            return
    count = tl.load(p_counts + row)
    pages = tl.cdiv(count, PAGE)
    first = (pages * i_s) // S * PAGE
    end = tl.minimum((pages * (i_s + 1)) // S * PAGE, count)
    o_n = tl.arange(0, BN)
    o_k = tl.arange(0, BK)
    o_v = tl.arange(0, BV)
    b_q = tl.load(p_q + i_bh * K + o_k, mask=o_k < K, other=0.0).to(tl.float32)
    b_q *= scale * LOG2_E
    p_table += row * P
    key_run = KEY_OFFSET + i_g * (PAGE * K * (ELEMENT.primitive_bitwidth // 8))
    value_run = VALUE_OFFSET + i_g * (PAGE * V * (ELEMENT.primitive_bitwidth // 8))

    b_max = tl.full([BN], LOWEST, tl.float32)
    b_sum = tl.zeros([BN], tl.float32)
    b_o = tl.zeros([BN, BV], tl.float32)
    page = pages_of(p_table, first, end, o_n, PAGE, BN)
    full = first + (end - first) // BN * BN
    for token in tl.range(first, full, BN):
        page, b_max, b_sum, b_o = softmax_rows(
            b_q,
            page,
            key_run,
            value_run,
            p_table,
            token,
            end,
            o_n,
            o_k,
            o_v,
            b_max,
            b_sum,
            b_o,
            K,
            V,
            BK,
            BV,
            BN,
            PAGE,
            ELEMENT,
            False,
        )
    if full < end:
        page, b_max, b_sum, b_o = softmax_rows(
            b_q,
            page,
            key_run,
            value_run,
            p_table,
            full,
            end,
            o_n,
            o_k,
            o_v,
            b_max,
            b_sum,
            b_o,
            K,
            V,
            BK,
            BV,
            BN,
            PAGE,
            ELEMENT,
            True,
        )

    highest = tl.max(b_max)
    b_fade = tl.exp2(b_max - highest)
    i_split = i_bh * S + i_s
    tl.store(p_partial_lm + i_split * 2, tl.sum(b_sum * b_fade))
    tl.store(p_partial_lm + i_split * 2 + 1, highest)
    if first < end:
        b_merged = tl.sum(b_o * b_fade[:, None], 0)
        tl.store(p_partial_o + i_split * V + o_v, b_merged, mask=o_v < V)
    if FUSED:
        # All threads have stored before one of them announces it; see `step_kernel`.
        tl.debug_barrier()
        before = tl.atomic_add(p_arrivals + i_bh, 1, sem="acq_rel", scope="gpu")
        if before == S - 1:
            tl.debug_barrier()
            finish_head(
                p_partial_o,
                p_partial_lm,
                p_o,
                p_raw,
                p_recurrent_gain,
                p_attention_gain,
                p_y,
                i_bh,
                H,
                V,
                BV,
                S,
                BS,
                EPSILON,
            )
            tl.store(p_arrivals + i_bh, 0)


@triton.jit
def combine_kernel(
    p_partial_o,
    p_partial_lm,
    p_o,
    p_raw,
    p_recurrent_gain,
    p_attention_gain,
    p_y,
    H: tl.constexpr,
    V: tl.constexpr,
    BV: tl.constexpr,
    S: tl.constexpr,
    BS: tl.constexpr,
    EPSILON: tl.constexpr,
):
    """`finish_head` in a launch of its own, one program per head."""
    finish_head(
        p_partial_o,
        p_partial_lm,
        p_o,
        p_raw,
        p_recurrent_gain,
        p_attention_gain,
        p_y,
        tl.program_id(0).to(tl.int64),
        H,
        V,
        BV,
        S,
        BS,
        EPSILON,
    )
