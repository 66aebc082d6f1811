"""Gradients local to a chunk when heads share b and c, for the Triton Mamba-2 recurrence.

The gradients of b and c are sums over the heads of a group: programs of their own take a block of
heads one after the other, with the sum on chip. They and the programs of the single heads of the
block follow each other, so that the block is read from memory once and then from the L2 cache.
Letters of the kernels as in `triton_states.py`; N blocks of heads of a group. The derivation stands
in the README beside this file.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ham.kernels.gated_delta_rule.triton_forward import decay_between, masked_decay
from ham.kernels.ssd.triton_loads import (
    inner_product,
    load_rows,
    load_state,
    pairs_gate,
    store_rows,
)
from ham.kernels.ssd.triton_states import load_decay


@triton.jit
def _projection_side(
    p_left,
    p_right,
    p_other,
    p_gates,
    p_states,
    p_out,
    heads,
    M,
    st_left,
    st_right,
    st_other,
    st_out,
    mask_t,
    READ: tl.constexpr,
    S: tl.constexpr,
    P: tl.constexpr,
    BS: tl.constexpr,
    C: tl.constexpr,
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
    BP: tl.constexpr,
):
    """Gradient of c (`READ`; left dy, right x, other b) or b (left x, right dy, other c)."""
    dtype = p_left.dtype.element_ty
    o_c = tl.arange(0, C)
    b_out = tl.zeros([C, BS], tl.float32)
    b_sum = tl.zeros([C, C], tl.float32)
    for i_h in tl.range(0, heads, num_stages=STAGES):
        i_m = M.to(tl.int64) * i_h
        b_left = load_rows(p_left + i_h * P, st_left, 0, mask_t, P, BP, C)
        b_right = load_rows(p_right + i_h * P, st_right, 0, mask_t, P, BP, C)
        b_state = load_state(p_states + i_m * S * P, 0, S, P, BS, BP)
        b_high, b_low, high_end, low_end = load_decay(p_gates + i_m * 3 * C, o_c, C)
        b_dt = tl.load(p_gates + i_m * 3 * C + 2 * C + o_c)
        b_flow = tl.dot(b_left, tl.trans(b_right), input_precision=PRECISION)
        if READ:
            b_weight = decay_between(b_high, b_low, 0.0, 0.0, PARTS)
            causal = o_c[:, None] >= o_c[None, :]
            b_flow *= masked_decay(b_high, b_low, causal, True, PARTS) * b_dt[None, :]
        else:
            b_weight = b_dt * decay_between(high_end, low_end, b_high, b_low, PARTS)
            later = o_c[:, None] <= o_c[None, :]
            b_flow *= masked_decay(b_high, b_low, later, False, PARTS) * b_dt[:, None]
        b_sum += b_flow
        # Not left * weight added up by the product: with that operand in registers the pipelined
        # loop compiles to one wait per matrix instruction (54 instead of 11).
        b_head = tl.dot(b_left, tl.trans(b_state), input_precision=PRECISION)
        b_out += b_head * b_weight[:, None]
    b_other = load_rows(p_other, st_other, 0, mask_t, S, BS, C)
    b_out = tl.dot(b_sum.to(dtype), b_other, b_out, input_precision=PRECISION)
    store_rows(p_out, st_out, 0, mask_t, b_out, S, BS, C)


@triton.jit
def _head_side(
    p_x,
    p_dy,
    p_b,
    p_c,
    p_d,
    p_gates,
    p_state,
    p_dstate,
    p_dx,
    p_flow,
    p_skip,
    st_x,
    st_dy,
    st_b,
    st_c,
    st_dx,
    mask_t,
    S: tl.constexpr,
    P: tl.constexpr,
    BS: tl.constexpr,
    BP: tl.constexpr,
    C: tl.constexpr,
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Gradient of x of one head, and what goes with it: dt, D, decay."""
    dtype = p_x.dtype.element_ty
    o_c = tl.arange(0, C)
    # Rows are the tokens that write and columns those that read, from the start: see the README on
    # transposed products.
    o_j = o_c[:, None]
    o_i = o_c[None, :]
    b_high, b_low, high_end, low_end = load_decay(p_gates, o_c, C)
    b_dt = tl.load(p_gates + 2 * C + o_c)
    b_to_end = decay_between(high_end, low_end, b_high, b_low, PARTS)
    b_b = load_rows(p_b, st_b, 0, mask_t, S, BS, C)
    b_c = load_rows(p_c, st_c, 0, mask_t, S, BS, C)
    b_within = tl.dot(b_b, tl.trans(b_c), input_precision=PRECISION)
    b_within *= masked_decay(b_high, b_low, o_j <= o_i, False, PARTS)
    # With D on the diagonal the product with dy is all of dx that stays inside the chunk.
    b_narrow = b_within * b_dt[:, None]
    b_narrow = tl.where(o_j == o_i, b_narrow + tl.load(p_d), b_narrow).to(dtype)
    b_flow = tl.zeros([C, C], tl.float32)
    b_wrote = tl.zeros([C], tl.float32)
    b_read = tl.zeros([C], tl.float32)
    for i_p in tl.range(0, P, BP, num_stages=STAGES):
        b_x = load_rows(p_x, st_x, i_p, mask_t, P, BP, C)
        b_dy = load_rows(p_dy, st_dy, i_p, mask_t, P, BP, C)
        b_state = load_state(p_state, i_p, S, P, BS, BP)
        b_dstate = load_state(p_dstate, i_p, S, P, BS, BP)
        b_flow = tl.dot(b_x, tl.trans(b_dy), b_flow, input_precision=PRECISION)
        b_seen = tl.dot(b_c, b_state, input_precision=PRECISION)
        b_read += tl.sum(b_seen * b_dy.to(tl.float32), 1)
        b_dx = tl.dot(b_b, b_dstate, input_precision=PRECISION) * b_to_end[:, None]
        b_wrote += tl.sum(b_dx * b_x.to(tl.float32), 1)
        b_dx = tl.dot(b_narrow, b_dy, b_dx * b_dt[:, None], input_precision=PRECISION)
        store_rows(p_dx, st_dx, i_p, mask_t, b_dx, P, BP, C)
    # At once: Triton 3.6 cannot place a sum of sums of a product for Blackwell.
    tl.store(p_skip, tl.sum(tl.where(o_j == o_i, b_flow, 0.0)))
    b_pairs = b_flow * b_within
    tl.store(p_flow + 2 * C + o_c, b_wrote + tl.sum(b_pairs, 1))
    b_gate = pairs_gate(b_pairs * b_dt[:, None], o_j < o_i, PARTS)
    b_wrote *= b_dt
    tl.store(p_flow + C + o_c, b_gate + tl.cumsum(b_wrote, 0) - b_wrote)
    b_read *= decay_between(b_high, b_low, 0.0, 0.0, PARTS)
    b_end = decay_between(high_end, low_end, 0.0, 0.0, PARTS)
    b_kept = b_end * inner_product(p_state, p_dstate, S * P)
    tl.store(p_flow + o_c, tl.cumsum(b_read, 0, reverse=True) + b_kept)


@triton.jit(do_not_specialize=["T", "M", "H", "G", "heads_per_group", "heads_per_block", "blocks"])
def group_gradient_kernel(
    p_x,
    p_dy,
    p_b,
    p_c,
    p_d,
    p_gates,
    p_states,
    p_dstates,
    p_dx,
    p_db,
    p_dc,
    p_flow,
    p_skip,
    sb_x,
    st_x,
    sb_dy,
    st_dy,
    sb_b,
    st_b,
    sb_c,
    st_c,
    T,
    M,
    H,
    G,
    heads_per_group,
    heads_per_block,
    blocks,
    WIDE: tl.constexpr,
    S: tl.constexpr,
    P: tl.constexpr,
    BS: tl.constexpr,
    BP: tl.constexpr,
    C: tl.constexpr,
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Gradients of one chunk: of c or b for a block of heads of a group, or of one head's x.

    `WIDE` columns of P at a time for b and c, `BP` for x.
    """
    i_role = tl.program_id(0) % (heads_per_block + 2)
    i_g = tl.program_id(0) // (heads_per_block + 2)
    i_m = tl.program_id(1)
    i_b = (tl.program_id(2) // blocks).to(tl.int64)
    i_n = tl.program_id(2) % blocks
    batch = tl.num_programs(2) // blocks
    heads = tl.minimum(heads_per_block, heads_per_group - i_n * heads_per_block)
    i_h = i_g * heads_per_group + i_n * heads_per_block
    i_h += tl.maximum(i_role - 2, 0)
    t = (i_m * C).to(tl.int64)
    mask_t = t + tl.arange(0, C) < T
    p_x += i_b * sb_x + t * st_x + i_h * P
    p_dy += i_b * sb_dy + t * st_dy + i_h * P
    p_b += i_b * sb_b + t * st_b + i_g * S
    p_c += i_b * sb_c + t * st_c + i_g * S
    i_row = ((i_n * batch + i_b) * T + t) * G + i_g
    i_xm = (i_b * H + i_h) * M + i_m
    p_gates += i_xm * 3 * C
    p_states += i_xm * S * P
    p_dstates += i_xm * S * P
    if i_role == 0:
        _projection_side(
            p_dy,
            p_x,
            p_b,
            p_gates,
            p_states,
            p_dc + i_row * S,
            heads,
            M,
            st_dy,
            st_x,
            st_b,
            G * S,
            mask_t,
            True,
            S,
            P,
            BS,
            C,
            PARTS,
            PRECISION,
            STAGES,
            WIDE,
        )
    elif i_role == 1:
        _projection_side(
            p_x,
            p_dy,
            p_c,
            p_gates,
            p_dstates,
            p_db + i_row * S,
            heads,
            M,
            st_x,
            st_dy,
            st_c,
            G * S,
            mask_t,
            False,
            S,
            P,
            BS,
            C,
            PARTS,
            PRECISION,
            STAGES,
            WIDE,
        )
    elif i_role - 2 < heads:
        _head_side(
            p_x,
            p_dy,
            p_b,
            p_c,
            p_d + i_h,
            p_gates,
            p_states,
            p_dstates,
            p_dx + ((i_b * T + t) * H + i_h) * P,
            p_flow + i_xm * 3 * C,
            p_skip + i_xm,
            st_x,
            st_dy,
            st_b,
            st_c,
            H * P,
            mask_t,
            S,
            P,
            BS,
            BP,
            C,
            PARTS,
            PRECISION,
            STAGES,
        )
