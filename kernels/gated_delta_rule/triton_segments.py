"""Segments of the Triton gated delta rule: states between parts of a sequence walked at once.

Few long sequences would leave most of the chip idle, so each is cut into S segments. A segment
turns the state before it into `M state + N`, whatever is read out. The passes here find the state
before every segment; then all segments are walked side by side. N is the state that a walk from
zero ends with; the columns of M are what a walk from the unit matrix, without values, makes of it.
Segment 0 starts from the true state and the last one is not needed, so M is made for segments
1..S-2 only; the backward uses it transposed.

Gates bound the norm of M. Where the bound is negligible (`triton_sequences.NEGLIGIBLE_LOG2`), M is
not made, and N is walked from the first chunk that still matters; the outcome is the same to all
digits of float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ham.kernels.gated_delta_rule.triton_forward import (
    decay_between,
    load_gates,
    row_column_mask,
)
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
    decay_parts,
    padded,
    precision,
)
from ham.kernels.triton_launch import launch


@triton.jit(do_not_specialize=["T", "M", "H", "G", "segments"])
def segment_kernel(
    p_k,
    p_v,
    p_inverse,
    p_gates,
    p_passing,
    p_bounds,
    p_offsets,
    p_initial,
    p_states,
    p_transitions,
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
    STAGES: tl.constexpr,
):
    """What a segment makes of the zero state (its first blocks) and of the unit matrix (the rest).

    The former goes to where the state before the next segment is to stand.
    """
    VALUE_BLOCKS: tl.constexpr = (V + BV - 1) // BV
    i_v = tl.program_id(0)
    i_s = tl.program_id(1)
    i_nh = tl.program_id(2).to(tl.int64)
    i_h, token, length, i_x, chunks = sequence_of(i_nh, p_bounds, p_offsets, T, M, H, C)
    start, stop = segment_of(i_s, segments, chunks)
    p_passing += i_x
    whole, edge = passing(p_passing, start, stop, False)
    values = i_v < VALUE_BLOCKS
    gone = whole < NEGLIGIBLE_LOG2
    if not (values | ((i_s > 0) & (not gone))):
        return
    edge = tl.where(values, edge, start)
    dtype = p_k.dtype.element_ty
    o_c = tl.arange(0, C)
    o_k = tl.arange(0, BK)
    o_v = (i_v - tl.where(values, 0, VALUE_BLOCKS)) * BV + tl.arange(0, BV)
    mask_k = o_k < K
    mask_v = o_v < tl.where(values, V, 0)
    mask_state = mask_k[:, None] & mask_v[None, :]
    o_state = o_k[:, None] * V + o_v[None, :]

    p_states += (i_nh * segments + i_s) * K * V
    b_state = tl.zeros([BK, BV], tl.float32)
    if not values:
        b_state = tl.where(o_k[:, None] == o_v[None, :], 1.0, 0.0)
    elif i_s == 0:
        if p_initial is not None:
            b_state = tl.load(p_initial + i_nh * K * V + o_state, mask=mask_state, other=0.0)
        tl.store(p_states + o_state, b_state, mask=mask_state)
        b_state = tl.where(gone, 0.0, b_state)
        edge = tl.where(gone, edge, start)

    p_inverse += i_x * C * C
    p_gates += (i_x + tl.minimum(edge, tl.maximum(chunks - 1, 0))) * 3 * C
    p_k += (token * G + i_h // (H // G)) * K
    p_v += (token * H + i_h) * V
    b_high, b_low, b_beta = load_gates(p_gates, o_c, C)
    high_end = tl.load(p_gates + C - 1)
    low_end = tl.load(p_gates + 2 * C - 1)
    for i_m in tl.range(edge, stop, num_stages=STAGES):
        o_t = (i_m * C + o_c).to(tl.int64)
        mask_t = o_t < length
        mask_key = row_column_mask(mask_t, mask_k, K == BK)
        b_k = tl.load(p_k + o_t[:, None] * (G * K) + o_k[None, :], mask=mask_key, other=0.0)
        p_value = p_v + o_t[:, None] * (H * V) + o_v[None, :]
        b_v = tl.load(p_value, mask=mask_t[:, None] & mask_v[None, :], other=0.0)
        b_inverse = tl.load(p_inverse + i_m * (C * C) + o_c[:, None] * C + o_c[None, :])
        b_from_start = decay_between(b_high, b_low, 0.0, 0.0, PARTS)
        b_to_end = decay_between(high_end, low_end, b_high, b_low, PARTS)
        b_seen = tl.dot(b_k, b_state.to(dtype), input_precision=PRECISION)
        b_right = b_v.to(tl.float32) - b_seen * b_from_start[:, None]
        b_solved = tl.dot(b_inverse, b_right.to(dtype), input_precision=PRECISION)
        b_written = (b_right + b_solved) * (b_beta * b_to_end)[:, None]
        b_state *= decay_between(high_end, low_end, 0.0, 0.0, PARTS)
        b_state = tl.dot(tl.trans(b_k), b_written.to(dtype), b_state, input_precision=PRECISION)
        p_gates += tl.where(i_m + 1 < stop, 3 * C, 0)
        b_high, b_low, b_beta = load_gates(p_gates, o_c, C)
        high_end = tl.load(p_gates + C - 1)
        low_end = tl.load(p_gates + 2 * C - 1)

    if values:
        tl.store(p_states + K * V + o_state, b_state, mask=mask_state)
    else:
        p_transitions += (i_nh * (segments - 2) + i_s - 1) * K * K
        o_square = o_k[:, None] * K + o_v[None, :]
        tl.store(p_transitions + o_square, b_state, mask=mask_k[:, None] & (o_v < K)[None, :])


@triton.jit(do_not_specialize=["M", "H", "segments"])
def carry_kernel(
    p_states,
    p_transitions,
    p_passing,
    p_bounds,
    p_offsets,
    T,
    M,
    H,
    segments,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    PRECISION: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """Carry states (`REVERSE`: their gradients) over the segments of one head, in place."""
    i_nh = tl.program_id(1).to(tl.int64)
    _, _, _, i_x, chunks = sequence_of(i_nh, p_bounds, p_offsets, T, M, H, C)
    p_passing += i_x
    p_states += i_nh * segments * K * V
    p_transitions += i_nh * (segments - 2) * K * K
    o_k = tl.arange(0, BK)
    o_v = tl.program_id(0) * BV + tl.arange(0, BV)
    mask_square = (o_k < K)[:, None] & (o_k < K)[None, :]
    mask_state = (o_k < K)[:, None] & (o_v < V)[None, :]
    o_state = o_k[:, None] * V + o_v[None, :]
    o_square = o_k[:, None] * K + o_k[None, :]
    if REVERSE:
        o_square = o_k[None, :] * K + o_k[:, None]
    # Segments 1..S-2, from the state before the first of them or the gradient after the last.
    first = segments - 2 if REVERSE else 1
    b_state = tl.load(p_states + first * K * V + o_state, mask=mask_state, other=0.0)
    for i in range(0, segments - 2):
        i_s = segments - 2 - i if REVERSE else 1 + i
        i_to = i_s - 1 if REVERSE else i_s + 1
        start, stop = segment_of(i_s, segments, chunks)
        whole, _ = passing(p_passing, start, stop, False)
        p_to = p_states + i_to * K * V + o_state
        b_next = tl.load(p_to, mask=mask_state, other=0.0)
        if whole >= NEGLIGIBLE_LOG2:
            p_square = p_transitions + (i_s - 1) * K * K + o_square
            b_square = tl.load(p_square, mask=mask_square, other=0.0)
            b_next = tl.dot(b_square, b_state, b_next, input_precision=PRECISION)
            tl.store(p_to, b_next, mask=mask_state)
        b_state = b_next


def carry_states(
    states_XSKV: Tensor,
    transitions_XSKK: Tensor,
    gates: Gates,
    sequences: Sequences,
    *,
    reverse: bool,
) -> None:
    """Launch `carry_kernel`: make the states between segments complete, in place.

    Args:
        states_XSKV: State before each of the S segments, as every segment alone makes it of zero;
            with `reverse` gradient of the state after each. Float32.
        transitions_XSKK: M of the segments 1..S-2, float32.
        gates: From `invert_chunks`, with `passing`.
        sequences: Where sequences and chunks begin.
        reverse: Carry gradients.
    """
    rows, segments, key_size, value_size = states_XSKV.shape
    if segments <= 2:
        return
    block_v = min(padded(value_size), 32)
    launch(
        carry_kernel,
        (-(-value_size // block_v), rows),
        states_XSKV,
        transitions_XSKK,
        gates.passing_XM,
        sequences.bounds_N1,
        sequences.offsets_N1,
        sequences.time,
        sequences.chunks,
        rows // sequences.count,
        segments,
        K=key_size,
        V=value_size,
        BK=padded(key_size),
        BV=block_v,
        C=CHUNK,
        PRECISION=precision(gates.inverse_XMCC.dtype),
        REVERSE=reverse,
        num_warps=8,
    )


def start_segments(
    k_BTGK: Tensor,
    v_BTHV: Tensor,
    gates: Gates,
    sequences: Sequences,
    initial_NHKV: Tensor | None,
    segments: int,
    tile: Tile,
) -> tuple[Tensor, Tensor]:
    """Launch `segment_kernel`, then `carry_kernel`; all tensors contiguous.

    Returns:
        The state before every segment `[X, S, K, V]`, X = sequences × heads, and the transitions
        `[X, S - 2, K, K]`, written only where they are not negligible; float32.
    """
    heads, value_size = v_BTHV.shape[2:]
    key_heads, key_size = k_BTGK.shape[2:]
    rows = sequences.count * heads
    wide = {"dtype": torch.float32, "device": v_BTHV.device}
    states_XSKV = torch.empty(rows, segments, key_size, value_size, **wide)
    transitions_XSKK = torch.empty(rows, max(segments - 2, 0), key_size, key_size, **wide)
    blocks = -(-value_size // tile.block_v)
    if segments > 2:
        blocks += -(-key_size // tile.block_v)
    launch(
        segment_kernel,
        (blocks, segments - 1, rows),
        k_BTGK,
        v_BTHV,
        gates.inverse_XMCC,
        gates.gates_XM3C,
        gates.passing_XM,
        sequences.bounds_N1,
        sequences.offsets_N1,
        initial_NHKV,
        states_XSKV,
        transitions_XSKK,
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
        PARTS=decay_parts(v_BTHV.dtype),
        PRECISION=precision(v_BTHV.dtype),
        STAGES=tile.stages,
        num_warps=tile.warps,
    )
    carry_states(states_XSKV, transitions_XSKK, gates, sequences, reverse=False)
    return states_XSKV, transitions_XSKK
