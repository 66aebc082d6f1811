"""Gradients of the Triton Mamba-2 recurrence that are local to a chunk.

The states before and the gradients of the states after every chunk exist already. A program owns
one chunk of a block of heads of one group, so that the gradients of b and c are summed over those
heads on chip. Letters of the kernels as in `triton_states.py`; N blocks of heads of a group. The
derivation stands in the README beside this file.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ham.kernels.gated_delta_rule.triton_forward import (
    decay_between,
    masked_decay,
    row_column_mask,
)
from ham.kernels.gated_delta_rule.triton_tiles import decay_parts, padded, precision
from ham.kernels.ssd.triton_states import load_decay
from ham.kernels.ssd.triton_tiles import Tile, count_head_blocks
from ham.kernels.triton_target import target_of


class Gradients(NamedTuple):
    """Gradients of everything but the initial state: x, b and c in their dtype, else float32."""

    dx_BTHP: Tensor
    ddt_BTH: Tensor
    da_H: Tensor
    db_BTGS: Tensor
    dc_BTGS: Tensor
    dd_H: Tensor


@triton.jit
def _read_side(
    p_x,
    p_dy,
    p_b,
    p_c,
    p_gates,
    p_states,
    p_dstates,
    p_dc,
    p_flow,
    i_x,
    heads,
    M,
    i_m,
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
    """Gradient of c, and what the reading of states adds to the gradient of the decay."""
    dtype = p_x.dtype.element_ty
    o_c = tl.arange(0, C)
    o_s = tl.arange(0, BS)
    mask_s = row_column_mask(mask_t, o_s < S, S == BS)
    causal = o_c[:, None] >= o_c[None, :]
    b_c = tl.load(p_c + o_c[:, None] * st_c + o_s[None, :], mask=mask_s, other=0.0)
    b_dc = tl.zeros([C, BS], tl.float32)
    b_sum = tl.zeros([C, C], tl.float32)
    for i_h in range(heads):
        i_xm = (i_x + i_h) * M + i_m
        p_g = p_gates + i_xm * 3 * C
        b_high, b_low, high_end, low_end = load_decay(p_g, o_c, C)
        b_from_start = decay_between(b_high, b_low, 0.0, 0.0, PARTS)
        b_flow = tl.zeros([C, C], tl.float32)
        b_read = tl.zeros([C], tl.float32)
        b_kept = tl.zeros([BS], tl.float32)
        for i_p in tl.range(0, P, BP, num_stages=STAGES):
            o_p = i_p + tl.arange(0, BP)
            mask_p = row_column_mask(mask_t, o_p < P, P % BP == 0)
            mask_state = row_column_mask(o_s < S, o_p < P, P % BP == 0)
            o_state = i_xm * S * P + o_s[:, None] * P + o_p[None, :]
            o_x = i_h * P + o_p[None, :]
            b_dy = tl.load(p_dy + o_c[:, None] * st_dy + o_x, mask=mask_p, other=0.0)
            b_x = tl.load(p_x + o_c[:, None] * st_x + o_x, mask=mask_p, other=0.0)
            b_state = tl.load(p_states + o_state, mask=mask_state, other=0.0)
            b_dstate = tl.load(p_dstates + o_state, mask=mask_state, other=0.0)
            b_flow = tl.dot(b_dy, tl.trans(b_x), b_flow, input_precision=PRECISION)
            b_wide = b_dy.to(tl.float32) * b_from_start[:, None]
            b_seen = tl.dot(b_c, b_state, input_precision=PRECISION)
            b_read += tl.sum(b_seen * b_wide, 1)
            b_dc = tl.dot(b_wide.to(dtype), tl.trans(b_state), b_dc, input_precision=PRECISION)
            b_kept += tl.sum(b_state.to(tl.float32) * b_dstate.to(tl.float32), 1)
        b_dt = tl.load(p_g + 2 * C + o_c)
        b_sum += b_flow * masked_decay(b_high, b_low, causal, True, PARTS) * b_dt[None, :]
        b_end = decay_between(high_end, low_end, 0.0, 0.0, PARTS)
        b_gate = tl.cumsum(b_read, 0, reverse=True) + b_end * tl.sum(b_kept, 0)
        tl.store(p_flow + i_xm * 3 * C + o_c, b_gate)
    b_b = tl.load(p_b + o_c[:, None] * st_b + o_s[None, :], mask=mask_s, other=0.0)
    b_dc = tl.dot(b_sum.to(dtype), b_b, b_dc, input_precision=PRECISION)
    b_dc = b_dc.to(p_dc.dtype.element_ty)
    tl.store(p_dc + o_c[:, None] * st_dc + o_s[None, :], b_dc, mask=mask_s)


@triton.jit
def _write_side(
    p_x,
    p_dy,
    p_b,
    p_c,
    p_d,
    p_gates,
    p_dstates,
    p_db,
    p_dx,
    p_flow,
    p_skip,
    i_x,
    heads,
    M,
    i_m,
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
    o_s = tl.arange(0, BS)
    mask_s = row_column_mask(mask_t, o_s < S, S == BS)
    # Rows are the tokens that write and columns those that read, from the start: see the README on
    # transposed products.
    o_j = o_c[:, None]
    o_i = o_c[None, :]
    b_b = tl.load(p_b + o_c[:, None] * st_b + o_s[None, :], mask=mask_s, other=0.0)
    b_c = tl.load(p_c + o_c[:, None] * st_c + o_s[None, :], mask=mask_s, other=0.0)
    b_db = tl.zeros([C, BS], tl.float32)
    b_sum = tl.zeros([C, C], tl.float32)
    for i_h in range(heads):
        i_xm = (i_x + i_h) * M + i_m
        p_g = p_gates + i_xm * 3 * C
        b_high, b_low, high_end, low_end = load_decay(p_g, o_c, C)
        b_dt = tl.load(p_g + 2 * C + o_c)
        b_to_end = decay_between(high_end, low_end, b_high, b_low, PARTS)
        skip = tl.load(p_d + i_h)
        b_within = tl.dot(b_b, tl.trans(b_c), input_precision=PRECISION)
        b_within *= masked_decay(b_high, b_low, o_j <= o_i, False, PARTS)
        b_narrow = b_within.to(dtype)
        b_flow = tl.zeros([C, C], tl.float32)
        b_wrote = tl.zeros([C], tl.float32)
        for i_p in tl.range(0, P, BP, num_stages=STAGES):
            o_p = i_p + tl.arange(0, BP)
            mask_p = row_column_mask(mask_t, o_p < P, P % BP == 0)
            mask_state = row_column_mask(o_s < S, o_p < P, P % BP == 0)
            o_state = i_xm * S * P + o_s[:, None] * P + o_p[None, :]
            o_x = i_h * P + o_p[None, :]
            b_x = tl.load(p_x + o_c[:, None] * st_x + o_x, mask=mask_p, other=0.0)
            b_dy = tl.load(p_dy + o_c[:, None] * st_dy + o_x, mask=mask_p, other=0.0)
            b_dstate = tl.load(p_dstates + o_state, mask=mask_state, other=0.0)
            b_flow = tl.dot(b_x, tl.trans(b_dy), b_flow, input_precision=PRECISION)
            b_weighted = b_x.to(tl.float32) * b_to_end[:, None]
            b_scaled = (b_weighted * b_dt[:, None]).to(dtype)
            b_db = tl.dot(b_scaled, tl.trans(b_dstate), b_db, input_precision=PRECISION)
            b_dv = tl.dot(b_b, b_dstate, input_precision=PRECISION)
            b_wrote += tl.sum(b_dv * b_weighted, 1)
            b_dv *= b_to_end[:, None]
            b_dv = tl.dot(b_narrow, b_dy, b_dv, input_precision=PRECISION)
            b_dx = b_dv * b_dt[:, None] + skip * b_dy.to(tl.float32)
            tl.store(p_dx + o_c[:, None] * st_dx + o_x, b_dx.to(dtype), mask=mask_p)
        # x . dv, dy . x and both sums of the decay come from the same products, so that what has to
        # cancel does; the diagonal, which always does, is left out.
        b_part = b_flow * b_narrow.to(tl.float32)
        b_along = b_wrote + tl.sum(b_part, 1)
        b_part = tl.where(o_j < o_i, b_part, 0.0) * b_dt[:, None]
        b_gate = tl.cumsum(tl.sum(b_part, 0) - tl.sum(b_part, 1), 0, reverse=True)
        b_wrote *= b_dt
        b_gate += tl.cumsum(b_wrote, 0) - b_wrote
        p_out = p_flow + i_xm * 3 * C
        tl.store(p_out + C + o_c, b_gate)
        tl.store(p_out + 2 * C + o_c, b_along)
        tl.store(p_skip + i_xm, tl.sum(tl.sum(tl.where(o_j == o_i, b_flow, 0.0), 1), 0))
        b_sum += b_flow * masked_decay(b_high, b_low, o_j <= o_i, False, PARTS) * b_dt[:, None]
    b_db = tl.dot(b_sum.to(dtype), b_c, b_db, input_precision=PRECISION)
    b_db = b_db.to(p_db.dtype.element_ty)
    tl.store(p_db + o_c[:, None] * st_db + o_s[None, :], b_db, mask=mask_s)


@triton.jit(do_not_specialize=["T", "M", "H", "G", "heads_per_group", "heads_per_block"])
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
    G,
    heads_per_group,
    heads_per_block,
    S: tl.constexpr,
    P: tl.constexpr,
    BS: tl.constexpr,
    BP: tl.constexpr,
    C: tl.constexpr,
    SINGLE: tl.constexpr,
    SPLIT: tl.constexpr,
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Gradients of one chunk of a block of heads of one group.

    With `SPLIT` even programs do the reading side, odd ones the writing side; with `SINGLE` every
    head has its own b and c.
    """
    i_side = tl.program_id(0) % 2
    i_g = (tl.program_id(0) // 2) if SPLIT else tl.program_id(0)
    i_m = tl.program_id(1)
    i_b = (tl.program_id(2) % (tl.num_programs(2) // tl.cdiv(heads_per_group, heads_per_block))).to(
        tl.int64
    )
    i_n = tl.program_id(2) // (tl.num_programs(2) // tl.cdiv(heads_per_group, heads_per_block))
    batch = tl.num_programs(2) // tl.cdiv(heads_per_group, heads_per_block)
    if SINGLE:
        heads = 1
        i_h = i_g
    else:
        heads = tl.minimum(heads_per_block, heads_per_group - i_n * heads_per_block)
        i_h = i_g * heads_per_group + i_n * heads_per_block
    t = (i_m * C).to(tl.int64)
    mask_t = t + tl.arange(0, C) < T
    p_x += i_b * sb_x + t * st_x + i_h * P
    p_dy += i_b * sb_dy + t * st_dy + i_h * P
    p_b += i_b * sb_b + t * st_b + i_g * S
    p_c += i_b * sb_c + t * st_c + i_g * S
    p_dx += ((i_b * T + t) * H + i_h) * P
    row = ((i_n * batch + i_b) * T + t) * G + i_g
    i_x = i_b * H + i_h
    if not SPLIT or i_side == 0:
        _read_side(
            p_x,
            p_dy,
            p_b,
            p_c,
            p_gates,
            p_states,
            p_dstates,
            p_dc + row * S,
            p_flow,
            i_x,
            heads,
            M,
            i_m,
            st_x,
            st_dy,
            st_b,
            st_c,
            G * S,
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
            p_db + row * S,
            p_dx,
            p_flow,
            p_skip,
            i_x,
            heads,
            M,
            i_m,
            st_x,
            st_dy,
            st_b,
            st_c,
            G * S,
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


@triton.jit(do_not_specialize=["T", "M", "H"])
def step_kernel(
    p_flow, p_gates, p_a, p_ddt, p_rate, T, M, H, C: tl.constexpr, BH: tl.constexpr
):
    """Gradient of dt, and the part of one chunk in the gradient of a."""
    i_m = tl.program_id(0)
    i_b = tl.program_id(1).to(tl.int64)
    o_c = tl.arange(0, C)[:, None]
    o_h = tl.program_id(2) * BH + tl.arange(0, BH)[None, :]
    mask = o_h < H
    i_xm = (i_b * H + o_h) * M + i_m
    p_f = p_flow + i_xm * 3 * C + o_c
    b_decay = tl.load(p_f, mask=mask, other=0.0) + tl.load(p_f + C, mask=mask, other=0.0)
    b_along = tl.load(p_f + 2 * C, mask=mask, other=0.0)
    b_dt = tl.load(p_gates + i_xm * 3 * C + 2 * C + o_c, mask=mask, other=0.0)
    b_a = tl.load(p_a + o_h, mask=mask, other=0.0)
    o_t = i_m * C + o_c
    p_out = p_ddt + (i_b * T + o_t) * H + o_h
    tl.store(p_out, b_a * b_decay + b_along, mask=mask & (o_t < T))
    tl.store(p_rate + i_xm, tl.sum(b_dt * b_decay, 0)[None, :], mask=mask)


def step_gradients(
    flow_XM3C: Tensor, gates_XM3C: Tensor, a_H: Tensor, rate_XM: Tensor, batch: int, time: int
) -> Tensor:
    """Launch `step_kernel`; returns `ddt_BTH` and fills `rate_XM`, whose sum over batch and chunks
    is the gradient of a."""
    chunks, chunk, heads = gates_XM3C.shape[1], gates_XM3C.shape[3], a_H.shape[0]
    ddt_BTH = torch.empty(batch, time, heads, dtype=torch.float32, device=a_H.device)
    block = min(16, triton.next_power_of_2(heads))
    step_kernel[(chunks, batch, triton.cdiv(heads, block))](
        flow_XM3C,
        gates_XM3C,
        a_H,
        ddt_BTH,
        rate_XM,
        time,
        chunks,
        heads,
        C=chunk,
        BH=block,
        num_warps=4,
    )
    return ddt_BTH


def gradients(
    x_BTHP: Tensor,
    dy_BTHP: Tensor,
    b_BTGS: Tensor,
    c_BTGS: Tensor,
    a_H: Tensor,
    d_H: Tensor,
    gates_XM3C: Tensor,
    states_XMSP: Tensor,
    dstates_XMSP: Tensor,
    tile: Tile,
) -> Gradients:
    """Launch `gradient_kernel` and `step_kernel`.

    Args:
        x_BTHP: Inputs, the last two axes contiguous, as of every sequence here.
        dy_BTHP: Gradient of the read-outs, in their dtype.
        b_BTGS: Input projections.
        c_BTGS: Output projections.
        a_H: Decay rates, float32.
        d_H: Skip weights, float32.
        gates_XM3C: From `chunk_gates`.
        states_XMSP: State before every chunk.
        dstates_XMSP: Gradient of the state after every chunk.
        tile: How to cut the work.
    """
    batch, time, heads, head_size = x_BTHP.shape
    groups, state_size = b_BTGS.shape[2:]
    chunks = gates_XM3C.shape[1]
    device = x_BTHP.device
    sides = 2 if tile.split else 1
    blocks = count_head_blocks(
        heads // groups, batch * chunks * groups * sides, target_of(device).multiprocessors
    )
    partial = (blocks, *b_BTGS.shape)
    dtype = b_BTGS.dtype if blocks == 1 else torch.float32
    db_NBTGS = torch.empty(partial, dtype=dtype, device=device)
    dc_NBTGS = torch.empty(partial, dtype=dtype, device=device)
    dx_BTHP = torch.empty(x_BTHP.shape, dtype=x_BTHP.dtype, device=device)
    flow_XM3C = torch.empty(gates_XM3C.shape, dtype=torch.float32, device=device)
    sums_2BHM = torch.empty(2, batch, heads, chunks, dtype=torch.float32, device=device)
    gradient_kernel[(groups * sides, chunks, batch * blocks)](
        x_BTHP,
        dy_BTHP,
        b_BTGS,
        c_BTGS,
        d_H,
        gates_XM3C,
        states_XMSP,
        dstates_XMSP,
        dx_BTHP,
        db_NBTGS,
        dc_NBTGS,
        flow_XM3C,
        sums_2BHM[1],
        x_BTHP.stride(0),
        x_BTHP.stride(1),
        dy_BTHP.stride(0),
        dy_BTHP.stride(1),
        b_BTGS.stride(0),
        b_BTGS.stride(1),
        c_BTGS.stride(0),
        c_BTGS.stride(1),
        time,
        chunks,
        heads,
        groups,
        heads // groups,
        triton.cdiv(heads // groups, blocks),
        S=state_size,
        P=head_size,
        BS=padded(state_size),
        BP=tile.block_p,
        C=tile.chunk,
        SINGLE=groups == heads,
        SPLIT=tile.split,
        PARTS=decay_parts(x_BTHP.dtype),
        PRECISION=precision(x_BTHP.dtype),
        STAGES=tile.stages,
        num_warps=tile.warps,
    )
    ddt_BTH = step_gradients(flow_XM3C, gates_XM3C, a_H, sums_2BHM[0], batch, time)
    da_H, dd_H = (each.sum((0, 2)) for each in sums_2BHM)
    if blocks == 1:
        return Gradients(dx_BTHP, ddt_BTH, da_H, db_NBTGS[0], dc_NBTGS[0], dd_H)
    db_BTGS, dc_BTGS = (each.sum(0).to(b_BTGS.dtype) for each in (db_NBTGS, dc_NBTGS))
    return Gradients(dx_BTHP, ddt_BTH, da_H, db_BTGS, dc_BTGS, dd_H)
