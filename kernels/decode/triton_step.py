"""Kernel 1: short convolution, gated delta rule, score, decision and append of one token.

One program per head and sequence holds the head's whole state. Letters of the kernels: `p_x`
pointer, `b_x` block in registers, `o_x` offsets, `i_x` index of the program.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ham.kernels.decode.triton_token import (
    agreed,
    attention_vector,
    convolved,
    decide,
    delta_rule,
    gates_of,
    head_score,
    rms_scale,
    rounded,
    shift_history,
    silu,
    sums_of_four,
    sums_of_two,
    unit,
)


@triton.jit
def recurrent_kernel(
    p_qkv,
    p_raw,
    p_weight,
    p_history,
    p_state,
    p_log_rate,
    p_step_bias,
    p_o,
    p_active,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    W: tl.constexpr,
    EPSILON: tl.constexpr,
):
    """Convolution and gated delta rule of one head: the layer without a cache."""
    i_b = (tl.program_id(0) // H).to(tl.int64)
    i_h = tl.program_id(0) % H
    if p_active is not None:
        idle = tl.load(p_active + i_b) == 0
        if idle:
            return
    C: tl.constexpr = H * (2 * K + V)
    o_k = tl.arange(0, BK)
    o_v = tl.arange(0, BV)
    mask_k, mask_v = o_k < K, o_v < V
    p_state += (i_b * H + i_h) * K * V + o_k[:, None] * V + o_v[None, :]
    mask_state = mask_k[:, None] & mask_v[None, :]
    b_state = tl.load(p_state, mask=mask_state, other=0.0)
    p_qkv += i_b * C
    p_history += i_b * (W - 1) * C
    c_q, c_k, c_v = i_h * K, (H + i_h) * K, 2 * H * K + i_h * V
    like = tl.load(p_qkv)
    b_q = convolved(p_qkv, p_history, p_weight, c_q + o_k, mask_k, C, W)
    b_k = convolved(p_qkv, p_history, p_weight, c_k + o_k, mask_k, C, W)
    b_v = silu(convolved(p_qkv, p_history, p_weight, c_v + o_v, mask_v, C, W), like)
    decay, beta = gates_of(p_raw, p_log_rate, p_step_bias, i_b, i_h, H)
    b_q, b_k = silu(b_q, like), silu(b_k, like)
    qq, kk = sums_of_two(b_q * b_q, b_k * b_k)
    b_q = unit(b_q, qq, like, EPSILON) * (K**-0.5)
    b_k = unit(b_k, kk, like, EPSILON)
    b_state, b_o, _ = delta_rule(b_state, b_q, b_k, b_v, decay, beta)
    # Several threads may have read what only one of them overwrites.
    tl.debug_barrier()
    tl.store(p_state, b_state, mask=mask_state)
    shift_history(p_qkv, p_history, c_q + o_k, mask_k, C, W)
    shift_history(p_qkv, p_history, c_k + o_k, mask_k, C, W)
    shift_history(p_qkv, p_history, c_v + o_v, mask_v, C, W)
    p_o += (i_b * H + i_h) * V + o_v
    tl.store(p_o, b_o.to(p_o.dtype.element_ty), mask=mask_v)


@triton.jit(do_not_specialize=["P"])
def step_kernel(
    p_qkv,
    p_raw,
    p_weight,
    p_history,
    p_state,
    p_log_rate,
    p_step_bias,
    p_q_gain,
    p_k_gain,
    p_cos,
    p_sin,
    p_positions,
    p_active,
    p_table,
    p_counts,
    p_threshold,
    p_given,
    p_o,
    p_q,
    p_head_scores,
    p_score,
    p_routed,
    p_arrivals,
    p_faults,
    P,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BH: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    W: tl.constexpr,
    PAGE: tl.constexpr,
    ELEMENT: tl.constexpr,
    KEY_OFFSET: tl.constexpr,
    VALUE_OFFSET: tl.constexpr,
    POSITION_OFFSET: tl.constexpr,
    SCORE: tl.constexpr,
    REDUCTION: tl.constexpr,
    P_FLOOR: tl.constexpr,
    V_FLOOR: tl.constexpr,
    EPSILON: tl.constexpr,
):
    """One token of one head of the HAM layer, up to the attention."""
    i_b = (tl.program_id(0) // H).to(tl.int64)
    i_h = tl.program_id(0) % H
    if p_active is not None:
        idle = tl.load(p_active + i_b) == 0
        if idle:
            return
    C: tl.constexpr = H * (2 * K + V)
    PER_HEAD: tl.constexpr = REDUCTION == "per_head"
    o_k = tl.arange(0, BK)
    o_v = tl.arange(0, BV)
    mask_k, mask_v = o_k < K, o_v < V
    p_state += (i_b * H + i_h) * K * V + o_k[:, None] * V + o_v[None, :]
    mask_state = mask_k[:, None] & mask_v[None, :]
    b_state = tl.load(p_state, mask=mask_state, other=0.0)
    row = i_b * H + i_h if PER_HEAD else i_b
    i_g = 0 if PER_HEAD else i_h
    # Every head reads the count before it arrives, and it changes only after all have arrived.
    count = tl.load(p_counts + row)
    position = tl.load(p_positions + i_b)
    page = tl.load(p_table + row * P + count // PAGE, mask=count < P * PAGE, other=0)

    p_qkv += i_b * C
    p_history += i_b * (W - 1) * C
    c_q, c_k, c_v = i_h * K, (H + i_h) * K, 2 * H * K + i_h * V
    like = tl.load(p_qkv)
    b_q = convolved(p_qkv, p_history, p_weight, c_q + o_k, mask_k, C, W)
    b_k = convolved(p_qkv, p_history, p_weight, c_k + o_k, mask_k, C, W)
    b_v = silu(convolved(p_qkv, p_history, p_weight, c_v + o_v, mask_v, C, W), like)
    silu_q, silu_k = silu(b_q, like), silu(b_k, like)
    qq, kk, silu_qq, silu_kk = sums_of_four(b_q * b_q, b_k * b_k, silu_q * silu_q, silu_k * silu_k)
    b_attention_q = attention_vector(
        p_qkv,
        p_history,
        p_weight,
        p_q_gain,
        p_cos,
        p_sin,
        position,
        b_q,
        rms_scale(qq, K, EPSILON),
        c_q,
        o_k,
        C,
        W,
        K,
    )
    b_attention_k = attention_vector(
        p_qkv,
        p_history,
        p_weight,
        p_k_gain,
        p_cos,
        p_sin,
        position,
        b_k,
        rms_scale(kk, K, EPSILON),
        c_k,
        o_k,
        C,
        W,
        K,
    )
    decay, beta = gates_of(p_raw, p_log_rate, p_step_bias, i_b, i_h, H)
    b_q = unit(silu_q, silu_qq, like, EPSILON) * (K**-0.5)
    b_k = unit(silu_k, silu_kk, like, EPSILON)
    b_state, b_o, b_p = delta_rule(b_state, b_q, b_k, b_v, decay, beta)
    if SCORE != "given":
        score = head_score(b_p, b_v, beta, SCORE, P_FLOOR, V_FLOOR)

    # Several threads may have read what only one of them overwrites.
    tl.debug_barrier()
    tl.store(p_state, b_state, mask=mask_state)
    shift_history(p_qkv, p_history, c_q + o_k, mask_k, C, W)
    shift_history(p_qkv, p_history, c_k + o_k, mask_k, C, W)
    shift_history(p_qkv, p_history, c_v + o_v, mask_v, C, W)
    i_bh = i_b * H + i_h
    tl.store(p_o + i_bh * V + o_v, b_o.to(p_o.dtype.element_ty), mask=mask_v)
    tl.store(p_q + i_bh * K + o_k, b_attention_q.to(p_q.dtype.element_ty), mask=mask_k)
    # The token goes into the next free slot before anyone knows whether it is routed: slots at and
    # beyond the count are never read, and the next token overwrites this one if it was not.
    slot = i_g * PAGE + count % PAGE
    page = tl.multiple_of(page, 16)
    p_key = (page + KEY_OFFSET).to(tl.pointer_type(ELEMENT)) + slot * K + o_k
    tl.store(p_key, rounded(b_attention_k, like).to(ELEMENT), mask=mask_k & (page > 0))
    p_value = (page + VALUE_OFFSET).to(tl.pointer_type(ELEMENT)) + slot * V + o_v
    tl.store(p_value, b_v.to(ELEMENT), mask=mask_v & (page > 0))

    if PER_HEAD:
        if SCORE == "given":
            score = tl.load(p_given + row)
        decide(
            p_counts,
            p_threshold,
            p_score,
            p_routed,
            p_faults,
            row,
            score,
            count,
            page,
            position,
            PAGE,
            POSITION_OFFSET,
        )
    else:
        if SCORE != "given":
            tl.store(p_head_scores + i_bh, score)
        # All threads have stored before one of them announces it (barrier, then release); the last
        # head to arrive sees the scores and has every count read behind it (acquire, then barrier).
        tl.debug_barrier()
        before = tl.atomic_add(p_arrivals + i_b, 1, sem="acq_rel", scope="gpu")
        if before == H - 1:
            tl.debug_barrier()
            if SCORE == "given":
                score = tl.load(p_given + i_b)
            else:
                o_h = tl.arange(0, BH)
                # Past the first-level cache, which is not coherent between multiprocessors.
                b_score = tl.load(
                    p_head_scores + i_b * H + o_h, mask=o_h < H, other=0.0, cache_modifier=".cg"
                )
                score = agreed(b_score, o_h < H, H, REDUCTION)
            decide(
                p_counts,
                p_threshold,
                p_score,
                p_routed,
                p_faults,
                row,
                score,
                count,
                page,
                position,
                PAGE,
                POSITION_OFFSET,
            )
            tl.store(p_arrivals + i_b, 0)
