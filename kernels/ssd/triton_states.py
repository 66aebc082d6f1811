"""Decay of every chunk, and sums of states over chunks, for the Triton Mamba-2 recurrence.

Letters of the kernels: B batch, T tokens, H heads, G groups of heads, P head size, S state size, X
batch × heads, M chunks, C tokens per chunk, N segments of a sequence; `p_` pointer, `o_` offsets,
`i_` index, `b_` block in registers, `s` stride. The derivation stands in the README beside this
file.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ham.kernels.gated_delta_rule.triton_forward import decay_between, row_column_mask
from ham.kernels.gated_delta_rule.triton_inverse import LOG2_E
from ham.kernels.gated_delta_rule.triton_tiles import (
    allow_descriptors,
    decay_parts,
    padded,
    precision,
)
from ham.kernels.ssd.triton_tiles import Tile
from ham.kernels.triton_launch import launch
from ham.kernels.triton_target import target_of

ROW_BYTES = 16


class Segments(NamedTuple):
    """What the segments of every sequence add to the state on their own.

    Attributes:
        sums_XNSP: State after each segment if it were zero before it (gradient of the state before
            each segment if it were zero after it), float32.
        decays_XN: Decay over each segment, float32.
    """

    sums_XNSP: Tensor
    decays_XN: Tensor


@triton.jit
def load_decay(p_gates, o_c, C: tl.constexpr):
    """Cumulative decay of a chunk (two parts), and its last entries."""
    return (
        tl.load(p_gates + o_c),
        tl.load(p_gates + C + o_c),
        tl.load(p_gates + C - 1),
        tl.load(p_gates + 2 * C - 1),
    )


@triton.jit(do_not_specialize=["T", "M", "H"])
def gates_kernel(p_dt, p_a, p_gates, T, M, H, C: tl.constexpr, BH: tl.constexpr):
    """Cumulative `dt a` of one chunk in units of log2, as two float32 that add up to a float64,
    and dt; heads before tokens, so that later loads are contiguous."""
    i_m = tl.program_id(0)
    i_b = tl.program_id(1).to(tl.int64)
    o_t = i_m * C + tl.arange(0, C)[:, None]
    o_h = tl.program_id(2) * BH + tl.arange(0, BH)[None, :]
    b_dt = tl.load(p_dt + (i_b * T + o_t) * H + o_h, mask=(o_t < T) & (o_h < H), other=0.0)
    b_a = tl.load(p_a + o_h, mask=o_h < H, other=0.0)
    b_total = tl.cumsum(b_dt.to(tl.float64) * b_a.to(tl.float64) * LOG2_E, 0)
    b_high = b_total.to(tl.float32)
    b_low = (b_total - b_high.to(tl.float64)).to(tl.float32)
    p_out = p_gates + ((i_b * H + o_h) * M + i_m) * 3 * C + tl.arange(0, C)[:, None]
    tl.store(p_out, b_high, mask=o_h < H)
    tl.store(p_out + C, b_low, mask=o_h < H)
    tl.store(p_out + 2 * C, b_dt, mask=o_h < H)


@triton.jit
def edge_state(
    p_edge,
    p_sums,
    p_decays,
    i_x,
    first,
    count,
    step,
    segments,
    o_s,
    o_p,
    S: tl.constexpr,
    P: tl.constexpr,
    BS: tl.constexpr,
    BP: tl.constexpr,
):
    """State where a segment begins: the given one, carried over the `count` segments before it.

    `first` is the segment beside the given state and `step` 1 or -1, the direction of the walk.
    """
    mask = (o_s < S) & (o_p < P)
    b_state = tl.zeros([BS, BP], tl.float32)
    if p_edge is not None:
        b_state = tl.load(p_edge + i_x * S * P + o_p * S + o_s, mask=mask, other=0.0)
    if p_sums is not None:
        for i in range(count):
            i_n = i_x * segments + first + step * i
            b_sum = tl.load(p_sums + i_n * S * P + o_s * P + o_p, mask=mask, other=0.0)
            b_state = b_state * tl.load(p_decays + i_n) + b_sum
    return b_state


@triton.jit(do_not_specialize=["T", "M", "H", "heads_per_group", "segments", "per_segment"])
def accumulate_kernel(
    p_left,
    p_right,
    p_gates,
    p_edge,
    p_before,
    p_before_decays,
    p_states,
    p_sums,
    p_decays,
    p_last,
    sb_left,
    st_left,
    sb_right,
    st_right,
    T,
    M,
    H,
    heads_per_group,
    segments,
    per_segment,
    S: tl.constexpr,
    P: tl.constexpr,
    BS: tl.constexpr,
    BP: tl.constexpr,
    C: tl.constexpr,
    FORWARD: tl.constexpr,
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """States of one segment of one head, or with `FORWARD` false gradients of them, from the end.

    Forward `h' = end h + b^T (to_end dt x)`, backward `dh = end dh' + c^T (from_start dy)`.
    """
    i_p = tl.program_id(0)
    i_n = tl.program_id(1)
    i_x = tl.program_id(2).to(tl.int64)
    i_b = i_x // H
    i_h = i_x % H
    dtype = p_right.dtype.element_ty
    o_c = tl.arange(0, C)
    o_s = tl.arange(0, BS)
    o_p = i_p * BP + tl.arange(0, BP)
    p_left += i_b * sb_left + (i_h // heads_per_group) * S
    p_right += i_b * sb_right + i_h * P
    if DESCRIPTORS:
        left_TS = tl.make_tensor_descriptor(p_left, [T, S], [st_left, 1], [C, BS])
        right_TP = tl.make_tensor_descriptor(p_right, [T, P], [st_right, 1], [C, BP])
    o_state = o_s[:, None] * P + o_p[None, :]
    mask_state = row_column_mask(o_s < S, o_p < P, P % BP == 0)

    low_chunk = i_n * per_segment
    count = tl.minimum(M - low_chunk, per_segment)
    first = 0
    before = i_n
    step = 1
    if not FORWARD:
        first = segments - 1
        before = segments - 1 - i_n
        step = -1
    b_state = edge_state(
        p_edge,
        p_before,
        p_before_decays,
        i_x,
        first,
        before,
        step,
        segments,
        o_s[:, None],
        o_p[None, :],
        S,
        P,
        BS,
        BP,
    )
    if p_sums is not None:
        # Nobody needs what the segment at the far end adds.
        count = tl.where(before == segments - 1, 0, count)

    total = tl.zeros([], tl.float64)
    for i in tl.range(0, count, num_stages=STAGES):
        i_m = low_chunk + (i if FORWARD else count - 1 - i)
        p_g = p_gates + (i_x * M + i_m) * 3 * C
        b_high, b_low, high_end, low_end = load_decay(p_g, o_c, C)
        if DESCRIPTORS:
            b_left = left_TS.load([i_m * C, 0])
            b_right = right_TP.load([i_m * C, i_p * BP])
        else:
            mask_t = i_m * C + o_c < T
            o_t = (i_m * C + o_c).to(tl.int64)[:, None]
            mask_left = row_column_mask(mask_t, o_s < S, S == BS)
            mask_right = row_column_mask(mask_t, o_p < P, P % BP == 0)
            b_left = tl.load(p_left + o_t * st_left + o_s[None, :], mask=mask_left, other=0.0)
            b_right = tl.load(p_right + o_t * st_right + o_p[None, :], mask=mask_right, other=0.0)
        if p_states is not None:
            p_before_chunk = p_states + (i_x * M + i_m) * S * P
            tl.store(p_before_chunk + o_state, b_state.to(dtype), mask=mask_state)
        if FORWARD:
            b_weight = decay_between(high_end, low_end, b_high, b_low, PARTS)
            b_weight *= tl.load(p_g + 2 * C + o_c)
        else:
            b_weight = decay_between(b_high, b_low, 0.0, 0.0, PARTS)
        b_weighted = (b_right.to(tl.float32) * b_weight[:, None]).to(dtype)
        b_state *= decay_between(high_end, low_end, 0.0, 0.0, PARTS)
        b_state = tl.dot(tl.trans(b_left), b_weighted, b_state, input_precision=PRECISION)
        total += high_end.to(tl.float64) + low_end.to(tl.float64)

    if p_sums is not None:
        i_out = i_x * segments + i_n
        tl.store(p_sums + i_out * S * P + o_state, b_state, mask=mask_state)
        tl.store(p_decays + i_out, tl.exp2(total.to(tl.float32)), mask=i_p == 0)
    if p_last is not None:
        # The layout of the caller: P before S.
        o_last = o_p[None, :] * S + o_s[:, None]
        tl.store(p_last + i_x * S * P + o_last, b_state, mask=mask_state & (before == segments - 1))


def strided_rows(tensor: Tensor) -> Tensor:
    """`tensor` itself if the last two axes are contiguous, else a contiguous copy."""
    packed = tensor.stride(-1) == 1 and (
        tensor.shape[-2] == 1 or tensor.stride(-2) == tensor.shape[-1]
    )
    return tensor if packed else tensor.contiguous()


def use_descriptors(tile: Tile, *tensors: Tensor) -> bool:
    """Whether a kernel loads `tensors` through tensor descriptors, which Hopper has hardware for.

    Not in float32, nor with one pipeline stage: Triton 3.6 compiles that to accesses out of bounds
    now and then (seen with the gated delta rule).
    """
    if not tile.descriptors or tile.stages < 2 or tensors[0].dtype == torch.float32:
        return False
    if target_of(tensors[0].device).capability < (9, 0):
        return False
    return all(
        tensor.data_ptr() % ROW_BYTES == 0
        and all(
            stride * tensor.element_size() % ROW_BYTES == 0
            for stride, size in zip(tensor.stride()[:-1], tensor.shape, strict=False)
            if size > 1
        )
        for tensor in tensors
    )


def chunk_gates(dt_BTH: Tensor, a_H: Tensor, chunk: int) -> Tensor:
    """Launch `gates_kernel`; returns `gates_XM3C`, float32: cumulative decay, high and low part,
    and dt, zero beyond the end of the sequence."""
    batch, time, heads = dt_BTH.shape
    chunks = -(-time // chunk)
    gates_XM3C = torch.empty(
        batch * heads, chunks, 3, chunk, dtype=torch.float32, device=dt_BTH.device
    )
    block = min(16, (1 << (heads - 1).bit_length()))
    launch(
        gates_kernel,
        (chunks, batch, -(-heads // block)),
        dt_BTH,
        a_H,
        gates_XM3C,
        time,
        chunks,
        heads,
        C=chunk,
        BH=block,
        num_warps=4,
    )
    return gates_XM3C


def accumulate(
    left_BTGS: Tensor,
    right_BTHP: Tensor,
    gates_XM3C: Tensor,
    edge_BHPS: Tensor | None,
    before: Segments | None,
    segments: int,
    tile: Tile,
    *,
    forward: bool,
    sums: Segments | None = None,
    states_XMSP: Tensor | None = None,
    last_BHPS: Tensor | None = None,
) -> None:
    """Launch `accumulate_kernel`.

    Args:
        left_BTGS: b, or backward c.
        right_BTHP: x, or backward the gradient of y; the dtype of b and c.
        gates_XM3C: From `chunk_gates`.
        edge_BHPS: State where the walk begins, float32. Default: zeros.
        before: Sums over the segments, from an earlier launch; needed if there are several.
        segments: Segments of a sequence.
        tile: How to cut the work.
        forward: Direction of the walk.
        sums: Filled with sums over the segments.
        states_XMSP: Filled with the state where each chunk begins, seen in walking direction.
        last_BHPS: Filled with the state where the walk ends, float32.
    """
    batch, time, heads, head_size = right_BTHP.shape
    groups, state_size = left_BTGS.shape[2:]
    chunks = gates_XM3C.shape[1]
    descriptors = use_descriptors(tile, left_BTGS, right_BTHP)
    if descriptors:
        allow_descriptors()
    launch(
        accumulate_kernel,
        (-(-head_size // tile.block_p), segments, batch * heads),
        left_BTGS,
        right_BTHP,
        gates_XM3C,
        edge_BHPS,
        *(before or (None, None)),
        states_XMSP,
        *(sums or (None, None)),
        last_BHPS,
        left_BTGS.stride(0),
        left_BTGS.stride(1),
        right_BTHP.stride(0),
        right_BTHP.stride(1),
        time,
        chunks,
        heads,
        heads // groups,
        segments,
        -(-chunks // segments),
        S=state_size,
        P=head_size,
        BS=padded(state_size),
        BP=tile.block_p,
        C=tile.chunk,
        FORWARD=forward,
        PARTS=decay_parts(right_BTHP.dtype),
        PRECISION=precision(right_BTHP.dtype),
        DESCRIPTORS=descriptors,
        STAGES=tile.stages,
        num_warps=tile.warps,
    )


def sum_segments(
    left_BTGS: Tensor,
    right_BTHP: Tensor,
    gates_XM3C: Tensor,
    segments: int,
    tile: Tile,
    *,
    forward: bool,
) -> Segments | None:
    """What each segment adds to the state; None for a single segment."""
    if segments == 1:
        return None
    rows, head_size, state_size = gates_XM3C.shape[0], right_BTHP.shape[3], left_BTGS.shape[3]
    wide = {"dtype": torch.float32, "device": right_BTHP.device}
    sums = Segments(
        torch.empty(rows, segments, state_size, head_size, **wide),
        torch.empty(rows, segments, **wide),
    )
    accumulate(
        left_BTGS, right_BTHP, gates_XM3C, None, None, segments, tile, forward=forward, sums=sums
    )
    return sums
