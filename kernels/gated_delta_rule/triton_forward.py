"""Launch 2 of the Triton gated delta rule: the walk over chunks, with the routing score.

One program owns a block of value columns of one head and walks its chunks with the state on chip.
Letters of the kernels as in `triton_inverse.py`; N sequences, S segments. The derivation stands in
the README beside this file.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ham.kernels.gated_delta_rule.triton_sequences import Sequences, segment_of, sequence_of
from ham.kernels.gated_delta_rule.triton_tiles import (
    CHUNK,
    Gates,
    Tile,
    allow_descriptors,
    decay_parts,
    dependent,
    padded,
    precision,
    register_bound,
    use_descriptors,
)
from ham.kernels.triton_launch import launch


class Walked(NamedTuple):
    """What the forward walk writes; optional parts are None when not asked for.

    Attributes:
        o_BTHV: Read-out in the dtype of the values.
        final_state_NHKV: State after the last token, float32.
        prediction_BTHV: Prediction, float32.
        sums_N3HR: Float32 sums over each block of value columns, R = B × T tokens: p·p, p·v and v·v
            for the cosine; |v - p|², nothing and, for L2, v·v for the other scores.
        residual_BTHV: v - p in the dtype of the values, for the backward.
        states_XMKV: State before every chunk in the dtype of the values, for the backward.
    """

    o_BTHV: Tensor
    final_state_NHKV: Tensor
    prediction_BTHV: Tensor | None
    sums_N3HR: Tensor | None
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


@triton.jit(do_not_specialize=["T", "M", "R", "H", "G"])
def walk_kernel(
    p_q,
    p_k,
    p_v,
    p_inverse,
    p_gates,
    p_bounds,
    p_offsets,
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
    R,
    H,
    G,
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
    PDL: tl.constexpr,
):
    """Read-outs, predictions and states of a segment of one head, for one block of value columns.

    Letters: N × H stands for sequences × value heads, `token` for the first of the sequence.
    """
    i_v = tl.program_id(0)
    i_s = tl.program_id(1)
    i_nh = tl.program_id(2).to(tl.int64)
    i_h, token, length, i_x, chunks = sequence_of(i_nh, p_bounds, p_offsets, T, M, H, C)
    start, stop = segment_of(i_s, tl.num_programs(1), chunks)
    dtype = p_v.dtype.element_ty
    o_c = tl.arange(0, C)
    key = token * G + i_h // (H // G)
    value = token * H + i_h
    p_inverse += i_x * C * C
    if DESCRIPTORS:
        rows = tl.maximum(length, 1)
        q_TK = tl.make_tensor_descriptor(p_q + key * K, [rows, K], [G * K, 1], [C, BK])
        k_TK = tl.make_tensor_descriptor(p_k + key * K, [rows, K], [G * K, 1], [C, BK])
        v_TV = tl.make_tensor_descriptor(p_v + value * V, [rows, V], [H * V, 1], [C, BV])
        squares = tl.maximum(chunks, 1) * C
        inverse_TC = tl.make_tensor_descriptor(p_inverse, [squares, C], [C, 1], [C, C])
    o_k = tl.arange(0, BK)[:, None]
    o_v = i_v * BV + tl.arange(0, BV)[None, :]
    o_value = o_c[:, None] * (H * V) + o_v
    causal = o_c[:, None] >= o_c[None, :]

    if PDL:
        gdc_wait()
    if p_initial is not None:
        p_start = p_initial + (i_nh * tl.num_programs(1) + i_s) * K * V
        mask_state = (o_k < K) & (o_v < V)
        b_state = tl.load(p_start + o_k * V + o_v, mask=mask_state, other=0.0)
    else:
        b_state = tl.zeros([BK, BV], tl.float32)

    # Carried from chunk to chunk instead of loaded where used: the pipeline would give them shared
    # memory, and then two programs no longer fit on a multiprocessor at K = V = 128.
    p_gates += (i_x + tl.minimum(start, tl.maximum(chunks - 1, 0))) * 3 * C
    b_high, b_low, b_beta = load_gates(p_gates, o_c, C)
    high_end = tl.load(p_gates + C - 1)
    low_end = tl.load(p_gates + 2 * C - 1)
    for i_m in tl.range(start, stop, num_stages=STAGES):
        mask_t = i_m * C + o_c < length
        if DESCRIPTORS:
            b_q = q_TK.load([i_m * C, 0])
            b_k = k_TK.load([i_m * C, 0])
            b_v = v_TV.load([i_m * C, i_v * BV])
            b_inverse = inverse_TC.load([i_m * C, 0])
        else:
            o_key = o_c[:, None] * (G * K) + tl.arange(0, BK)[None, :]
            mask_key = row_column_mask(mask_t, tl.arange(0, BK) < K, K == BK)
            first_key = (key + i_m * C * G) * K
            b_q = tl.load(p_q + first_key + o_key, mask=mask_key, other=0.0)
            b_k = tl.load(p_k + first_key + o_key, mask=mask_key, other=0.0)
            mask_value = mask_t[:, None] & (o_v < V)
            p_chunk = p_v + (value + i_m * C * H) * V
            b_v = tl.load(p_chunk + o_value, mask=mask_value, other=0.0)
            b_inverse = tl.load(p_inverse + i_m * (C * C) + o_c[:, None] * C + o_c[None, :])
        b_from_start = decay_between(b_high, b_low, 0.0, 0.0, PARTS)
        b_to_end = decay_between(high_end, low_end, b_high, b_low, PARTS)
        b_end = decay_between(high_end, low_end, 0.0, 0.0, PARTS)

        b_state_narrow = b_state.to(dtype)
        if p_states is not None:
            p_before = p_states + (i_x + i_m) * K * V
            tl.store(p_before + o_k * V + o_v, b_state_narrow, mask=(o_k < K) & (o_v < V))
        b_seen = tl.dot(b_k, b_state_narrow, input_precision=PRECISION)
        b_seen *= b_from_start[:, None]
        # The inverse lacks its unit diagonal, so that v itself never passes through the product
        # and p carries no rounding of v.
        b_right = (b_v.to(tl.float32) - b_seen).to(dtype)
        b_p = b_seen - tl.dot(b_inverse, b_right, input_precision=PRECISION)
        if p_prediction is not None:
            p_chunk = p_prediction + (value + i_m * C * H) * V
            tl.store(p_chunk + o_value, b_p, mask=mask_t[:, None] & (o_v < V))
        b_wide = b_v.to(tl.float32)
        b_residual = b_wide - b_p
        if SCORE is not None:
            n = H * R.to(tl.int64)
            p_s = p_sums + i_v * 3 * n + i_h * R + token + i_m * C + o_c
            if SCORE == "cosine":
                tl.store(p_s, tl.sum(b_p * b_p, 1), mask=mask_t)
                tl.store(p_s + n, tl.sum(b_p * b_wide, 1), mask=mask_t)
            else:
                tl.store(p_s, tl.sum(b_residual * b_residual, 1), mask=mask_t)
            if SCORE != "committed":
                tl.store(p_s + 2 * n, tl.sum(b_wide * b_wide, 1), mask=mask_t)
        if p_residual is not None:
            p_chunk = p_residual + (value + i_m * C * H) * V
            tl.store(p_chunk + o_value, b_residual.to(dtype), mask=mask_t[:, None] & (o_v < V))
        b_update = b_residual * b_beta[:, None]
        b_written = (b_update * b_to_end[:, None]).to(dtype)
        b_o = tl.dot(b_q, b_state_narrow, input_precision=PRECISION) * b_from_start[:, None]
        b_state *= b_end
        b_state = tl.dot(tl.trans(b_k), b_written, b_state, input_precision=PRECISION)

        b_within = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        b_within *= masked_decay(b_high, b_low, causal, True, PARTS)
        b_o = tl.dot(b_within.to(dtype), b_update.to(dtype), b_o, input_precision=PRECISION)
        p_gates += tl.where(i_m + 1 < stop, 3 * C, 0)
        b_high, b_low, b_beta = load_gates(p_gates, o_c, C)
        high_end = tl.load(p_gates + C - 1)
        low_end = tl.load(p_gates + 2 * C - 1)
        p_chunk = p_o + (value + i_m * C * H) * V
        tl.store(p_chunk + o_value, (b_o * scale).to(dtype), mask=mask_t[:, None] & (o_v < V))

    if PDL:
        gdc_launch_dependents()
    # Segments may be empty; the last one that is not knows the final state.
    if (stop == chunks) & ((start < chunks) | (i_s == 0)):
        tl.store(p_final + i_nh * K * V + o_k * V + o_v, b_state, mask=(o_k < K) & (o_v < V))


def walk(
    q_BTGK: Tensor,
    k_BTGK: Tensor,
    v_BTHV: Tensor,
    gates: Gates,
    sequences: Sequences,
    initial_XSKV: Tensor | None,
    scale: float,
    tile: Tile,
    segments: int,
    *,
    prediction: bool,
    score: str,
    save: bool,
) -> Walked:
    """Launch `walk_kernel`; all tensors contiguous.

    Args:
        q_BTGK: Queries, float32 or bfloat16 like keys and values.
        k_BTGK: Keys.
        v_BTHV: Values.
        gates: From `invert_chunks`.
        sequences: Where sequences and chunks begin; X stands for sequences × heads.
        initial_XSKV: State before each of the S segments, float32. Default: zeros.
        scale: Multiplies the queries.
        tile: How to cut the work.
        segments: Number of segments of each sequence.
        prediction: Write the predictions.
        score: Write the sums that this score is made of; "" for none.
        save: Write what the backward needs.
    """
    batch, time, heads, value_size = v_BTHV.shape
    key_heads, key_size = q_BTGK.shape[2:]
    blocks = -(-value_size // tile.block_v)
    wide = {"dtype": torch.float32, "device": v_BTHV.device}
    state_shape = (batch * heads, sequences.chunks, key_size, value_size)
    walked = Walked(
        torch.empty_like(v_BTHV),
        torch.empty(sequences.count, heads, key_size, value_size, **wide),
        torch.empty(v_BTHV.shape, **wide) if prediction else None,
        torch.empty(blocks, 3, heads, batch * time, **wide) if score else None,
        torch.empty_like(v_BTHV) if save else None,
        torch.empty(state_shape, dtype=v_BTHV.dtype, device=v_BTHV.device) if save else None,
    )
    allow_descriptors()
    launch(
        walk_kernel,
        (blocks, segments, sequences.count * heads),
        q_BTGK,
        k_BTGK,
        v_BTHV,
        gates.inverse_XMCC,
        gates.gates_XM3C,
        sequences.bounds_N1,
        sequences.offsets_N1,
        initial_XSKV,
        *walked,
        scale,
        time,
        sequences.chunks,
        batch * time,
        heads,
        key_heads,
        K=key_size,
        V=value_size,
        BK=padded(key_size),
        BV=tile.block_v,
        C=CHUNK,
        SCORE=score or None,
        PARTS=decay_parts(v_BTHV.dtype),
        PRECISION=precision(v_BTHV.dtype),
        DESCRIPTORS=tile.descriptors and use_descriptors(v_BTHV),
        STAGES=tile.stages,
        num_warps=tile.warps,
        **dependent(v_BTHV.device, segments == 1),
        **register_bound(v_BTHV.device),
    )
    return walked
