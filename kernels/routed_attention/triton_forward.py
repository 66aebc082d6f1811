"""Launch 3 of Triton routed attention: softmax over packed keys, and over a recent window.

Letters of the kernels as in `triton_pack.py`; H query heads, K and V head sizes of keys and values,
BQ queries and BN keys of a block. Softmax runs in units of log2 throughout.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ham.kernels.routed_attention.triton_tiles import (
    PACK_ROWS,
    Tile,
    packed_blocks,
    padded,
    precision,
    token_rows,
    use_descriptors,
)
from ham.kernels.triton_launch import launch

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_tokens(
    x, i_b, i_t, i_h, T, H, D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, DESC: tl.constexpr
):
    """Tokens i_t to i_t + BT of one head of `x_BTHD`, `[BT, BD]`; 0 beyond the sequence."""
    if DESC:
        b_x = x.load([i_b, i_h, i_t, 0]).reshape([BT, BD])
    else:
        o_t = tl.arange(0, BT)[:, None]
        o_d = tl.arange(0, BD)[None, :]
        p_x = x + ((i_b.to(tl.int64) * T + i_t) * H + i_h) * D
        mask = i_t + o_t < T
        if D != BD:
            mask = mask & (o_d < D)
        b_x = tl.load(p_x + o_t * (H * D) + o_d, mask=mask, other=0.0)
    return b_x


@triton.jit
def load_packed(x, row, D: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, DESC: tl.constexpr):
    """BN packed rows from `row` on, `[BN, BD]`; rows beyond the count are zero."""
    if DESC:
        b_x = x.load([row, 0])
    else:
        o_d = tl.arange(0, BD)[None, :]
        p_x = x + row.to(tl.int64) * D + tl.arange(0, BN)[:, None] * D + o_d
        b_x = tl.load(p_x) if D == BD else tl.load(p_x, mask=o_d < D, other=0.0)
    return b_x


@triton.jit
def packed_range(p_counts, first, T, window, BQ: tl.constexpr):
    """How many packed keys BQ queries from `first` on see: all of them at least, any at most.

    Packed keys are in order of position, so query t sees a prefix: those up to t - window.
    """
    last = tl.minimum(first + BQ, T) - 1 - window
    fewest = tl.load(p_counts + tl.maximum(first - window, 0), mask=first >= window, other=0)
    most = tl.load(p_counts + tl.maximum(last, 0), mask=last >= 0, other=0)
    return fewest, most


@triton.jit
def in_window(o_query, o_key, window):
    """Mask of the `window` most recent tokens of each query."""
    return (o_key <= o_query) & (o_key > o_query - window)


@triton.jit
def store_line(p_line, b_x, first, T, N, filler, BQ: tl.constexpr, ROWS: tl.constexpr):
    """A number per query; the last block also fills the line up to N, a multiple of ROWS.

    Lines without masks and on aligned addresses save the backward half of its integer work.
    """
    o_q = first + tl.arange(0, BQ)
    tl.store(p_line + o_q, tl.where(o_q < T, b_x, filler), mask=o_q < N)
    if first + BQ >= T:
        o_rest = first + BQ + tl.arange(0, ROWS)
        tl.store(p_line + o_rest, tl.full([ROWS], filler, tl.float32), mask=o_rest < N)


@triton.jit
def softmax_step(
    b_q,
    b_k,
    b_v,
    b_o,
    b_max,
    b_sum,
    mask,
    scale_log2,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add a block of keys to a running softmax."""
    b_score = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
    if MASKED:
        b_score = tl.where(mask, b_score, float("-inf"))
    b_new = tl.maximum(b_max, tl.max(b_score, 1) * scale_log2)
    b_shift = b_new
    if MASKED:
        # A row may have seen no key so far, and -inf - -inf is NaN.
        b_shift = tl.where(b_new == float("-inf"), 0.0, b_new)
    b_weight = tl.exp2(b_score * scale_log2 - b_shift[:, None])
    b_fade = tl.exp2(b_max - b_shift)
    b_sum = b_sum * b_fade + tl.sum(b_weight, 1)
    b_o = b_o * b_fade[:, None]
    b_o = tl.dot(b_weight.to(b_v.dtype), b_v, b_o, input_precision=PRECISION)
    return b_o, b_new, b_sum


@triton.jit(do_not_specialize=["T", "N", "H", "G", "window"])
def forward_kernel(
    q,
    packed_k,
    packed_v,
    k,
    v,
    p_counts,
    p_sink,
    p_o,
    p_lse,
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
    """Read-outs of BQ queries of one head; the last block of queries, the longest, goes first."""
    i_b = tl.program_id(0) // H
    i_h = tl.program_id(0) % H
    i_g = i_h // (H // G)
    first = (tl.num_programs(1) - 1 - tl.program_id(1)) * BQ
    scale_log2 = scale * LOG2_E
    o_q = first + tl.arange(0, BQ)
    o_n = tl.arange(0, BN)
    b_q = load_tokens(q, i_b, first, i_h, T, H, K, BQ, BK, DESC)
    b_o = tl.zeros([BQ, BV], tl.float32)
    if p_sink is not None:
        o_k = tl.arange(0, BK)
        b_sink = tl.load(p_sink + i_h * K + o_k, mask=o_k < K, other=0.0).to(tl.float32)
        b_max = tl.sum(b_q.to(tl.float32) * b_sink[None, :], 1) * scale_log2
        b_sum = tl.full([BQ], 1.0, tl.float32)
    else:
        b_max = tl.full([BQ], float("-inf"), tl.float32)
        b_sum = tl.zeros([BQ], tl.float32)

    p_counts += i_b.to(tl.int64) * T
    fewest, most = packed_range(p_counts, first, T, window, BQ)
    seen_by_all = fewest // BN * BN
    row = (i_b * G + i_g) * N
    for i_n in tl.range(0, seen_by_all, BN, num_stages=STAGES):
        b_k = load_packed(packed_k, row + i_n, K, BN, BK, DESC)
        b_v = load_packed(packed_v, row + i_n, V, BN, BV, DESC)
        b_o, b_max, b_sum = softmax_step(
            b_q, b_k, b_v, b_o, b_max, b_sum, None, scale_log2, False, PRECISION
        )
    b_count = tl.load(p_counts + o_q - window, mask=(o_q >= window) & (o_q < T), other=0)
    for i_n in tl.range(seen_by_all, most, BN, num_stages=STAGES):
        b_k = load_packed(packed_k, row + i_n, K, BN, BK, DESC)
        b_v = load_packed(packed_v, row + i_n, V, BN, BV, DESC)
        mask = i_n + o_n[None, :] < b_count[:, None]
        b_o, b_max, b_sum = softmax_step(
            b_q, b_k, b_v, b_o, b_max, b_sum, mask, scale_log2, True, PRECISION
        )
    if WINDOW:
        start = tl.maximum(first - window + 1, 0)
        for i_n in tl.range(start, tl.minimum(first + BQ, T), BN, num_stages=STAGES):
            b_k = load_tokens(k, i_b, i_n, i_g, T, G, K, BN, BK, DESC)
            b_v = load_tokens(v, i_b, i_n, i_g, T, G, V, BN, BV, DESC)
            mask = in_window(o_q[:, None], i_n + o_n[None, :], window)
            b_o, b_max, b_sum = softmax_step(
                b_q, b_k, b_v, b_o, b_max, b_sum, mask, scale_log2, True, PRECISION
            )

    some = b_sum > 0
    b_o = b_o * tl.where(some, 1.0 / tl.where(some, b_sum, 1.0), 0.0)[:, None]
    # A row without keys gets +inf, so that the backward makes every weight of it exactly 0.
    b_lse = tl.where(some, b_max + tl.log2(tl.where(some, b_sum, 1.0)), float("inf"))
    p_lse += tl.program_id(0).to(tl.int64) * N
    store_line(p_lse, b_lse, first, T, N, float("inf"), BQ, ROWS)
    o_v = tl.arange(0, BV)[None, :]
    p_o += ((i_b.to(tl.int64) * T + first) * H + i_h) * V
    o_out = tl.arange(0, BQ)[:, None] * (H * V) + o_v
    tl.store(p_o + o_out, b_o.to(p_o.dtype.element_ty), mask=(o_q < T)[:, None] & (o_v < V))


def attend(
    q_BTHK: Tensor,
    k_BTGK: Tensor,
    v_BTGV: Tensor,
    k_BGNK: Tensor,
    v_BGNV: Tensor,
    counts_BT: Tensor,
    sink_HK: Tensor | None,
    window: int,
    scale: float,
    tile: Tile,
) -> tuple[Tensor, Tensor]:
    """Launch `forward_kernel`; all tensors contiguous.

    Returns:
        `o_BTHV`, and `lse_BHN`: float32, log2 of the sum of exponentials; +inf without any key and
        beyond the sequence.
    """
    batch, time, heads, key_size = q_BTHK.shape
    groups, value_size = v_BTGV.shape[2:]
    o_BTHV = v_BTGV.new_empty(batch, time, heads, value_size)
    rows = k_BGNK.shape[2]
    lse_BHN = torch.empty(batch, heads, rows, dtype=torch.float32, device=q_BTHK.device)
    descriptors = use_descriptors(q_BTHK, k_BTGK, v_BTGV)
    launch(
        forward_kernel,
        (batch * heads, -(-time // tile.queries)),
        token_rows(q_BTHK, tile.queries, descriptors),
        packed_blocks(k_BGNK, tile.keys, descriptors),
        packed_blocks(v_BGNV, tile.keys, descriptors),
        token_rows(k_BTGK, tile.keys, descriptors) if window else None,
        token_rows(v_BTGV, tile.keys, descriptors) if window else None,
        counts_BT,
        sink_HK,
        o_BTHV,
        lse_BHN,
        scale,
        time,
        rows,
        heads,
        groups,
        window,
        K=key_size,
        V=value_size,
        BK=padded(key_size),
        BV=padded(value_size),
        BQ=tile.queries,
        BN=tile.keys,
        WINDOW=window > 0,
        DESC=descriptors,
        PRECISION=precision(q_BTHK.dtype),
        ROWS=PACK_ROWS,
        STAGES=tile.stages,
        **tile.options,
    )
    return o_BTHV, lse_BHN
