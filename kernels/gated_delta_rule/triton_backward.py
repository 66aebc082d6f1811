"""Backward of the Triton gated delta rule: a reverse walk over chunks, then all gradients.

The reverse walk carries the gradient of the state on chip and writes, per chunk, that gradient and
the gradient W of the right-hand side of the triangular system, which is the gradient of the values.
Everything else is local to a chunk. Letters of the kernels as in `triton_inverse.py`; the
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
    load_gates,
    masked_decay,
    row_column_mask,
)
from ham.kernels.gated_delta_rule.triton_tiles import (
    CHUNK,
    Gates,
    Tile,
    decay_parts,
    padded,
    precision,
)


class WalkedBack(NamedTuple):
    """What the reverse walk writes.

    Attributes:
        w_BTHV: Gradient of the right-hand side of the triangular system.
        dv_BTHV: Gradient of the values; W itself unless the predictions have a gradient.
        dstates_XMKV: Gradient of the state after every chunk.
        dinitial_BHKV: Gradient of the initial state, float32; None when not asked for.
    """

    w_BTHV: Tensor
    dv_BTHV: Tensor
    dstates_XMKV: Tensor
    dinitial_BHKV: Tensor | None


class Gradients(NamedTuple):
    """Gradients of the local part: q and k in their dtype, gates in float32."""

    dq_BTHK: Tensor
    dk_BTHK: Tensor
    dlog_decay_BTH: Tensor
    dbeta_BTH: Tensor


@triton.jit(do_not_specialize=["T", "M", "H"])
def reverse_walk_kernel(
    p_q,
    p_k,
    p_do,
    p_dp,
    p_inverse,
    p_gates,
    p_dfinal,
    p_w,
    p_dv,
    p_dstates,
    p_dinitial,
    scale,
    T,
    M,
    H,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Gradient of the state after every chunk and W, for one block of value columns."""
    i_v = tl.program_id(0)
    i_bh = tl.program_id(1).to(tl.int64)
    i_b = i_bh // H
    i_h = i_bh % H
    dtype = p_do.dtype.element_ty
    o_c = tl.arange(0, C)
    o_k = tl.arange(0, BK)
    o_v = i_v * BV + tl.arange(0, BV)
    mask_k = o_k < K
    mask_v = o_v < V
    o_state = o_k[:, None] * V + o_v[None, :]
    mask_state = row_column_mask(mask_k, mask_v, V % BV == 0)
    o_token = o_c[:, None] * H
    o_key = o_token * K + o_k[None, :]
    o_value = o_token * V + o_v[None, :]
    o_square = o_c[:, None] * C + o_c[None, :]
    later = o_c[:, None] <= o_c[None, :]

    if p_dfinal is not None:
        b_dstate = tl.load(p_dfinal + i_bh * K * V + o_state, mask=mask_state, other=0.0)
    else:
        b_dstate = tl.zeros([BK, BV], tl.float32)

    # Carried from chunk to chunk, as in the forward walk.
    p_gates += (i_bh * M + M - 1) * 3 * C
    b_high, b_low, b_beta = load_gates(p_gates, o_c, C)
    high_end = tl.load(p_gates + C - 1)
    low_end = tl.load(p_gates + 2 * C - 1)
    for i_back in tl.range(0, M, num_stages=STAGES):
        i_m = M - 1 - i_back
        first = (i_b * T + i_m * C) * H + i_h
        mask_t = i_m * C + o_c < T
        mask_key = row_column_mask(mask_t, mask_k, K == BK)
        mask_value = row_column_mask(mask_t, mask_v, V % BV == 0)
        b_q = tl.load(p_q + first * K + o_key, mask=mask_key, other=0.0)
        b_k = tl.load(p_k + first * K + o_key, mask=mask_key, other=0.0)
        b_do = tl.load(p_do + first * V + o_value, mask=mask_value, other=0.0)
        i_x = i_bh * M + i_m
        b_inverse = tl.load(p_inverse + i_x * C * C + o_square)
        b_from_start = decay_between(b_high, b_low, 0.0, 0.0, PARTS)
        b_to_end = decay_between(high_end, low_end, b_high, b_low, PARTS)

        b_dstate_narrow = b_dstate.to(dtype)
        tl.store(p_dstates + i_x * K * V + o_state, b_dstate_narrow, mask=mask_state)

        # Rows are keys and columns queries from the start: a transposed product as an operand of
        # the next one is what Triton 3.4-3.7 gets wrong on Hopper at 64 columns (FLA#640).
        b_within = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)
        b_within *= scale * masked_decay(b_high, b_low, later, False, PARTS)
        b_du = tl.dot(b_k, b_dstate_narrow, input_precision=PRECISION) * b_to_end[:, None]
        b_du = tl.dot(b_within.to(dtype), b_do, b_du, input_precision=PRECISION)
        b_dr = b_du * b_beta[:, None]
        if p_dp is not None:
            # dv = W + dp, where W holds -dp: added up before W is rounded, so that they cancel.
            b_dv = b_dr
            b_dr -= tl.load(p_dp + first * V + o_value, mask=mask_value, other=0.0)
        b_solved = tl.dot(tl.trans(b_inverse), b_dr.to(dtype), input_precision=PRECISION)
        b_w = b_dr + b_solved
        if p_dp is not None:
            tl.store(p_dv + first * V + o_value, (b_dv + b_solved).to(dtype), mask=mask_value)
        tl.store(p_w + first * V + o_value, b_w.to(dtype), mask=mask_value)

        b_read = (b_do.to(tl.float32) * (scale * b_from_start)[:, None]).to(dtype)
        b_wrong = (-b_w * b_from_start[:, None]).to(dtype)
        b_dstate *= decay_between(high_end, low_end, 0.0, 0.0, PARTS)
        b_dstate = tl.dot(tl.trans(b_q), b_read, b_dstate, input_precision=PRECISION)
        b_dstate = tl.dot(tl.trans(b_k), b_wrong, b_dstate, input_precision=PRECISION)
        p_gates -= tl.where(i_m > 0, 3 * C, 0)
        b_high, b_low, b_beta = load_gates(p_gates, o_c, C)
        high_end = tl.load(p_gates + C - 1)
        low_end = tl.load(p_gates + 2 * C - 1)

    if p_dinitial is not None:
        tl.store(p_dinitial + i_bh * K * V + o_state, b_dstate, mask=mask_state)


@triton.jit(do_not_specialize=["T", "M", "H"])
def gradient_kernel(
    p_q,
    p_k,
    p_do,
    p_residual,
    p_w,
    p_states,
    p_dstates,
    p_gates,
    p_dq,
    p_dk,
    p_dlog_decay,
    p_dbeta,
    scale,
    T,
    M,
    H,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Gradients of one chunk of one head, for one block of key columns.

    The gradients of decay and beta are partial: the caller adds them up over the blocks.
    """
    i_k = tl.program_id(0)
    i_m = tl.program_id(1)
    i_bh = tl.program_id(2).to(tl.int64)
    i_b = i_bh // H
    i_h = i_bh % H
    i_x = i_bh * M + i_m
    dtype = p_q.dtype.element_ty
    first = (i_b * T + i_m * C) * H + i_h
    p_q += first * K
    p_k += first * K
    p_do += first * V
    p_residual += first * V
    p_w += first * V
    p_states += i_x * K * V
    p_dstates += i_x * K * V
    o_c = tl.arange(0, C)
    o_k = i_k * BK + tl.arange(0, BK)
    mask_t = i_m * C + o_c < T
    mask_k = o_k < K
    o_token = o_c[:, None] * H
    o_key = o_token * K + o_k[None, :]
    mask_key = row_column_mask(mask_t, mask_k, K % BK == 0)

    o_r = o_c[:, None]
    o_s = o_c[None, :]

    # Two passes over V: all accumulators at once would not fit into the registers.
    b_dq = tl.zeros([C, BK], tl.float32)
    b_do_r = tl.zeros([C, C], tl.float32)
    b_r_do = tl.zeros([C, C], tl.float32)
    for i_v in tl.range(0, V, BV, num_stages=STAGES):
        o_v = i_v + tl.arange(0, BV)
        mask_v = o_v < V
        mask_value = row_column_mask(mask_t, mask_v, V % BV == 0)
        mask_state = row_column_mask(mask_k, mask_v, V % BV == 0)
        o_value = o_token * V + o_v[None, :]
        b_do = tl.load(p_do + o_value, mask=mask_value, other=0.0)
        b_r = tl.load(p_residual + o_value, mask=mask_value, other=0.0)
        b_state = tl.load(p_states + o_k[:, None] * V + o_v[None, :], mask=mask_state, other=0.0)
        b_dq = tl.dot(b_do, tl.trans(b_state), b_dq, input_precision=PRECISION)
        b_do_r = tl.dot(b_do, tl.trans(b_r), b_do_r, input_precision=PRECISION)
        b_r_do = tl.dot(b_r, tl.trans(b_do), b_r_do, input_precision=PRECISION)
    b_q = tl.load(p_q + o_key, mask=mask_key, other=0.0)
    b_k = tl.load(p_k + o_key, mask=mask_key, other=0.0)
    p_g = p_gates + i_x * 3 * C
    b_high, b_low, b_beta = load_gates(p_g, o_c, C)
    b_dq *= (scale * decay_between(b_high, b_low, 0.0, 0.0, PARTS))[:, None]
    b_dc = tl.sum(b_q.to(tl.float32) * b_dq, 1)
    b_do_r *= scale * masked_decay(b_high, b_low, o_r >= o_s, True, PARTS)
    b_dq = tl.dot((b_do_r * b_beta[None, :]).to(dtype), b_k, b_dq, input_precision=PRECISION)
    tl.store(p_dq + first * K + o_key, b_dq.to(dtype), mask=mask_key)
    # q.k and k.k of this block of columns only: what is made of them is linear in them.
    b_flow = b_do_r * tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
    b_dbeta = tl.sum(b_flow, 0)
    b_dc += tl.sum(b_flow * b_beta[None, :], 1)
    b_r_do *= scale * masked_decay(b_high, b_low, o_r <= o_s, False, PARTS)
    b_dk = tl.dot((b_r_do * b_beta[:, None]).to(dtype), b_q, input_precision=PRECISION)

    b_dk_read = tl.zeros([C, BK], tl.float32)
    b_dk_write = tl.zeros([C, BK], tl.float32)
    b_w_r = tl.zeros([C, C], tl.float32)
    b_r_w = tl.zeros([C, C], tl.float32)
    for i_v in tl.range(0, V, BV, num_stages=STAGES):
        o_v = i_v + tl.arange(0, BV)
        mask_v = o_v < V
        mask_value = row_column_mask(mask_t, mask_v, V % BV == 0)
        mask_state = row_column_mask(mask_k, mask_v, V % BV == 0)
        o_value = o_token * V + o_v[None, :]
        o_state = o_k[:, None] * V + o_v[None, :]
        b_w = tl.load(p_w + o_value, mask=mask_value, other=0.0)
        b_r = tl.load(p_residual + o_value, mask=mask_value, other=0.0)
        b_state = tl.load(p_states + o_state, mask=mask_state, other=0.0)
        b_dstate = tl.load(p_dstates + o_state, mask=mask_state, other=0.0)
        b_dk_read = tl.dot(b_w, tl.trans(b_state), b_dk_read, input_precision=PRECISION)
        b_dk_write = tl.dot(b_r, tl.trans(b_dstate), b_dk_write, input_precision=PRECISION)
        b_w_r = tl.dot(b_w, tl.trans(b_r), b_w_r, input_precision=PRECISION)
        b_r_w = tl.dot(b_r, tl.trans(b_w), b_r_w, input_precision=PRECISION)
    # Loaded again, and keys too, so that they do not occupy registers during the second pass.
    b_high, b_low, b_beta = load_gates(p_g, o_c, C)
    high_end = tl.load(p_g + C - 1)
    low_end = tl.load(p_g + 2 * C - 1)
    b_k = tl.load(p_k + o_key, mask=mask_key, other=0.0)
    b_wide = b_k.to(tl.float32)
    b_dk_read *= -decay_between(b_high, b_low, 0.0, 0.0, PARTS)[:, None]
    b_dc += tl.sum(b_wide * b_dk_read, 1)
    b_dk_write *= decay_between(high_end, low_end, b_high, b_low, PARTS)[:, None]
    b_along = tl.sum(b_wide * b_dk_write, 1)
    b_dbeta += b_along
    b_dk += b_dk_read + b_dk_write * b_beta[:, None]
    b_w_r *= -masked_decay(b_high, b_low, o_r > o_s, True, PARTS)
    b_r_w *= -masked_decay(b_high, b_low, o_r < o_s, False, PARTS)
    b_both = (b_w_r * b_beta[None, :] + b_r_w * b_beta[:, None]).to(dtype)
    b_dk = tl.dot(b_both, b_k, b_dk, input_precision=PRECISION)
    tl.store(p_dk + first * K + o_key, b_dk.to(dtype), mask=mask_key)

    b_flow = b_w_r * tl.dot(b_k, tl.trans(b_k), input_precision=PRECISION)
    b_dbeta += tl.sum(b_flow, 0)
    b_dc += tl.sum(b_flow * b_beta[None, :], 1)

    # Once more over the states, when the registers are free again.
    b_states = tl.zeros([BK], tl.float32)
    for i_v in range(0, V, BV):
        o_v = i_v + tl.arange(0, BV)
        mask_state = row_column_mask(mask_k, o_v < V, V % BV == 0)
        o_state = o_k[:, None] * V + o_v[None, :]
        b_state = tl.load(p_states + o_state, mask=mask_state, other=0.0).to(tl.float32)
        b_dstate = tl.load(p_dstates + o_state, mask=mask_state, other=0.0).to(tl.float32)
        b_states += tl.sum(b_state * b_dstate, 1)

    b_dc -= b_beta * b_dbeta
    b_end = decay_between(high_end, low_end, 0.0, 0.0, PARTS)
    dc_end = tl.sum(b_along * b_beta, 0) + b_end * tl.sum(b_states, 0)
    n = (tl.num_programs(2).to(tl.int64) // H) * T * H
    o_gate = i_k * n + first + o_c * H
    tl.store(p_dlog_decay + o_gate, tl.cumsum(b_dc, 0, reverse=True) + dc_end, mask=mask_t)
    tl.store(p_dbeta + o_gate, b_dbeta, mask=mask_t)


def walk_back(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    do_BTHV: Tensor,
    dprediction_BTHV: Tensor | None,
    dfinal_BHKV: Tensor | None,
    gates: Gates,
    scale: float,
    tile: Tile,
    *,
    initial: bool,
) -> WalkedBack:
    """Launch `reverse_walk_kernel`; all tensors contiguous.

    Args:
        q_BTHK: Queries of the forward.
        k_BTHK: Keys of the forward.
        do_BTHV: Gradient of the read-outs, in their dtype.
        dprediction_BTHV: Gradient of the predictions, float32. Default: zeros.
        dfinal_BHKV: Gradient of the final state, float32. Default: zeros.
        gates: From `invert_chunks`.
        scale: Multiplies the queries.
        tile: How to cut the work.
        initial: Write the gradient of the initial state.
    """
    batch, time, heads, key_size = q_BTHK.shape
    value_size = do_BTHV.shape[-1]
    chunks = triton.cdiv(time, CHUNK)
    w_BTHV = torch.empty_like(do_BTHV)
    dv_BTHV = w_BTHV if dprediction_BTHV is None else torch.empty_like(do_BTHV)
    state_shape = (batch * heads, chunks, key_size, value_size)
    dstates_XMKV = torch.empty(state_shape, dtype=do_BTHV.dtype, device=do_BTHV.device)
    dinitial_BHKV = None
    if initial:
        shape = (batch, heads, key_size, value_size)
        dinitial_BHKV = torch.empty(shape, dtype=torch.float32, device=do_BTHV.device)
    reverse_walk_kernel[(triton.cdiv(value_size, tile.block_v), batch * heads)](
        q_BTHK,
        k_BTHK,
        do_BTHV,
        dprediction_BTHV,
        gates.inverse_XMCC,
        gates.gates_XM3C,
        dfinal_BHKV,
        w_BTHV,
        dv_BTHV,
        dstates_XMKV,
        dinitial_BHKV,
        scale,
        time,
        chunks,
        heads,
        K=key_size,
        V=value_size,
        BK=padded(key_size),
        BV=tile.block_v,
        C=CHUNK,
        PARTS=decay_parts(q_BTHK.dtype),
        PRECISION=precision(q_BTHK.dtype),
        STAGES=tile.stages,
        num_warps=tile.warps,
    )
    return WalkedBack(w_BTHV, dv_BTHV, dstates_XMKV, dinitial_BHKV)


def gradients(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    do_BTHV: Tensor,
    residual_BTHV: Tensor,
    w_BTHV: Tensor,
    states_XMKV: Tensor,
    dstates_XMKV: Tensor,
    gates: Gates,
    scale: float,
    tile: Tile,
) -> Gradients:
    """Launch `gradient_kernel`; all tensors contiguous."""
    batch, time, heads, key_size = q_BTHK.shape
    value_size = do_BTHV.shape[-1]
    chunks = triton.cdiv(time, CHUNK)
    block_k = min(padded(key_size), 64)
    blocks = triton.cdiv(key_size, block_k)
    dq_BTHK, dk_BTHK = torch.empty_like(q_BTHK), torch.empty_like(k_BTHK)
    wide = {"dtype": torch.float32, "device": q_BTHK.device}
    dlog_decay_NBTH = torch.empty(blocks, batch, time, heads, **wide)
    dbeta_NBTH = torch.empty(blocks, batch, time, heads, **wide)
    gradient_kernel[(blocks, chunks, batch * heads)](
        q_BTHK,
        k_BTHK,
        do_BTHV,
        residual_BTHV,
        w_BTHV,
        states_XMKV,
        dstates_XMKV,
        gates.gates_XM3C,
        dq_BTHK,
        dk_BTHK,
        dlog_decay_NBTH,
        dbeta_NBTH,
        scale,
        time,
        chunks,
        heads,
        K=key_size,
        V=value_size,
        BK=block_k,
        BV=tile.block_v,
        C=CHUNK,
        PARTS=decay_parts(q_BTHK.dtype),
        PRECISION=precision(q_BTHK.dtype),
        STAGES=tile.stages,
        num_warps=tile.warps,
    )
    if blocks == 1:
        return Gradients(dq_BTHK, dk_BTHK, dlog_decay_NBTH[0], dbeta_NBTH[0])
    return Gradients(dq_BTHK, dk_BTHK, dlog_decay_NBTH.sum(0), dbeta_NBTH.sum(0))
