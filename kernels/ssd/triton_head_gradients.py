"""Gradients local to a chunk when every head has its own b and c.

Part of the backward of the Triton Mamba-2 recurrence. Letters of the kernels as in
`triton_states.py`; the derivation stands in the README beside this file.
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
def _read_side(
    p_x,
    p_dy,
    p_b,
    p_c,
    p_gates,
    p_state,
    p_dstate,
    p_dc,
    p_flow,
    st_x,
    st_dy,
    st_b,
    st_c,
    st_dc,
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
    """Gradient of c, and what the reading of the state adds to the gradient of the decay."""
    dtype = p_x.dtype.element_ty
    o_c = tl.arange(0, C)
    causal = o_c[:, None] >= o_c[None, :]
    b_dc = tl.zeros([C, BS], tl.float32)
    b_flow = tl.zeros([C, C], tl.float32)
    for i_p in tl.range(0, P, BP, num_stages=STAGES):
        b_dy = load_rows(p_dy, st_dy, i_p, mask_t, P, BP, C)
        b_x = load_rows(p_x, st_x, i_p, mask_t, P, BP, C)
        b_state = load_state(p_state, i_p, S, P, BS, BP)
        b_flow = tl.dot(b_dy, tl.trans(b_x), b_flow, input_precision=PRECISION)
        b_dc = tl.dot(b_dy, tl.trans(b_state), b_dc, input_precision=PRECISION)
    b_high, b_low, high_end, low_end = load_decay(p_gates, o_c, C)
    b_dc *= decay_between(b_high, b_low, 0.0, 0.0, PARTS)[:, None]
    b_c = load_rows(p_c, st_c, 0, mask_t, S, BS, C)
    b_read = tl.sum(b_dc * b_c.to(tl.float32), 1)
    b_flow *= masked_decay(b_high, b_low, causal, True, PARTS)
    b_flow *= tl.load(p_gates + 2 * C + o_c)[None, :]
    b_b = load_rows(p_b, st_b, 0, mask_t, S, BS, C)
    b_dc = tl.dot(b_flow.to(dtype), b_b, b_dc, input_precision=PRECISION)
    store_rows(p_dc, st_dc, 0, mask_t, b_dc, S, BS, C)
    b_end = decay_between(high_end, low_end, 0.0, 0.0, PARTS)
    b_kept = b_end * inner_product(p_state, p_dstate, S * P)
    tl.store(p_flow + o_c, tl.cumsum(b_read, 0, reverse=True) + b_kept)


@triton.jit
def _write_side(
    p_x,
    p_dy,
    p_b,
    p_c,
    p_d,
    p_gates,
    p_dstate,
    p_db,
    p_dx,
    p_flow,
    p_skip,
    st_x,
    st_dy,
    st_b,
    st_c,
    st_db,
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
    """Gradients of b and x, and what goes with them: dt, D, most of the decay."""
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
    b_within *= masked_decay(b_high, b_low, o_j <= o_i, False, PARTS) * b_dt[:, None]
    # With D on the diagonal the product with dy is all of dx that stays inside the chunk.
    b_narrow = tl.where(o_j == o_i, b_within + tl.load(p_d), b_within).to(dtype)
    b_db = tl.zeros([C, BS], tl.float32)
    b_flow = tl.zeros([C, C], tl.float32)
    for i_p in tl.range(0, P, BP, num_stages=STAGES):
        b_x = load_rows(p_x, st_x, i_p, mask_t, P, BP, C)
        b_dy = load_rows(p_dy, st_dy, i_p, mask_t, P, BP, C)
        b_dstate = load_state(p_dstate, i_p, S, P, BS, BP)
        b_flow = tl.dot(b_x, tl.trans(b_dy), b_flow, input_precision=PRECISION)
        b_db = tl.dot(b_x, tl.trans(b_dstate), b_db, input_precision=PRECISION)
        b_dx = tl.dot(b_b, b_dstate, input_precision=PRECISION) * (b_dt * b_to_end)[:, None]
        b_dx = tl.dot(b_narrow, b_dy, b_dx, input_precision=PRECISION)
        store_rows(p_dx, st_dx, i_p, mask_t, b_dx, P, BP, C)
    # At once: Triton 3.6 cannot place a sum of sums of a product for Blackwell.
    tl.store(p_skip, tl.sum(tl.where(o_j == o_i, b_flow, 0.0)))
    # Loaded and multiplied again, so that they do not occupy registers during the loop.
    b_b = load_rows(p_b, st_b, 0, mask_t, S, BS, C)
    b_c = load_rows(p_c, st_c, 0, mask_t, S, BS, C)
    b_db *= b_to_end[:, None]
    b_wrote = tl.sum(b_db * b_b.to(tl.float32), 1)
    b_flow *= masked_decay(b_high, b_low, o_j <= o_i, False, PARTS)
    b_pairs = b_flow * tl.dot(b_b, tl.trans(b_c), input_precision=PRECISION)
    tl.store(p_flow + 2 * C + o_c, b_wrote + tl.sum(b_pairs, 1))
    b_gate = pairs_gate(b_pairs * b_dt[:, None], o_j < o_i, PARTS)
    b_wrote *= b_dt
    tl.store(p_flow + C + o_c, b_gate + tl.cumsum(b_wrote, 0) - b_wrote)
    b_flow = (b_flow * b_dt[:, None]).to(dtype)
    b_db = tl.dot(b_flow, b_c, b_db * b_dt[:, None], input_precision=PRECISION)
    store_rows(p_db, st_db, 0, mask_t, b_db, S, BS, C)


@triton.jit(do_not_specialize=["T", "M", "H"])
def gradient_kernel(
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
    SPLIT: tl.constexpr,
    S: tl.constexpr,
    P: tl.constexpr,
    BS: tl.constexpr,
    BP: tl.constexpr,
    C: tl.constexpr,
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Gradients of one chunk of one head that has its own b and c.

    With `SPLIT` even programs do the reading side, odd ones the writing side.
    """
    i_side = tl.program_id(0) % 2
    i_h = tl.program_id(0) // 2 if SPLIT else tl.program_id(0)
    i_m = tl.program_id(1)
    i_b = tl.program_id(2).to(tl.int64)
    t = (i_m * C).to(tl.int64)
    mask_t = t + tl.arange(0, C) < T
    p_x += i_b * sb_x + t * st_x + i_h * P
    p_dy += i_b * sb_dy + t * st_dy + i_h * P
    p_b += i_b * sb_b + t * st_b + i_h * S
    p_c += i_b * sb_c + t * st_c + i_h * S
    i_row = (i_b * T + t) * H + i_h
    i_xm = (i_b * H + i_h) * M + i_m
    p_gates += i_xm * 3 * C
    p_flow += i_xm * 3 * C
    p_states += i_xm * S * P
    p_dstates += i_xm * S * P
    if not SPLIT or i_side == 0:
        _read_side(
            p_x,
            p_dy,
            p_b,
            p_c,
            p_gates,
            p_states,
            p_dstates,
            p_dc + i_row * S,
            p_flow,
            st_x,
            st_dy,
            st_b,
            st_c,
            H * S,
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
    if not SPLIT or i_side == 1:
        _write_side(
            p_x,
            p_dy,
            p_b,
            p_c,
            p_d + i_h,
            p_gates,
            p_dstates,
            p_db + i_row * S,
            p_dx + i_row * P,
            p_flow,
            p_skip + i_xm,
            st_x,
            st_dy,
            st_b,
            st_c,
            H * S,
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
