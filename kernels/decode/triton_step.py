"""Kernel 1: short convolution, gated delta rule, score, decision and append of one token.

One program per head and sequence holds the head's whole state. Letters of the kernels: `p_x`
pointer, `b_x` block in registers, `o_x` offsets, `i_x` index of the program.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rounded(b_x, like):
    """`b_x` as the dtype of `like` can hold it, in float32."""
    return b_x.to(like.dtype).to(tl.float32)


@triton.jit
def convolved(p_x, p_history, p_weight, o_c, mask, C: tl.constexpr, W: tl.constexpr):
    """Short convolution of the channels `o_c`, rounded once."""
    b_new = tl.load(p_x + o_c, mask=mask, other=0.0)
    b_weight = tl.load(p_weight + (W - 1) * C + o_c, mask=mask, other=0.0)
    b_sum = b_new.to(tl.float32) * rounded(b_weight, b_new)
    for i_w in tl.static_range(W - 1):
        b_old = tl.load(p_history + i_w * C + o_c, mask=mask, other=0.0)
        b_weight = tl.load(p_weight + i_w * C + o_c, mask=mask, other=0.0)
        b_sum += rounded(b_old, b_new) * rounded(b_weight, b_new)
    return rounded(b_sum, b_new)


@triton.jit
def shift_history(p_x, p_history, o_c, mask, C: tl.constexpr, W: tl.constexpr):
    """Drop the oldest input of the channels `o_c` and add the newest."""
    for i_w in tl.static_range(W - 2):
        b_next = tl.load(p_history + (i_w + 1) * C + o_c, mask=mask, other=0.0)
        tl.store(p_history + i_w * C + o_c, b_next, mask=mask)
    if W > 1:
        b_new = tl.load(p_x + o_c, mask=mask, other=0.0)
        tl.store(p_history + (W - 2) * C + o_c, b_new.to(p_history.dtype.element_ty), mask=mask)


@triton.jit
def silu(b_x, like):
    """SiLU, rounded."""
    return rounded(b_x * tl.sigmoid(b_x), like)


@triton.jit
def sums_of_two(b_a, b_b):
    """Sums over the first axis of two blocks, which wait for each other's warps only once."""
    return tl.split(tl.sum(tl.join(b_a, b_b), 0))


@triton.jit
def sums_of_four(b_a, b_b, b_c, b_d):
    """Sums of four vectors, which wait for each other's warps only once."""
    b_ab, b_cd = tl.split(tl.sum(tl.join(tl.join(b_a, b_b), tl.join(b_c, b_d)), 0))
    sum_a, sum_b = tl.split(b_ab)
    sum_c, sum_d = tl.split(b_cd)
    return sum_a, sum_b, sum_c, sum_d


@triton.jit
def unit(b_x, squares, like, EPSILON: tl.constexpr):
    """A vector whose squares sum to `squares` scaled to length one, rounded."""
    return rounded(b_x / tl.maximum(tl.sqrt(squares), EPSILON), like)


@triton.jit
def rms_scale(squares, SIZE: tl.constexpr, EPSILON: tl.constexpr):
    """What RMSNorm multiplies SIZE numbers by whose squares sum to `squares`."""
    return tl.rsqrt(squares / SIZE + EPSILON)


@triton.jit
def softplus(x):
    """log(1 + exp(x)) to float32 precision: log alone would lose exp(x) beside 1.

    With w = 1 + z rounded, log(w) z / (w - 1) has the error of w cancelled (Higham 2002, 1.14.1).
    """
    z = tl.exp(-tl.abs(x))
    w = 1.0 + z
    log_w = tl.where(w == 1.0, z, tl.log(w) * (z / tl.where(w == 1.0, 1.0, w - 1.0)))
    return tl.maximum(x, 0.0) + log_w


@triton.jit
def gates_of(p_raw, p_log_rate, p_step_bias, i_b, i_h, H: tl.constexpr):
    """Decay a and write strength b of one head."""
    raw = tl.load(p_raw + i_b * 2 * H + i_h).to(tl.float32)
    write = tl.load(p_raw + i_b * 2 * H + H + i_h).to(tl.float32)
    rate = tl.exp(tl.load(p_log_rate + i_h))
    decay = tl.exp(-rate * softplus(raw + tl.load(p_step_bias + i_h)))
    return decay, tl.sigmoid(write)


@triton.jit
def delta_rule(b_state, b_q, b_k, b_v, decay, beta):
    """New state, read-out and prediction; `b_state` is [BK, BV].

    The read-out of the new state is that of the old one plus (k . q) u, so both reads of the old
    state are summed over the warps at once.
    """
    b_p, b_read = sums_of_two(b_state * b_k[:, None], b_state * b_q[:, None])
    b_p *= decay
    b_u = beta * (b_v - b_p)
    b_new = decay * b_state + b_k[:, None] * b_u[None, :]
    return b_new, decay * b_read + tl.sum(b_k * b_q) * b_u, b_p


@triton.jit
def attention_vector(
    p_x,
    p_history,
    p_weight,
    p_gain,
    p_cos,
    p_sin,
    position,
    b_x,
    scale,
    first,
    o_k,
    C: tl.constexpr,
    W: tl.constexpr,
    K: tl.constexpr,
):
    """Query or key of the attention: `b_x` normed by a factor, and rotated.

    `first` is the first channel. A rotation needs the number half a head away, which is convolved a
    second time rather than moved between threads.
    """
    mask = o_k < K
    b_new = tl.load(p_x + first + o_k, mask=mask, other=0.0)
    b_gain = rounded(tl.load(p_gain + o_k, mask=mask, other=0.0), b_new)
    b_normed = rounded(b_x * scale * b_gain, b_new)
    if p_cos is not None:
        o_other = tl.where(o_k < K // 2, o_k + K // 2, o_k - K // 2)
        b_other = convolved(p_x, p_history, p_weight, first + o_other, mask, C, W)
        b_gain = rounded(tl.load(p_gain + o_other, mask=mask, other=0.0), b_new)
        b_other = rounded(b_other * scale * b_gain, b_new)
        o_angle = position * (K // 2) + tl.where(o_k < K // 2, o_k, o_k - K // 2)
        b_cos = tl.load(p_cos + o_angle, mask=mask, other=0.0)
        b_sin = tl.load(p_sin + o_angle, mask=mask, other=0.0)
        b_sin = tl.where(o_k < K // 2, -b_sin, b_sin)
        b_normed = b_normed * b_cos + b_other * b_sin
    return b_normed


@triton.jit
def head_score(b_p, b_v, beta, SCORE: tl.constexpr, P_FLOOR: tl.constexpr, V_FLOOR: tl.constexpr):
    """Routing score of a head, as `ham.routing` defines it."""
    b_error = b_v - b_p
    pp, vv, pv, ee = sums_of_four(b_p * b_p, b_v * b_v, b_p * b_v, b_error * b_error)
    v_norm, error = tl.sqrt(vv), tl.sqrt(ee)
    if SCORE == "cosine":
        p_norm = tl.maximum(tl.sqrt(pp), P_FLOOR * v_norm)
        lengths = tl.maximum(p_norm * tl.maximum(v_norm, V_FLOOR), V_FLOOR * V_FLOOR)
        score = 1.0 - pv / lengths
    elif SCORE == "l2":
        score = error / (v_norm + V_FLOOR)
    elif SCORE == "committed":
        score = beta * error
    else:
        score = (1.0 - beta) * error
    return score


@triton.jit
def agreed(b_score, mask, H: tl.constexpr, REDUCTION: tl.constexpr):
    """One score of all heads; NaN if any is, which minimum and maximum alone would pass over."""
    if REDUCTION == "min":
        score = tl.min(tl.where(mask, b_score, float("inf")))
    elif REDUCTION == "max":
        score = tl.max(tl.where(mask, b_score, float("-inf")))
    else:
        score = tl.sum(tl.where(mask, b_score, 0.0)) / H
    broken = tl.sum(((b_score != b_score) & mask).to(tl.int32))
    return tl.where(broken > 0, float("nan"), score)


@triton.jit
def decide(
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
    PAGE: tl.constexpr,
    POSITION_OFFSET: tl.constexpr,
):
    """Let the token that stands in slot `count` into the cache of a row, or not; report both."""
    reaches = score >= tl.load(p_threshold)
    enters = reaches & (page > 0)
    if enters:
        p_position = (page + POSITION_OFFSET).to(tl.pointer_type(tl.int32)) + count % PAGE
        tl.store(p_position, position.to(tl.int32))
        tl.store(p_counts + row, count + 1)
    tl.store(p_score + row, score)
    tl.store(p_routed + row, enters.to(tl.int8))
    if score != score:
        tl.atomic_add(p_faults, 1, sem="relaxed")
    if reaches & (page <= 0):
        tl.atomic_add(p_faults + 1, 1, sem="relaxed")


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
