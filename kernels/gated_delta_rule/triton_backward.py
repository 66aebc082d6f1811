"""Launch 4 of the Triton gated delta rule: the reverse walk over chunks.

It carries the gradient of the state on chip and writes, per chunk, that gradient and the gradient W
of the right-hand side of the triangular system, which is the gradient of the values. Everything
else is local to a chunk (`triton_gradients.py`). Letters of the kernels as in `triton_inverse.py`;
the derivation stands in the README beside this file.
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
from ham.kernels.gated_delta_rule.triton_segments import carry_states
from ham.kernels.gated_delta_rule.triton_sequences import (
    NEGLIGIBLE_LOG2,
    Sequences,
    passing,
    segment_of,
    sequence_of,
)
from ham.kernels.gated_delta_rule.triton_tiles import (
    CHUNK,
    Gates,
    Tile,
    allow_descriptors,
    decay_parts,
    padded,
    precision,
    use_descriptors,
    use_gluon,
)
from ham.kernels.triton_launch import launch


class WalkedBack(NamedTuple):
    """What the reverse walk writes.

    Attributes:
        w_BTHV: Gradient of the right-hand side of the triangular system.
        dv_BTHV: Gradient of the values; W itself unless the predictions have a gradient.
        dstates_XMKV: Gradient of the state after every chunk.
        dinitial_NHKV: Gradient of the initial state, float32; None when not asked for.
    """

    w_BTHV: Tensor
    dv_BTHV: Tensor
    dstates_XMKV: Tensor
    dinitial_NHKV: Tensor | None


@triton.jit(do_not_specialize=["T", "M", "H", "G", "segments"])
def reverse_walk_kernel(
    p_q,
    p_k,
    p_do,
    p_dp,
    p_inverse,
    p_gates,
    p_passing,
    p_bounds,
    p_offsets,
    p_dfinal,
    p_w,
    p_dv,
    p_dstates,
    p_dbefore,
    scale,
    T,
    M,
    H,
    G,
    segments,
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
    """Gradient of the state after every chunk and W, for a segment and a block of value columns.

    With `p_passing` it is the pass over segments 1..S-1 that finds, from a zero gradient, what each
    adds to the gradient of the state before it (the last one from the true gradient); no chunk's
    results are written then.
    """
    i_v = tl.program_id(0)
    i_s = tl.program_id(1)
    if p_passing is not None:
        i_s += 1
    i_nh = tl.program_id(2).to(tl.int64)
    i_h, token, length, i_x, chunks = sequence_of(i_nh, p_bounds, p_offsets, T, M, H, C)
    start, stop = segment_of(i_s, segments, chunks)
    key = token * G + i_h // (H // G)
    value = token * H + i_h
    dtype = p_do.dtype.element_ty
    o_c = tl.arange(0, C)
    o_k = tl.arange(0, BK)
    o_v = i_v * BV + tl.arange(0, BV)
    mask_k = o_k < K
    mask_v = o_v < V
    o_state = o_k[:, None] * V + o_v[None, :]
    mask_state = row_column_mask(mask_k, mask_v, V % BV == 0)
    o_key = o_c[:, None] * (G * K) + o_k[None, :]
    o_value = o_c[:, None] * (H * V) + o_v[None, :]
    o_square = o_c[:, None] * C + o_c[None, :]
    later = o_c[:, None] <= o_c[None, :]
    if DESCRIPTORS:
        rows = tl.maximum(length, 1)
        q_TK = tl.make_tensor_descriptor(p_q + key * K, [rows, K], [G * K, 1], [C, BK])
        k_TK = tl.make_tensor_descriptor(p_k + key * K, [rows, K], [G * K, 1], [C, BK])
        do_TV = tl.make_tensor_descriptor(p_do + value * V, [rows, V], [H * V, 1], [C, BV])
        squares = tl.maximum(chunks, 1) * C
        p_squares = p_inverse + i_x * C * C
        inverse_TC = tl.make_tensor_descriptor(p_squares, [squares, C], [C, 1], [C, C])

    b_dstate = tl.zeros([BK, BV], tl.float32)
    if p_passing is not None:
        # `p_dbefore` holds, for each segment, the gradient of the state after it.
        whole, edge = passing(p_passing + i_x, start, stop, True)
        p_dbefore += (i_nh * segments + i_s - 1) * K * V
        if i_s == segments - 1:
            if p_dfinal is not None:
                b_dstate = tl.load(p_dfinal + i_nh * K * V + o_state, mask=mask_state, other=0.0)
            tl.store(p_dbefore + K * V + o_state, b_dstate, mask=mask_state)
            gone = whole < NEGLIGIBLE_LOG2
            b_dstate = tl.where(gone, 0.0, b_dstate)
            edge = tl.where(gone, edge, stop)
        stop = edge
    elif p_dfinal is not None:
        p_dfinal += (i_nh * segments + i_s) * K * V
        b_dstate = tl.load(p_dfinal + o_state, mask=mask_state, other=0.0)

    # Carried from chunk to chunk, as in the forward walk.
    p_gates += (i_x + tl.maximum(stop - 1, 0)) * 3 * C
    b_high, b_low, b_beta = load_gates(p_gates, o_c, C)
    high_end = tl.load(p_gates + C - 1)
    low_end = tl.load(p_gates + 2 * C - 1)
    for i_back in tl.range(0, stop - start, num_stages=STAGES):
        i_m = stop - 1 - i_back
        first_key = (key + i_m * C * G) * K
        first_value = (value + i_m * C * H) * V
        mask_t = i_m * C + o_c < length
        mask_key = row_column_mask(mask_t, mask_k, K == BK)
        mask_value = row_column_mask(mask_t, mask_v, V % BV == 0)
        if DESCRIPTORS:
            b_q = q_TK.load([i_m * C, 0])
            b_k = k_TK.load([i_m * C, 0])
            b_do = do_TV.load([i_m * C, i_v * BV])
            b_inverse = inverse_TC.load([i_m * C, 0])
        else:
            b_q = tl.load(p_q + first_key + o_key, mask=mask_key, other=0.0)
            b_k = tl.load(p_k + first_key + o_key, mask=mask_key, other=0.0)
            b_do = tl.load(p_do + first_value + o_value, mask=mask_value, other=0.0)
            b_inverse = tl.load(p_inverse + (i_x + i_m) * C * C + o_square)
        b_from_start = decay_between(b_high, b_low, 0.0, 0.0, PARTS)
        b_to_end = decay_between(high_end, low_end, b_high, b_low, PARTS)

        b_dstate_narrow = b_dstate.to(dtype)
        if p_passing is None:
            p_dstate = p_dstates + (i_x + i_m) * K * V
            tl.store(p_dstate + o_state, b_dstate_narrow, mask=mask_state)

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
            b_dr -= tl.load(p_dp + first_value + o_value, mask=mask_value, other=0.0)
        b_solved = tl.dot(tl.trans(b_inverse), b_dr.to(dtype), input_precision=PRECISION)
        b_w = b_dr + b_solved
        if p_passing is None:
            if p_dp is not None:
                tl.store(p_dv + first_value + o_value, (b_dv + b_solved).to(dtype), mask=mask_value)
            tl.store(p_w + first_value + o_value, b_w.to(dtype), mask=mask_value)

        b_read = (b_do.to(tl.float32) * (scale * b_from_start)[:, None]).to(dtype)
        b_wrong = (-b_w * b_from_start[:, None]).to(dtype)
        b_dstate *= decay_between(high_end, low_end, 0.0, 0.0, PARTS)
        b_dstate = tl.dot(tl.trans(b_q), b_read, b_dstate, input_precision=PRECISION)
        b_dstate = tl.dot(tl.trans(b_k), b_wrong, b_dstate, input_precision=PRECISION)
        p_gates -= tl.where(i_m > start, 3 * C, 0)
        b_high, b_low, b_beta = load_gates(p_gates, o_c, C)
        high_end = tl.load(p_gates + C - 1)
        low_end = tl.load(p_gates + 2 * C - 1)

    if p_passing is not None:
        tl.store(p_dbefore + o_state, b_dstate, mask=mask_state)
    elif p_dbefore is not None:
        tl.store(p_dbefore + i_nh * K * V + o_state, b_dstate, mask=mask_state & (i_s == 0))


def walk_back(
    q_BTGK: Tensor,
    k_BTGK: Tensor,
    do_BTHV: Tensor,
    dprediction_BTHV: Tensor | None,
    dfinal_NHKV: Tensor | None,
    gates: Gates,
    transitions_XSKK: Tensor,
    sequences: Sequences,
    scale: float,
    tile: Tile,
    segments: int,
    *,
    initial: bool,
) -> WalkedBack:
    """Launch `reverse_walk_kernel`, for more than one segment twice; all tensors contiguous.

    Args:
        q_BTGK: Queries of the forward.
        k_BTGK: Keys of the forward.
        do_BTHV: Gradient of the read-outs, in their dtype.
        dprediction_BTHV: Gradient of the predictions, float32. Default: zeros.
        dfinal_NHKV: Gradient of the final state, float32. Default: zeros.
        gates: From `invert_chunks`.
        transitions_XSKK: From `start_segments`; not looked at for up to two segments.
        sequences: Where sequences and chunks begin.
        scale: Multiplies the queries.
        tile: How to cut the work.
        segments: Number of segments of each sequence, as in the forward.
        initial: Write the gradient of the initial state.
    """
    heads, value_size = do_BTHV.shape[2:]
    key_heads, key_size = q_BTGK.shape[2:]
    rows = sequences.count * heads
    wide = {"dtype": torch.float32, "device": do_BTHV.device}
    w_BTHV = torch.empty_like(do_BTHV)
    dv_BTHV = w_BTHV if dprediction_BTHV is None else torch.empty_like(do_BTHV)
    state_shape = (gates.inverse_XMCC.shape[0], sequences.chunks, key_size, value_size)
    dstates_XMKV = torch.empty(state_shape, dtype=do_BTHV.dtype, device=do_BTHV.device)
    dinitial_NHKV = None
    if initial:
        dinitial_NHKV = torch.empty(sequences.count, heads, key_size, value_size, **wide)

    def walk(count: int, passing_XM: Tensor | None, after: Tensor | None, before: Tensor | None):
        launch(
            reverse_walk_kernel,
            (-(-value_size // tile.block_v), count, rows),
            q_BTGK,
            k_BTGK,
            do_BTHV,
            dprediction_BTHV,
            gates.inverse_XMCC,
            gates.gates_XM3C,
            passing_XM,
            sequences.bounds_N1,
            sequences.offsets_N1,
            after,
            w_BTHV,
            dv_BTHV,
            dstates_XMKV,
            before,
            scale,
            sequences.time,
            sequences.chunks,
            heads,
            key_heads,
            segments,
            K=key_size,
            V=value_size,
            BK=padded(key_size),
            BV=tile.block_v,
            C=CHUNK,
            PARTS=decay_parts(q_BTGK.dtype),
            PRECISION=precision(q_BTGK.dtype),
            DESCRIPTORS=tile.descriptors and use_descriptors(do_BTHV),
            STAGES=tile.stages,
            num_warps=tile.warps,
        )

    allow_descriptors()
    if segments > 1:
        after_XSKV = torch.empty(rows, segments, key_size, value_size, **wide)
        walk(segments - 1, gates.passing_XM, dfinal_NHKV, after_XSKV)
        carry_states(after_XSKV, transitions_XSKK, gates, sequences, reverse=True)
        dfinal_NHKV = after_XSKV
    if dprediction_BTHV is None and use_gluon(do_BTHV, key_size, value_size):
        from ham.kernels.gated_delta_rule.hopper_reverse import hopper_walk_back

        inputs = (q_BTGK, k_BTGK, do_BTHV, gates, sequences, dfinal_NHKV, scale, segments)
        hopper_walk_back(*inputs, w_BTHV, dstates_XMKV, dinitial_NHKV)
    else:
        walk(segments, None, dfinal_NHKV, dinitial_NHKV)
    return WalkedBack(w_BTHV, dv_BTHV, dstates_XMKV, dinitial_NHKV)
