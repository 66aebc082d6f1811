"""Launch 4 of Triton routed attention: gradients of queries and of the null key.

Runs before the launch for keys and values, because it also writes the row sums `do . o` that both
need. Letters of the kernels as in `triton_forward.py`.
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
    packed_range,
    store_line,
)
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


class QueryGradient(NamedTuple):
    """What the launch writes.

    Attributes:
        dq_BTHK: In the dtype of the queries.
        delta_BHN: Float32 `do . o`; 0 beyond the sequence.
        dsink_HK: Float32; None without a null key.
    """

    dq_BTHK: Tensor
    delta_BHN: Tensor
    dsink_HK: Tensor | None


@triton.jit
def query_gradient_step(
    b_q,
    b_do,
    b_k,
    b_v,
    b_dq,
    b_lse,
    b_delta,
    mask,
    scale_log2,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add what a block of keys gives to the gradient of queries, without the scale."""
    b_score = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
    b_weight = tl.exp2(b_score * scale_log2 - b_lse[:, None])
    if MASKED:
        b_weight = tl.where(mask, b_weight, 0.0)
    b_dweight = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)
    b_dscore = b_weight * (b_dweight - b_delta[:, None])
    return tl.dot(b_dscore.to(b_k.dtype), b_k, b_dq, input_precision=PRECISION)


@triton.jit(do_not_specialize=["T", "N", "H", "G", "window"])
def query_gradient_kernel(
    q,
    do,
    packed_k,
    packed_v,
    k,
    v,
    p_o,
    p_lse,
    p_counts,
    p_sink,
    p_dq,
    p_delta,
    p_dsink,
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
    """Gradient of BQ queries of one head; the last block of queries, the longest, goes first."""
    i_b = tl.program_id(0) // H
    i_h = tl.program_id(0) % H
    i_g = i_h // (H // G)
    first = (tl.num_programs(1) - 1 - tl.program_id(1)) * BQ
    scale_log2 = scale * LOG2_E
    o_q = first + tl.arange(0, BQ)
    o_n = tl.arange(0, BN)
    mask_q = o_q < T
    b_q = load_tokens(q, i_b, first, i_h, T, H, K, BQ, BK, DESC)
    b_do = load_tokens(do, i_b, first, i_h, T, H, V, BQ, BV, DESC)
    b_o = load_tokens(p_o, i_b, first, i_h, T, H, V, BQ, BV, False)
    b_delta = tl.sum(b_do.to(tl.float32) * b_o.to(tl.float32), 1)
    line = tl.program_id(0).to(tl.int64) * N
    store_line(p_delta + line, b_delta, first, T, N, 0.0, BQ, ROWS)
    b_lse = tl.load(p_lse + line + o_q, mask=mask_q, other=float("inf"))
    b_dq = tl.zeros([BQ, BK], tl.float32)

    p_counts += i_b.to(tl.int64) * T
    fewest, most = packed_range(p_counts, first, T, window, BQ)
    seen_by_all = fewest // BN * BN
    row = (i_b * G + i_g) * N
    for i_n in tl.range(0, seen_by_all, BN, num_stages=STAGES):
        b_k = load_packed(packed_k, row + i_n, K, BN, BK, DESC)
        b_v = load_packed(packed_v, row + i_n, V, BN, BV, DESC)
        b_dq = query_gradient_step(
            b_q, b_do, b_k, b_v, b_dq, b_lse, b_delta, None, scale_log2, False, PRECISION
        )
    b_count = tl.load(p_counts + o_q - window, mask=(o_q >= window) & mask_q, other=0)
    for i_n in tl.range(seen_by_all, most, BN, num_stages=STAGES):
        b_k = load_packed(packed_k, row + i_n, K, BN, BK, DESC)
        b_v = load_packed(packed_v, row + i_n, V, BN, BV, DESC)
        mask = i_n + o_n[None, :] < b_count[:, None]
        b_dq = query_gradient_step(
            b_q, b_do, b_k, b_v, b_dq, b_lse, b_delta, mask, scale_log2, True, PRECISION
        )
    if WINDOW:
        start = tl.maximum(first - window + 1, 0)
        for i_n in tl.range(start, tl.minimum(first + BQ, T), BN, num_stages=STAGES):
            b_k = load_tokens(k, i_b, i_n, i_g, T, G, K, BN, BK, DESC)
            b_v = load_tokens(v, i_b, i_n, i_g, T, G, V, BN, BV, DESC)
            mask = in_window(o_q[:, None], i_n + o_n[None, :], window)
            b_dq = query_gradient_step(
                b_q, b_do, b_k, b_v, b_dq, b_lse, b_delta, mask, scale_log2, True, PRECISION
            )

    o_k = tl.arange(0, BK)
    if p_sink is not None:
        # The value of the null key is zero, so the gradient of its weight is 0 - delta.
        b_sink = tl.load(p_sink + i_h * K + o_k, mask=o_k < K, other=0.0).to(tl.float32)
        b_wide = b_q.to(tl.float32)
        b_null = tl.exp2(tl.sum(b_wide * b_sink[None, :], 1) * scale_log2 - b_lse)
        b_dnull = -b_null * b_delta
        b_dq += b_dnull[:, None] * b_sink[None, :]
        b_dsink = tl.sum(b_dnull[:, None] * b_wide, 0) * scale
        part = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
        tl.store(p_dsink + part * K + o_k, b_dsink, mask=o_k < K)
    p_dq += ((i_b.to(tl.int64) * T + first) * H + i_h) * K
    o_out = tl.arange(0, BQ)[:, None] * (H * K) + o_k[None, :]
    mask = mask_q[:, None] & (o_k < K)[None, :]
    tl.store(p_dq + o_out, (b_dq * scale).to(p_dq.dtype.element_ty), mask=mask)


def query_gradient(
    do_BTHV: Tensor,
    q_BTHK: Tensor,
    k_BTGK: Tensor | None,
    v_BTGV: Tensor | None,
    k_BGNK: Tensor,
    v_BGNV: Tensor,
    o_BTHV: Tensor,
    lse_BHN: Tensor,
    counts_BT: Tensor,
    sink_HK: Tensor | None,
    window: int,
    scale: float,
    tile: Tile,
) -> QueryGradient:
    """Launch `query_gradient_kernel`; all tensors contiguous, `k` and `v` only with a window."""
    batch, time, heads, key_size = q_BTHK.shape
    groups, rows, value_size = v_BGNV.shape[1:]
    blocks = -(-time // tile.queries)
    dq_BTHK = torch.empty_like(q_BTHK)
    delta_BHN = torch.empty_like(lse_BHN)
    parts_MBHK = None
    if sink_HK is not None:
        parts_MBHK = torch.empty(
            blocks, batch, heads, key_size, dtype=torch.float32, device=q_BTHK.device
        )
    descriptors = use_descriptors(q_BTHK, do_BTHV)
    launch(
        query_gradient_kernel,
        (batch * heads, blocks),
        token_rows(q_BTHK, tile.queries, descriptors),
        token_rows(do_BTHV, tile.queries, descriptors),
        packed_blocks(k_BGNK, tile.keys, descriptors),
        packed_blocks(v_BGNV, tile.keys, descriptors),
        None if k_BTGK is None else token_rows(k_BTGK, tile.keys, descriptors),
        None if v_BTGV is None else token_rows(v_BTGV, tile.keys, descriptors),
        o_BTHV,
        lse_BHN,
        counts_BT,
        sink_HK,
        dq_BTHK,
        delta_BHN,
        parts_MBHK,
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
    dsink_HK = None if parts_MBHK is None else parts_MBHK.sum((0, 1))
    return QueryGradient(dq_BTHK, delta_BHN, dsink_HK)
