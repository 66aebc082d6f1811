"""Kernels of launch 5 of the Triton gated delta rule; `triton_gradients.py` launches them.

Letters of the kernels as in `triton_inverse.py`; the derivation stands in the README beside this
file.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ham.kernels.gated_delta_rule.triton_forward import (
    decay_between,
    load_gates,
    masked_decay,
    row_column_mask,
)
from ham.kernels.gated_delta_rule.triton_sequences import chunk_of


@triton.jit
def split_diagonal(b_flow, o_r, o_s, PARTS: tl.constexpr):
    """Diagonal and rest of what flows between tokens; 0 and all of it for bfloat16.

    The gradient of the decay does not depend on the diagonal. At log decays of -20 it is 1e-9 of
    the terms that would have to cancel. For bfloat16 that precision costs a fifth more instructions
    and is not worth them.
    """
    b_own = tl.zeros([b_flow.shape[0]], tl.float32)
    if PARTS == 2:
        b_own += tl.sum(tl.where(o_r == o_s, b_flow, 0.0), 1)
        b_flow = tl.where(o_r > o_s, b_flow, 0.0)
    return b_own, b_flow


@triton.jit
def decay_gradient(b_dc, b_written, passed, o_r, o_s, PARTS: tl.constexpr):
    """Gradient of log decays: of what is read from a token on, written before it, and passed."""
    if PARTS == 2:
        b_passed = passed + tl.sum(tl.where(o_s < o_r, b_written[None, :], 0.0), 1)
    else:
        b_dc -= b_written
        # As a row: Triton 3.6 cannot place the sum of a vector of sums of products for Blackwell.
        b_passed = passed + tl.sum(b_written[None, :], 1)
    return tl.cumsum(b_dc, 0, reverse=True) + b_passed


@triton.jit(do_not_specialize=["T", "M", "R", "H", "G"])
def gradient_kernel(
    p_q,
    p_k,
    p_do,
    p_residual,
    p_w,
    p_states,
    p_dstates,
    p_gates,
    p_first,
    p_left,
    p_dq,
    p_dk,
    p_dlog_decay,
    p_dbeta,
    scale,
    T,
    M,
    R,
    H,
    G,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Gradients of one chunk of one value head, for one block of key columns, any V.

    The gradients of decay and beta are partial: the caller adds them up over the blocks.
    """
    i_k = tl.program_id(0)
    i_m = tl.program_id(1)
    i_bh = tl.program_id(2).to(tl.int64)
    i_h, token, left = chunk_of(i_m, i_bh, p_first, p_left, T, H, C)
    i_x = i_bh * M + i_m
    dtype = p_q.dtype.element_ty
    first = token * H + i_h
    first_key = token * G + i_h // (H // G)
    p_q += first_key * K
    p_k += first_key * K
    p_do += first * V
    p_residual += first * V
    p_w += first * V
    p_states += i_x * K * V
    p_dstates += i_x * K * V
    o_c = tl.arange(0, C)
    o_k = i_k * BK + tl.arange(0, BK)
    mask_t = o_c < left
    mask_k = o_k < K
    o_token = o_c[:, None] * H
    o_key = o_c[:, None] * (G * K) + o_k[None, :]
    o_made = o_token * K + o_k[None, :]
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
    tl.store(p_dq + first * K + o_made, b_dq.to(dtype), mask=mask_key)
    # q.k and k.k of this block of columns only: what is made of them is linear in them.
    b_flow = b_do_r * tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
    b_own, b_flow = split_diagonal(b_flow, o_r, o_s, PARTS)
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
    b_dk += b_dk_read + b_dk_write * b_beta[:, None]
    b_w_r *= -masked_decay(b_high, b_low, o_r > o_s, True, PARTS)
    b_r_w *= -masked_decay(b_high, b_low, o_r < o_s, False, PARTS)
    b_both = (b_w_r * b_beta[None, :] + b_r_w * b_beta[:, None]).to(dtype)
    b_dk = tl.dot(b_both, b_k, b_dk, input_precision=PRECISION)
    tl.store(p_dk + first * K + o_made, b_dk.to(dtype), mask=mask_key)

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
    passed = b_end * tl.sum(b_states, 0)
    o_gate = i_k * R.to(tl.int64) * H + first + o_c * H

    b_made = decay_gradient(b_dc, b_along * b_beta, passed, o_r, o_s, PARTS)
    tl.store(p_dlog_decay + o_gate, b_made, mask=mask_t)
    tl.store(p_dbeta + o_gate, b_dbeta + b_own + b_along, mask=mask_t)


@triton.jit
def _touch(states, b_tile, chunks):
    """`states`, after a use of the tile that never happens, as `chunks` is positive.

    Triton buffers twice what products alone read, but once what anything else reads. Buffered once,
    the tiles of K = V = 128 take 106 KiB instead of 154, and two programs share a multiprocessor.
    """
    if chunks < 0:
        states += tl.max(tl.max(b_tile, 1), 0).to(tl.float32)
    return states


@triton.jit(do_not_specialize=["T", "M", "R", "H", "G", "chunks"])
def resident_gradient_kernel(
    p_q,
    p_k,
    p_do,
    p_residual,
    p_w,
    p_states,
    p_dstates,
    p_gates,
    p_first,
    p_left,
    p_dq,
    p_dk,
    p_dlog_decay,
    p_dbeta,
    scale,
    T,
    M,
    R,
    H,
    G,
    chunks,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """As `gradient_kernel`, with all V columns at once: each tile is loaded once per program.

    A program takes some chunks in a row and fetches the next while it works on one.
    """
    i_k = tl.program_id(0)
    i_first = tl.program_id(1) * chunks
    i_bh = tl.program_id(2).to(tl.int64)
    i_h = i_bh % H
    i_g = i_h // (H // G)
    dtype = p_q.dtype.element_ty
    o_c = tl.arange(0, C)
    o_k = i_k * BK + tl.arange(0, BK)
    o_v = tl.arange(0, BV)
    mask_k = o_k < K
    mask_v = o_v < V
    mask_state = row_column_mask(mask_k, mask_v, V == BV)
    o_state = o_k[:, None] * V + o_v[None, :]
    o_key = o_c[:, None] * (G * K) + o_k[None, :]
    o_value = o_c[:, None] * (H * V) + o_v[None, :]
    o_made = o_c[:, None] * (H * K) + o_k[None, :]
    o_r = o_c[:, None]
    o_s = o_c[None, :]
    if DESCRIPTORS:
        q_RK = tl.make_tensor_descriptor(p_q + i_g * K, [R, K], [G * K, 1], [C, BK])
        k_RK = tl.make_tensor_descriptor(p_k + i_g * K, [R, K], [G * K, 1], [C, BK])
        do_RV = tl.make_tensor_descriptor(p_do + i_h * V, [R, V], [H * V, 1], [C, BV])
        r_RV = tl.make_tensor_descriptor(p_residual + i_h * V, [R, V], [H * V, 1], [C, BV])
        w_RV = tl.make_tensor_descriptor(p_w + i_h * V, [R, V], [H * V, 1], [C, BV])
        first_state = i_bh * M * K * V
        s_MV = tl.make_tensor_descriptor(p_states + first_state, [M * K, V], [V, 1], [BK, BV])
        ds_MV = tl.make_tensor_descriptor(p_dstates + first_state, [M * K, V], [V, 1], [BK, BV])

    for i_m in tl.range(i_first, tl.minimum(i_first + chunks, M), num_stages=STAGES):
        _, token, left = chunk_of(i_m, i_bh, p_first, p_left, T, H, C)
        # Rows from `left` on are zero or belong to another sequence: every sum leaves them out.
        mask_t = o_c < left
        mask_key = row_column_mask(mask_t, mask_k, K % BK == 0)
        if DESCRIPTORS:
            i_row = token.to(tl.int32)
            b_state = s_MV.load([i_m * K + i_k * BK, 0])
            b_dstate = ds_MV.load([i_m * K + i_k * BK, 0])
            states = tl.sum(tl.sum(b_state.to(tl.float32) * b_dstate.to(tl.float32), 1), 0)
            b_do = do_RV.load([i_row, 0])
            states = _touch(states, b_do, chunks)
            b_r = r_RV.load([i_row, 0])
            states = _touch(states, b_r, chunks)
            b_w = w_RV.load([i_row, 0])
            states = _touch(states, b_w, chunks)
            b_q = q_RK.load([i_row, i_k * BK])
            b_k = k_RK.load([i_row, i_k * BK])
        else:
            mask_value = row_column_mask(mask_t, mask_v, V == BV)
            first_value = (token * H + i_h) * V
            first_key = (token * G + i_g) * K
            first_state = (i_bh * M + i_m) * K * V
            b_do = tl.load(p_do + first_value + o_value, mask=mask_value, other=0.0)
            b_r = tl.load(p_residual + first_value + o_value, mask=mask_value, other=0.0)
            b_state = tl.load(p_states + first_state + o_state, mask=mask_state, other=0.0)
            b_q = tl.load(p_q + first_key + o_key, mask=mask_key, other=0.0)
            b_k = tl.load(p_k + first_key + o_key, mask=mask_key, other=0.0)
            b_w = tl.load(p_w + first_value + o_value, mask=mask_value, other=0.0)
            b_dstate = tl.load(p_dstates + first_state + o_state, mask=mask_state, other=0.0)
            states = tl.sum(tl.sum(b_state.to(tl.float32) * b_dstate.to(tl.float32), 1), 0)
            states = _touch(states, b_do, chunks)
            states = _touch(states, b_r, chunks)
            states = _touch(states, b_w, chunks)
        p_g = p_gates + (i_bh * M + i_m) * 3 * C
        b_high, b_low, b_beta = load_gates(p_g, o_c, C)
        high_end = tl.load(p_g + C - 1)
        low_end = tl.load(p_g + 2 * C - 1)
        b_from_start = decay_between(b_high, b_low, 0.0, 0.0, PARTS)
        exists_r = o_r < left
        exists_s = o_s < left
        b_dq = tl.dot(b_do, tl.trans(b_state), input_precision=PRECISION)
        b_dq *= (scale * b_from_start)[:, None]
        b_dc = tl.sum(b_q.to(tl.float32) * b_dq, 1)
        b_f = tl.dot(b_do, tl.trans(b_r), input_precision=PRECISION)
        b_f *= scale * masked_decay(b_high, b_low, (o_r >= o_s) & exists_r, True, PARTS)
        b_dq = tl.dot((b_f * b_beta[None, :]).to(dtype), b_k, b_dq, input_precision=PRECISION)
        first_made = (token * H + i_h) * K
        tl.store(p_dq + first_made + o_made, b_dq.to(dtype), mask=mask_key)
        b_flow = b_f * tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)

        # Loaded anew, so that no difference of decays occupies registers from one use to the next.
        b_high, b_low, b_beta = load_gates(p_g, o_c, C)
        b_g = tl.dot(b_w, tl.trans(b_r), input_precision=PRECISION)
        b_g *= -masked_decay(b_high, b_low, (o_r > o_s) & exists_r, True, PARTS)
        b_flow += b_g * tl.dot(b_k, tl.trans(b_k), input_precision=PRECISION)
        b_own, b_flow = split_diagonal(b_flow, o_r, o_s, PARTS)
        b_dbeta = tl.sum(b_flow, 0)
        b_dc += tl.sum(b_flow * b_beta[None, :], 1)
        b_both = tl.dot(b_r, tl.trans(b_w), input_precision=PRECISION) * b_beta[:, None]
        b_both *= -masked_decay(b_high, b_low, (o_r < o_s) & exists_s, False, PARTS)
        b_both += b_g * b_beta[None, :]
        b_dk = tl.dot(b_both.to(dtype), b_k, input_precision=PRECISION)
        b_f = tl.dot(b_r, tl.trans(b_do), input_precision=PRECISION)
        b_f *= scale * masked_decay(b_high, b_low, (o_r <= o_s) & exists_s, False, PARTS)
        b_dk = tl.dot((b_f * b_beta[:, None]).to(dtype), b_q, b_dk, input_precision=PRECISION)

        b_wide = b_k.to(tl.float32)
        b_part = tl.dot(b_w, tl.trans(b_state), input_precision=PRECISION)
        b_part *= -decay_between(b_high, b_low, 0.0, 0.0, PARTS)[:, None]
        b_dc += tl.sum(b_wide * b_part, 1)
        b_dk += b_part
        b_part = tl.dot(b_r, tl.trans(b_dstate), input_precision=PRECISION)
        b_part *= decay_between(high_end, low_end, b_high, b_low, PARTS)[:, None]
        b_along = tl.sum(b_wide * b_part, 1)
        b_dk += b_part * b_beta[:, None]
        tl.store(p_dk + first_made + o_made, b_dk.to(dtype), mask=mask_key)

        b_dc = tl.where(mask_t, b_dc - b_beta * b_dbeta, 0.0)
        passed = decay_between(high_end, low_end, 0.0, 0.0, PARTS) * states
        b_along = tl.where(mask_t, b_along, 0.0)
        o_gate = i_k * R.to(tl.int64) * H + token * H + i_h + o_c * H

        b_made = decay_gradient(b_dc, b_along * b_beta, passed, o_r, o_s, PARTS)
        tl.store(p_dlog_decay + o_gate, b_made, mask=mask_t)
        tl.store(p_dbeta + o_gate, b_dbeta + b_own + b_along, mask=mask_t)
