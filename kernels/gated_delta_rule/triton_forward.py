"""Launch 2 of the Triton gated delta rule: the walk over chunks, with the routing score.

One program owns a block of value columns of one head and walks its chunks with the state on chip.
Letters of the kernels as in `triton_inverse.py`; G segments of a sequence. The derivation stands in
the README beside this file.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ham.kernels.gated_delta_rule.triton_tiles import (
    CHUNK,
    Gates,
    Tile,
    allow_descriptors,
    decay_parts,
    padded,
    precision,
    use_descriptors,
)
from ham.routing import PREDICTION_FLOOR, VALUE_FLOOR


class Walked(NamedTuple):
    """What the forward walk writes; optional parts are None when not asked for.

    Attributes:
        o_BTHV: Read-out in the dtype of the values.
        final_state_BHKV: State after the last token, float32.
        prediction_BTHV: Prediction, float32.
        sums_N3BHT: Float32 sums over each block of value columns: p·p, p·v and v·v for the cosine;
            |v - p|², nothing and, for L2, v·v for the other scores.
        residual_BTHV: v - p in the dtype of the values, for the backward.
        states_XMKV: State before every chunk in the dtype of the values, for the backward.
    """

    o_BTHV: Tensor
    final_state_BHKV: Tensor
    prediction_BTHV: Tensor | None
    sums_N3BHT: Tensor | None
    residual_BTHV: Tensor | None
    states_XMKV: Tensor | None


@triton.jit
def load_gates(p_gates, o_c, C: tl.constexpr):
    """Cumulative decay (two parts) and beta of a chunk."""
    return (
        tl.load(p_gates + o_c),
        tl.load(p_gates + C + o_c),
        tl.load(p_gates + 2 * C + o_c),
    )


@triton.jit
def decay_between(high_i, low_i, high_j, low_j, PARTS: tl.constexpr):
    """`exp(c_i - c_j)`; the low parts matter in float32 only."""
    difference = high_i - high_j
    if PARTS == 2:
        difference += low_i - low_j
    return tl.exp2(difference)


@triton.jit
def masked_decay(b_high, b_low, mask, FORWARD: tl.constexpr, PARTS: tl.constexpr):
    """Decay from column to row (`FORWARD`) or from row to column where `mask`, else 0."""
    difference = b_high[:, None] - b_high[None, :]
    if PARTS == 2:
        difference += b_low[:, None] - b_low[None, :]
    if not FORWARD:
        difference = -difference
    return tl.exp2(tl.where(mask, difference, float("-inf")))


@triton.jit
def row_column_mask(mask_r, mask_c, WHOLE: tl.constexpr):
    """Mask of a tile; `WHOLE` when all its columns exist, which saves registers."""
    mask = mask_r[:, None]
    if not WHOLE:
        mask = mask & mask_c[None, :]
    return mask


@triton.jit(do_not_specialize=["T", "M", "H"])
def walk_kernel(
    p_q,
    p_k,
    p_v,
    p_inverse,
    p_gates,
    p_initial,
    p_o,
    p_final,
    p_prediction,
    p_sums,
    p_residual,
    p_states,
    scale,
    T,
    M,
    H,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    PRECISION: tl.constexpr,
    SCORE: tl.constexpr,
    PARTS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Read-outs, predictions and states of one head, for one block of value columns."""
    i_v = tl.program_id(0)
    i_bh = tl.program_id(1).to(tl.int64)
    i_b = i_bh // H
    i_h = i_bh % H
    dtype = p_v.dtype.element_ty
    o_c = tl.arange(0, C)
    token = i_b * T * H + i_h
    p_inverse += i_bh * M * C * C
    if DESCRIPTORS:
        q_TK = tl.make_tensor_descriptor(p_q + token * K, [T, K], [H * K, 1], [C, BK])
        k_TK = tl.make_tensor_descriptor(p_k + token * K, [T, K], [H * K, 1], [C, BK])
        v_TV = tl.make_tensor_descriptor(p_v + token * V, [T, V], [H * V, 1], [C, BV])
        inverse_TC = tl.make_tensor_descriptor(p_inverse, [M * C, C], [C, 1], [C, C])
    o_k = tl.arange(0, BK)[:, None]
    o_v = i_v * BV + tl.arange(0, BV)[None, :]
    o_value = o_c[:, None] * (H * V) + o_v
    causal = o_c[:, None] >= o_c[None, :]

    if p_initial is not None:
        mask_state = (o_k < K) & (o_v < V)
        b_state = tl.load(p_initial + i_bh * K * V + o_k * V + o_v, mask=mask_state, other=0.0)
    else:
        b_state = tl.zeros([BK, BV], tl.float32)

    # Carried from chunk to chunk instead of loaded where used: the pipeline would give them shared
    # memory, and then two programs no longer fit on a multiprocessor at K = V = 128.
    p_gates += i_bh * M * 3 * C
    b_high, b_low, b_beta = load_gates(p_gates, o_c, C)
    high_end = tl.load(p_gates + C - 1)
    low_end = tl.load(p_gates + 2 * C - 1)
    for i_m in tl.range(0, M, num_stages=STAGES):
        mask_t = i_m * C + o_c < T
        if DESCRIPTORS:
            b_q = q_TK.load([i_m * C, 0])
            b_k = k_TK.load([i_m * C, 0])
            b_v = v_TV.load([i_m * C, i_v * BV])
            b_inverse = inverse_TC.load([i_m * C, 0])
        else:
            o_key = o_c[:, None] * (H * K) + tl.arange(0, BK)[None, :]
            mask_key = row_column_mask(mask_t, tl.arange(0, BK) < K, K == BK)
            first = token + i_m * C * H
            b_q = tl.load(p_q + first * K + o_key, mask=mask_key, other=0.0)
            b_k = tl.load(p_k + first * K + o_key, mask=mask_key, other=0.0)
            mask_value = mask_t[:, None] & (o_v < V)
            b_v = tl.load(p_v + first * V + o_value, mask=mask_value, other=0.0)
            b_inverse = tl.load(p_inverse + i_m * (C * C) + o_c[:, None] * C + o_c[None, :])
        b_from_start = decay_between(b_high, b_low, 0.0, 0.0, PARTS)
        b_to_end = decay_between(high_end, low_end, b_high, b_low, PARTS)
        b_end = decay_between(high_end, low_end, 0.0, 0.0, PARTS)

        b_state_narrow = b_state.to(dtype)
        if p_states is not None:
            p_before = p_states + (i_bh * M + i_m) * K * V
            tl.store(p_before + o_k * V + o_v, b_state_narrow, mask=(o_k < K) & (o_v < V))
        b_seen = tl.dot(b_k, b_state_narrow, input_precision=PRECISION)
        b_seen *= b_from_start[:, None]
        # The inverse lacks its unit diagonal, so that v itself never passes through the product
        # and p carries no rounding of v.
        b_right = (b_v.to(tl.float32) - b_seen).to(dtype)
        b_p = b_seen - tl.dot(b_inverse, b_right, input_precision=PRECISION)
        if p_prediction is not None:
            p_chunk = p_prediction + (token + i_m * C * H) * V
            tl.store(p_chunk + o_value, b_p, mask=mask_t[:, None] & (o_v < V))
        b_wide = b_v.to(tl.float32)
        b_residual = b_wide - b_p
        if SCORE is not None:
            n = tl.num_programs(1).to(tl.int64) * T
            p_s = p_sums + i_v * 3 * n + i_bh * T + i_m * C + o_c
            if SCORE == "cosine":
                tl.store(p_s, tl.sum(b_p * b_p, 1), mask=mask_t)
                tl.store(p_s + n, tl.sum(b_p * b_wide, 1), mask=mask_t)
            else:
                tl.store(p_s, tl.sum(b_residual * b_residual, 1), mask=mask_t)
            if SCORE != "committed":
                tl.store(p_s + 2 * n, tl.sum(b_wide * b_wide, 1), mask=mask_t)
        if p_residual is not None:
            p_chunk = p_residual + (token + i_m * C * H) * V
            tl.store(p_chunk + o_value, b_residual.to(dtype), mask=mask_t[:, None] & (o_v < V))
        b_update = b_residual * b_beta[:, None]
        b_written = (b_update * b_to_end[:, None]).to(dtype)
        b_o = tl.dot(b_q, b_state_narrow, input_precision=PRECISION) * b_from_start[:, None]
        b_state *= b_end
        b_state = tl.dot(tl.trans(b_k), b_written, b_state, input_precision=PRECISION)

        b_within = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        b_within *= masked_decay(b_high, b_low, causal, True, PARTS)
        b_o = tl.dot(b_within.to(dtype), b_update.to(dtype), b_o, input_precision=PRECISION)
        p_gates += tl.where(i_m + 1 < M, 3 * C, 0)
        b_high, b_low, b_beta = load_gates(p_gates, o_c, C)
        high_end = tl.load(p_gates + C - 1)
        low_end = tl.load(p_gates + 2 * C - 1)
        p_chunk = p_o + (token + i_m * C * H) * V
        tl.store(p_chunk + o_value, (b_o * scale).to(dtype), mask=mask_t[:, None] & (o_v < V))

    tl.store(p_final + i_bh * K * V + o_k * V + o_v, b_state, mask=(o_k < K) & (o_v < V))


@triton.jit(do_not_specialize=["T", "H"])
def score_kernel(
    p_sums,
    p_beta,
    p_score,
    T,
    H,
    SCORE: tl.constexpr,
    N: tl.constexpr,
    BH: tl.constexpr,
    BT: tl.constexpr,
    P_FLOOR: tl.constexpr,
    V_FLOOR: tl.constexpr,
):
    """Scores of BT tokens of one sequence, all heads, from the sums of N blocks of columns."""
    i_b = tl.program_id(1).to(tl.int64)
    o_t = (tl.program_id(0) * BT + tl.arange(0, BT))[:, None]
    o_h = tl.arange(0, BH)[None, :]
    mask = (o_t < T) & (o_h < H)
    n = tl.num_programs(1).to(tl.int64) * H * T
    o_in = (i_b * H + o_h) * T + o_t
    o_out = (i_b * T + o_t) * H + o_h
    first = tl.zeros([BT, BH], tl.float32)
    pv, vv = first, first
    for i_n in tl.static_range(N):
        first += tl.load(p_sums + (i_n * 3) * n + o_in, mask=mask, other=0.0)
        if SCORE == "cosine":
            pv += tl.load(p_sums + (i_n * 3 + 1) * n + o_in, mask=mask, other=0.0)
        if SCORE != "committed":
            vv += tl.load(p_sums + (i_n * 3 + 2) * n + o_in, mask=mask, other=0.0)
    v_norm = tl.sqrt(vv)
    if SCORE == "cosine":
        p_norm = tl.maximum(tl.sqrt(first), P_FLOOR * v_norm)
        lengths = tl.maximum(p_norm * tl.maximum(v_norm, V_FLOOR), V_FLOOR * V_FLOOR)
        b_score = 1.0 - pv / lengths
    elif SCORE == "l2":
        b_score = tl.sqrt(first) / (v_norm + V_FLOOR)
    else:
        b_beta = tl.load(p_beta + o_out, mask=mask, other=0.0).to(tl.float32)
        b_score = b_beta * tl.sqrt(first)
    tl.store(p_score + o_out, b_score, mask=mask)


def walk(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    gates: Gates,
    initial_state_BHKV: Tensor | None,
    scale: float,
    tile: Tile,
    *,
    prediction: bool,
    score: str | None,
    save: bool,
) -> Walked:
    """Launch `walk_kernel`; all tensors contiguous.

    Args:
        q_BTHK: Queries, float32 or bfloat16 like keys and values.
        k_BTHK: Keys.
        v_BTHV: Values.
        gates: From `invert_chunks`.
        initial_state_BHKV: State before the first token, float32. Default: zeros.
        scale: Multiplies the queries.
        tile: How to cut the work.
        prediction: Write the predictions.
        score: Write the sums that this score is made of.
        save: Write what the backward needs.
    """
    batch, time, heads, key_size = q_BTHK.shape
    value_size = v_BTHV.shape[-1]
    chunks = triton.cdiv(time, CHUNK)
    blocks = triton.cdiv(value_size, tile.block_v)
    wide = {"dtype": torch.float32, "device": v_BTHV.device}
    state_shape = (batch * heads, chunks, key_size, value_size)
    walked = Walked(
        torch.empty_like(v_BTHV),
        torch.empty(batch, heads, key_size, value_size, **wide),
        torch.empty(v_BTHV.shape, **wide) if prediction else None,
        torch.empty(blocks, 3, batch, heads, time, **wide) if score else None,
        torch.empty_like(v_BTHV) if save else None,
        torch.empty(state_shape, dtype=v_BTHV.dtype, device=v_BTHV.device) if save else None,
    )
    allow_descriptors()
    walk_kernel[(blocks, batch * heads)](
        q_BTHK,
        k_BTHK,
        v_BTHV,
        gates.inverse_XMCC,
        gates.gates_XM3C,
        initial_state_BHKV,
        *walked,
        scale,
        time,
        chunks,
        heads,
        K=key_size,
        V=value_size,
        BK=padded(key_size),
        BV=tile.block_v,
        C=CHUNK,
        SCORE=score,
        PARTS=decay_parts(v_BTHV.dtype),
        PRECISION=precision(v_BTHV.dtype),
        DESCRIPTORS=use_descriptors(v_BTHV),
        STAGES=tile.stages,
        num_warps=tile.warps,
    )
    return walked


def score_heads(score: str, sums_N3BHT: Tensor, beta_BTH: Tensor) -> Tensor:
    """Launch `score_kernel`; returns `score_BTH`, float32, of the same definition as
    `ham.routing.head_scores`."""
    blocks, _, batch, heads, time = sums_N3BHT.shape
    score_BTH = torch.empty(batch, time, heads, dtype=torch.float32, device=beta_BTH.device)
    score_kernel[(triton.cdiv(time, 64), batch)](
        sums_N3BHT,
        beta_BTH,
        score_BTH,
        time,
        heads,
        SCORE=score,
        N=blocks,
        BH=triton.next_power_of_2(heads),
        BT=64,
        P_FLOOR=PREDICTION_FLOOR,
        V_FLOOR=VALUE_FLOOR,
    )
    return score_BTH
