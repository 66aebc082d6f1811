"""Launches 5 and 6 of Triton routed attention: gradients of keys, values and routing scores.

One program owns a block of keys and walks the queries that see them, so no gradient is added to by
two programs. With a window, launch 5 writes what every token gets through it and launch 6 adds to
the rows of routed tokens; without, the tensors start as zeros. Letters as in `triton_forward.py`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ham.kernels.routed_attention.triton_forward import (
    LOG2_E,
    in_window,
    load_packed,
    load_tokens,
)
from ham.kernels.routed_attention.triton_pack import Index
from ham.kernels.routed_attention.triton_tiles import (
    PACK_ROWS,
    Tile,
    lines,
    packed_blocks,
    padded,
    precision,
    token_rows,
    use_descriptors,
)
from ham.kernels.triton_launch import launch


class KeyGradient(NamedTuple):
    """What the launches write.

    Attributes:
        dk_BTGK: In the dtype of the keys; 0 for tokens that no query sees.
        dv_BTGV: In the dtype of the values.
        dscore_BT: Float32; None if not asked for.
    """

    dk_BTGK: Tensor
    dv_BTGV: Tensor
    dscore_BT: Tensor | None


@triton.jit
def load_line(x, line, i_t, BQ: tl.constexpr, DESC: tl.constexpr):
    """BQ numbers from `i_t` on, a multiple of BQ, of the line that starts at `line`."""
    if DESC:
        b_x = x.load([line + i_t])
    else:
        o_q = tl.arange(0, BQ)
        b_x = tl.load(x + line.to(tl.int64) + i_t + o_q)
    return b_x


@triton.jit
def key_gradient_step(
    q,
    do,
    lse,
    delta,
    i_b,
    i_t,
    i_h,
    b_k,
    b_v,
    b_dk,
    b_dv,
    mask,
    scale_log2,
    T,
    N,
    H,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    BQ: tl.constexpr,
    MASKED: tl.constexpr,
    DESC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add what BQ queries give to the gradients of a block of keys (without scale) and values.

    Scores are computed with keys as rows: the transpose of a product must not become an operand.
    i_t is a multiple of BQ. Queries beyond the sequence have no weight, because their lse is +inf.
    """
    b_q = load_tokens(q, i_b, i_t, i_h, T, H, K, BQ, BK, DESC)
    b_lse = load_line(lse, (i_b * H + i_h) * N, i_t, BQ, DESC)
    b_score = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)
    b_weight = tl.exp2(b_score * scale_log2 - b_lse[None, :])
    if MASKED:
        b_weight = tl.where(mask, b_weight, 0.0)
    b_do = load_tokens(do, i_b, i_t, i_h, T, H, V, BQ, BV, DESC)
    b_dv = tl.dot(b_weight.to(b_do.dtype), b_do, b_dv, input_precision=PRECISION)
    b_delta = load_line(delta, (i_b * H + i_h) * N, i_t, BQ, DESC)
    b_dweight = tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION)
    b_dscore = b_weight * (b_dweight - b_delta[None, :])
    b_dk = tl.dot(b_dscore.to(b_q.dtype), b_q, b_dk, input_precision=PRECISION)
    return b_dk, b_dv


@triton.jit(do_not_specialize=["T", "N", "H", "G", "window"])
def window_gradient_kernel(
    q,
    do,
    k,
    v,
    lse,
    delta,
    p_dk,
    p_dv,
    scale,
    T,
    N,
    H,
    G,
    window,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    BQ: tl.constexpr,
    BN: tl.constexpr,
    DESC: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """What BN tokens of one head get through the window; writes every token."""
    i_b = tl.program_id(0) // G
    i_g = tl.program_id(0) % G
    first = tl.program_id(1) * BN
    scale_log2 = scale * LOG2_E
    o_n = first + tl.arange(0, BN)
    b_k = load_tokens(k, i_b, first, i_g, T, G, K, BN, BK, DESC)
    b_v = load_tokens(v, i_b, first, i_g, T, G, V, BN, BV, DESC)
    b_dk = tl.zeros([BN, BK], tl.float32)
    b_dv = tl.zeros([BN, BV], tl.float32)
    N = N // ROWS * ROWS  # Tells the compiler that lines are aligned.
    end = tl.minimum(first + BN - 1 + window, T)
    for i_h in range(i_g * (H // G), (i_g + 1) * (H // G)):
        for i_t in tl.range(first // BQ * BQ, end, BQ, num_stages=STAGES):
            mask = in_window(i_t + tl.arange(0, BQ)[None, :], o_n[:, None], window)
            b_dk, b_dv = key_gradient_step(
                q, do, lse, delta, i_b, i_t, i_h, b_k, b_v, b_dk, b_dv, mask,
                scale_log2, T, N, H, K, V, BK, BV, BQ, True, DESC, PRECISION,
            )  # fmt: skip
    mask_n = (o_n < T)[:, None]
    o_row = (i_b.to(tl.int64) * T + o_n[:, None]) * G + i_g
    o_k = tl.arange(0, BK)[None, :]
    o_v = tl.arange(0, BV)[None, :]
    b_dk = (b_dk * scale).to(p_dk.dtype.element_ty)
    tl.store(p_dk + o_row * K + o_k, b_dk, mask=mask_n & (o_k < K))
    tl.store(p_dv + o_row * V + o_v, b_dv.to(p_dv.dtype.element_ty), mask=mask_n & (o_v < V))


@triton.jit(do_not_specialize=["T", "N", "H", "G", "window"])
def key_gradient_kernel(
    q,
    do,
    packed_k,
    packed_v,
    p_positions,
    p_counts,
    lse,
    delta,
    p_dk,
    p_dv,
    p_dscore,
    scale,
    T,
    N,
    H,
    G,
    window,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    BQ: tl.constexpr,
    BN: tl.constexpr,
    WINDOW: tl.constexpr,
    DESC: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Gradients of BN packed keys of one head, at the positions of their tokens."""
    i_b = tl.program_id(0) // G
    i_g = tl.program_id(0) % G
    i_n = tl.program_id(1) * BN
    count = tl.load(p_counts + i_b.to(tl.int64) * T + T - 1)
    if i_n >= count:
        return
    scale_log2 = scale * LOG2_E
    o_n = i_n + tl.arange(0, BN)
    row = (i_b * G + i_g) * N + i_n
    b_k = load_packed(packed_k, row, K, BN, BK, DESC)
    b_v = load_packed(packed_v, row, V, BN, BV, DESC)
    p_positions += i_b.to(tl.int64) * N
    b_position = tl.load(p_positions + o_n)
    # From `first` on queries see some of these keys, from `last` on all of them.
    first = tl.load(p_positions + i_n) + window
    last = tl.load(p_positions + tl.minimum(i_n + BN, count) - 1) + window
    first = first // BQ * BQ
    split = tl.cdiv(last, BQ) * BQ
    b_dk = tl.zeros([BN, BK], tl.float32)
    b_dv = tl.zeros([BN, BV], tl.float32)
    N = N // ROWS * ROWS  # Tells the compiler that lines are aligned.
    for i_h in range(i_g * (H // G), (i_g + 1) * (H // G)):
        for i_t in tl.range(first, tl.minimum(split, T), BQ, num_stages=STAGES):
            mask = b_position[:, None] + window <= i_t + tl.arange(0, BQ)[None, :]
            b_dk, b_dv = key_gradient_step(
                q, do, lse, delta, i_b, i_t, i_h, b_k, b_v, b_dk, b_dv, mask,
                scale_log2, T, N, H, K, V, BK, BV, BQ, True, DESC, PRECISION,
            )  # fmt: skip
        for i_t in tl.range(split, T, BQ, num_stages=STAGES):
            b_dk, b_dv = key_gradient_step(
                q, do, lse, delta, i_b, i_t, i_h, b_k, b_v, b_dk, b_dv, None,
                scale_log2, T, N, H, K, V, BK, BV, BQ, False, DESC, PRECISION,
            )  # fmt: skip
    mask_n = o_n < count
    o_row = (i_b.to(tl.int64) * T + b_position) * G + i_g
    if p_dscore is not None:
        tl.store(p_dscore + o_row, tl.sum(b_dv * b_v.to(tl.float32), 1), mask=mask_n)
    o_k = tl.arange(0, BK)[None, :]
    o_v = tl.arange(0, BV)[None, :]
    p_dk += o_row[:, None] * K + o_k
    p_dv += o_row[:, None] * V + o_v
    mask_k = mask_n[:, None] & (o_k < K)
    mask_v = mask_n[:, None] & (o_v < V)
    b_dk *= scale
    if WINDOW:
        b_dk += tl.load(p_dk, mask=mask_k, other=0.0).to(tl.float32)
        b_dv += tl.load(p_dv, mask=mask_v, other=0.0).to(tl.float32)
    tl.store(p_dk, b_dk.to(p_dk.dtype.element_ty), mask=mask_k)
    tl.store(p_dv, b_dv.to(p_dv.dtype.element_ty), mask=mask_v)


def key_gradient(
    do_BTHV: Tensor,
    q_BTHK: Tensor,
    k_BTGK: Tensor | None,
    v_BTGV: Tensor | None,
    k_BGNK: Tensor,
    v_BGNV: Tensor,
    lse_BHN: Tensor,
    delta_BHN: Tensor,
    index: Index,
    window: int,
    scale: float,
    tile: Tile,
    *,
    score: bool,
) -> KeyGradient:
    """Launch `window_gradient_kernel` (with a window) and `key_gradient_kernel`.

    All tensors are contiguous; `k` and `v` are given with a window only.
    """
    batch, time, heads, key_size = q_BTHK.shape
    groups, rows, value_size = v_BGNV.shape[1:]
    descriptors = use_descriptors(q_BTHK, do_BTHV)
    make = torch.empty if window else torch.zeros
    like = {"dtype": q_BTHK.dtype, "device": q_BTHK.device}
    dk_BTGK = make(batch, time, groups, key_size, **like)
    dv_BTGV = make(batch, time, groups, value_size, **like)
    sizes = {
        "K": key_size,
        "V": value_size,
        "BK": padded(key_size),
        "BV": padded(value_size),
        "BQ": tile.queries,
        "BN": tile.keys,
        "DESC": descriptors,
        "PRECISION": precision(q_BTHK.dtype),
        "ROWS": PACK_ROWS,
        "STAGES": tile.stages,
        **tile.options,
    }
    streamed = [token_rows(x, tile.queries, descriptors) for x in (q_BTHK, do_BTHV)]
    numbers = [lines(x, tile.queries, descriptors) for x in (lse_BHN, delta_BHN)]
    if window:
        launch(
            window_gradient_kernel,
            (batch * groups, -(-time // tile.keys)),
            *streamed,
            *(token_rows(x, tile.keys, descriptors) for x in (k_BTGK, v_BTGV)),
            *numbers,
            dk_BTGK,
            dv_BTGV,
            scale,
            time,
            rows,
            heads,
            groups,
            window,
            **sizes,
        )
    dscore_BTG = None
    if score:
        dscore_BTG = torch.zeros(batch, time, groups, dtype=torch.float32, device=q_BTHK.device)
    launch(
        key_gradient_kernel,
        (batch * groups, rows // tile.keys),
        *streamed,
        *(packed_blocks(x, tile.keys, descriptors) for x in (k_BGNK, v_BGNV)),
        *index,
        *numbers,
        dk_BTGK,
        dv_BTGV,
        dscore_BTG,
        scale,
        time,
        rows,
        heads,
        groups,
        window,
        WINDOW=window > 0,
        **sizes,
    )
    return KeyGradient(dk_BTGK, dv_BTGV, None if dscore_BTG is None else dscore_BTG.sum(-1))
