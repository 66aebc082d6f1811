"""Forward walk of the Triton Mamba-2 recurrence: read-outs, final state, states for the backward.

One program owns a block of P columns of one head and one segment of its chunks, with the state on
chip. Letters of the kernels as in `triton_states.py`; the derivation stands in the README beside
this file.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ham.kernels.gated_delta_rule.triton_forward import (
    decay_between,
    masked_decay,
    row_column_mask,
)
from ham.kernels.gated_delta_rule.triton_tiles import (
    allow_descriptors,
    decay_parts,
    padded,
    precision,
)
from ham.kernels.ssd.triton_states import (
    Segments,
    edge_state,
    load_decay,
    use_descriptors,
)
from ham.kernels.ssd.triton_tiles import Tile
from ham.kernels.triton_launch import launch


class Walked(NamedTuple):
    """What the forward walk writes.

    Attributes:
        y_BTHP: Read-out in the dtype of x.
        final_state_BHPS: State after the last token, float32.
        states_XMSP: State before every chunk in the dtype of x; None when not asked for.
    """

    y_BTHP: Tensor
    final_state_BHPS: Tensor
    states_XMSP: Tensor | None


@triton.jit(do_not_specialize=["T", "M", "H", "heads_per_group", "segments", "per_segment"])
def walk_kernel(
    p_x,
    p_b,
    p_c,
    p_d,
    p_gates,
    p_initial,
    p_before,
    p_before_decays,
    p_y,
    p_final,
    p_states,
    sb_x,
    st_x,
    sb_b,
    st_b,
    sb_c,
    st_c,
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
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Read-outs and states of one segment of one head, for one block of P columns."""
    i_p = tl.program_id(0)
    i_n = tl.program_id(1)
    i_x = tl.program_id(2).to(tl.int64)
    i_b = i_x // H
    i_h = i_x % H
    dtype = p_x.dtype.element_ty
    o_c = tl.arange(0, C)
    o_s = tl.arange(0, BS)
    o_p = i_p * BP + tl.arange(0, BP)
    p_x += i_b * sb_x + i_h * P
    p_b += i_b * sb_b + (i_h // heads_per_group) * S
    p_c += i_b * sb_c + (i_h // heads_per_group) * S
    p_y += (i_b * T * H + i_h) * P
    if DESCRIPTORS:
        x_TP = tl.make_tensor_descriptor(p_x, [T, P], [st_x, 1], [C, BP])
        b_TS = tl.make_tensor_descriptor(p_b, [T, S], [st_b, 1], [C, BS])
        c_TS = tl.make_tensor_descriptor(p_c, [T, S], [st_c, 1], [C, BS])
    o_state = o_s[:, None] * P + o_p[None, :]
    mask_state = row_column_mask(o_s < S, o_p < P, P % BP == 0)
    causal = o_c[:, None] >= o_c[None, :]
    skip = tl.load(p_d + i_h)
    b_state = edge_state(
        p_initial,
        p_before,
        p_before_decays,
        i_x,
        0,
        i_n,
        1,
        segments,
        o_s[:, None],
        o_p[None, :],
        S,
        P,
        BS,
        BP,
    )

    # Decays are carried from chunk to chunk instead of loaded where used: as pipelined loads they
    # would take shared memory that a second program on the multiprocessor needs.
    first = i_n * per_segment
    last = tl.minimum(first + per_segment, M)
    p_gates += (i_x * M + tl.minimum(first, M - 1)) * 3 * C
    b_high, b_low, high_end, low_end = load_decay(p_gates, o_c, C)
    b_dt = tl.load(p_gates + 2 * C + o_c)
    for i_m in tl.range(first, last, num_stages=STAGES):
        mask_t = i_m * C + o_c < T
        o_t = (i_m * C + o_c).to(tl.int64)[:, None]
        mask_x = row_column_mask(mask_t, o_p < P, P % BP == 0)
        if DESCRIPTORS:
            b_b = b_TS.load([i_m * C, 0])
            b_c = c_TS.load([i_m * C, 0])
            b_x = x_TP.load([i_m * C, i_p * BP])
        else:
            mask_s = row_column_mask(mask_t, o_s < S, S == BS)
            b_b = tl.load(p_b + o_t * st_b + o_s[None, :], mask=mask_s, other=0.0)
            b_c = tl.load(p_c + o_t * st_c + o_s[None, :], mask=mask_s, other=0.0)
            b_x = tl.load(p_x + o_t * st_x + o_p[None, :], mask=mask_x, other=0.0)
        b_narrow = b_state.to(dtype)
        if p_states is not None:
            tl.store(p_states + (i_x * M + i_m) * S * P + o_state, b_narrow, mask=mask_state)

        b_y = tl.dot(b_c, b_narrow, input_precision=PRECISION)
        b_y *= decay_between(b_high, b_low, 0.0, 0.0, PARTS)[:, None]
        b_within = tl.dot(b_c, tl.trans(b_b), input_precision=PRECISION)
        b_within *= masked_decay(b_high, b_low, causal, True, PARTS) * b_dt[None, :]
        b_y = tl.dot(b_within.to(dtype), b_x, b_y, input_precision=PRECISION)
        b_wide = b_x.to(tl.float32)
        b_y += skip * b_wide
        tl.store(p_y + o_t * (H * P) + o_p[None, :], b_y.to(dtype), mask=mask_x)

        b_weight = b_dt * decay_between(high_end, low_end, b_high, b_low, PARTS)
        b_weighted = (b_wide * b_weight[:, None]).to(dtype)
        b_state *= decay_between(high_end, low_end, 0.0, 0.0, PARTS)
        b_state = tl.dot(tl.trans(b_b), b_weighted, b_state, input_precision=PRECISION)
        p_gates += tl.where(i_m < M - 1, 3 * C, 0)
        b_high, b_low, high_end, low_end = load_decay(p_gates, o_c, C)
        b_dt = tl.load(p_gates + 2 * C + o_c)

    # The layout of the caller: P before S.
    o_final = o_p[None, :] * S + o_s[:, None]
    tl.store(p_final + i_x * S * P + o_final, b_state, mask=mask_state & (i_n == segments - 1))


def walk(
    x_BTHP: Tensor,
    b_BTGS: Tensor,
    c_BTGS: Tensor,
    d_H: Tensor,
    gates_XM3C: Tensor,
    initial_state_BHPS: Tensor | None,
    before: Segments | None,
    segments: int,
    tile: Tile,
    *,
    save: bool,
) -> Walked:
    """Launch `walk_kernel`.

    Args:
        x_BTHP: Inputs, float32 or bfloat16 like b and c; the last two axes contiguous.
        b_BTGS: Input projections.
        c_BTGS: Output projections.
        d_H: Skip weights, float32.
        gates_XM3C: From `chunk_gates`.
        initial_state_BHPS: State before the first token, float32. Default: zeros.
        before: Sums over the segments; needed if there are several.
        segments: Segments of a sequence.
        tile: How to cut the work.
        save: Write the states that the backward needs.
    """
    batch, time, heads, head_size = x_BTHP.shape
    groups, state_size = b_BTGS.shape[2:]
    chunks = gates_XM3C.shape[1]
    device = x_BTHP.device
    state_shape = (batch * heads, chunks, state_size, head_size)
    walked = Walked(
        torch.empty(x_BTHP.shape, dtype=x_BTHP.dtype, device=device),
        torch.empty(batch, heads, head_size, state_size, dtype=torch.float32, device=device),
        torch.empty(state_shape, dtype=x_BTHP.dtype, device=device) if save else None,
    )
    descriptors = use_descriptors(tile, x_BTHP, b_BTGS, c_BTGS)
    if descriptors:
        allow_descriptors()
    launch(
        walk_kernel,
        (-(-head_size // tile.block_p), segments, batch * heads),
        x_BTHP,
        b_BTGS,
        c_BTGS,
        d_H,
        gates_XM3C,
        initial_state_BHPS,
        *(before or (None, None)),
        *walked,
        x_BTHP.stride(0),
        x_BTHP.stride(1),
        b_BTGS.stride(0),
        b_BTGS.stride(1),
        c_BTGS.stride(0),
        c_BTGS.stride(1),
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
        PARTS=decay_parts(x_BTHP.dtype),
        PRECISION=precision(x_BTHP.dtype),
        DESCRIPTORS=descriptors,
        STAGES=tile.stages,
        num_warps=tile.warps,
    )
    return walked
