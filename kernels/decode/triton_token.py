"""What one head does with one token: convolution, norms, delta rule, score, decision.

Device functions of the decoding kernels. Letters as in `triton_step.py`.
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
