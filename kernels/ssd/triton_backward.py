"""Backward of the Triton Mamba-2 recurrence after the reverse walk: launches and last sums.

The states before and the gradients of the states after every chunk exist already; all else is local
to a chunk. Letters of the kernels as in `triton_states.py`; N blocks of heads of a group. The
derivation stands in the README beside this file.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ham.kernels.gated_delta_rule.triton_tiles import decay_parts, padded, precision
from ham.kernels.ssd.triton_group_gradients import group_gradient_kernel
from ham.kernels.ssd.triton_head_gradients import gradient_kernel
from ham.kernels.ssd.triton_tiles import Kernel, Tile, count_head_blocks
from ham.kernels.triton_launch import launch
from ham.kernels.triton_target import target_of


class Gradients(NamedTuple):
    """Gradients of everything but the initial state: x, b and c in their dtype, else float32."""

    dx_BTHP: Tensor
    ddt_BTH: Tensor
    da_H: Tensor
    db_BTGS: Tensor
    dc_BTGS: Tensor
    dd_H: Tensor


@triton.jit(do_not_specialize=["T", "M", "H"])
def step_kernel(p_flow, p_gates, p_a, p_ddt, p_rate, T, M, H, C: tl.constexpr, BH: tl.constexpr):
    """Gradient of dt, and the part of one chunk in the gradient of a."""
    i_m = tl.program_id(0)
    i_b = tl.program_id(1).to(tl.int64)
    o_c = tl.arange(0, C)[:, None]
    o_h = tl.program_id(2) * BH + tl.arange(0, BH)[None, :]
    mask = o_h < H
    i_xm = (i_b * H + o_h) * M + i_m
    p_f = p_flow + i_xm * 3 * C + o_c
    b_decay = tl.load(p_f, mask=mask, other=0.0) + tl.load(p_f + C, mask=mask, other=0.0)
    b_along = tl.load(p_f + 2 * C, mask=mask, other=0.0)
    b_dt = tl.load(p_gates + i_xm * 3 * C + 2 * C + o_c, mask=mask, other=0.0)
    b_a = tl.load(p_a + o_h, mask=mask, other=0.0)
    o_t = i_m * C + o_c
    p_out = p_ddt + (i_b * T + o_t) * H + o_h
    tl.store(p_out, b_a * b_decay + b_along, mask=mask & (o_t < T))
    tl.store(p_rate + i_xm, tl.sum(b_dt * b_decay, 0)[None, :], mask=mask)


def step_gradients(
    flow_XM3C: Tensor, gates_XM3C: Tensor, a_H: Tensor, rate_XM: Tensor, batch: int, time: int
) -> Tensor:
    """Launch `step_kernel`; returns `ddt_BTH` and fills `rate_XM`, whose sum over batch and chunks
    is the gradient of a."""
    chunks, chunk, heads = gates_XM3C.shape[1], gates_XM3C.shape[3], a_H.shape[0]
    ddt_BTH = torch.empty(batch, time, heads, dtype=torch.float32, device=a_H.device)
    block = min(16, (1 << (heads - 1).bit_length()))
    launch(
        step_kernel,
        (chunks, batch, -(-heads // block)),
        flow_XM3C,
        gates_XM3C,
        a_H,
        ddt_BTH,
        rate_XM,
        time,
        chunks,
        heads,
        C=chunk,
        BH=block,
        num_warps=4,
    )
    return ddt_BTH


def gradients(
    x_BTHP: Tensor,
    dy_BTHP: Tensor,
    b_BTGS: Tensor,
    c_BTGS: Tensor,
    a_H: Tensor,
    d_H: Tensor,
    gates_XM3C: Tensor,
    states_XMSP: Tensor,
    dstates_XMSP: Tensor,
    kernel: Kernel,
    tile: Tile,
) -> Gradients:
    """Launch `gradient_kernel` or `group_gradient_kernel`, then `step_kernel`.

    Args:
        x_BTHP: Inputs, the last two axes contiguous, as of every sequence here.
        dy_BTHP: Gradient of the read-outs, in their dtype.
        b_BTGS: Input projections.
        c_BTGS: Output projections.
        a_H: Decay rates, float32.
        d_H: Skip weights, float32.
        gates_XM3C: From `chunk_gates`.
        states_XMSP: State before every chunk.
        dstates_XMSP: Gradient of the state after every chunk.
        kernel: From `choose_gradient`; `gradient` only for b and c per head.
        tile: How to cut the work.
    """
    batch, time, heads, head_size = x_BTHP.shape
    groups, state_size = b_BTGS.shape[2:]
    chunks = gates_XM3C.shape[1]
    device = x_BTHP.device
    own = kernel == "gradient"
    blocks = 1
    if not own:
        # The two programs for b and c decide how long the launch takes.
        programs = 2 * batch * chunks * groups
        blocks = count_head_blocks(heads // groups, programs, target_of(device).multiprocessors)
    per_block = -(-(heads // groups) // blocks)
    partial = (blocks, *b_BTGS.shape)
    dtype = b_BTGS.dtype if blocks == 1 else torch.float32
    db_NBTGS = torch.empty(partial, dtype=dtype, device=device)
    dc_NBTGS = torch.empty(partial, dtype=dtype, device=device)
    dx_BTHP = torch.empty(x_BTHP.shape, dtype=x_BTHP.dtype, device=device)
    flow_XM3C = torch.empty(gates_XM3C.shape, dtype=torch.float32, device=device)
    sums_2BHM = torch.empty(2, batch, heads, chunks, dtype=torch.float32, device=device)
    arguments = (
        x_BTHP,
        dy_BTHP,
        b_BTGS,
        c_BTGS,
        d_H,
        gates_XM3C,
        states_XMSP,
        dstates_XMSP,
        dx_BTHP,
        db_NBTGS,
        dc_NBTGS,
        flow_XM3C,
        sums_2BHM[1],
        *(tensor.stride(i) for tensor in (x_BTHP, dy_BTHP, b_BTGS, c_BTGS) for i in (0, 1)),
        time,
        chunks,
        heads,
    )
    options = {
        "S": state_size,
        "P": head_size,
        "BS": padded(state_size),
        "BP": tile.block_p,
        "C": tile.chunk,
        "PARTS": decay_parts(x_BTHP.dtype),
        "PRECISION": precision(x_BTHP.dtype),
        "STAGES": tile.stages,
        "num_warps": tile.warps,
    }
    if own:
        sides = 2 if tile.split else 1
        launch(
            gradient_kernel, (heads * sides, chunks, batch), *arguments, SPLIT=tile.split, **options
        )
    else:
        launch(
            group_gradient_kernel,
            (groups * (per_block + 2), chunks, batch * blocks),
            *arguments,
            groups,
            heads // groups,
            per_block,
            blocks,
            WIDE=padded(head_size),
            **options,
        )
    ddt_BTH = step_gradients(flow_XM3C, gates_XM3C, a_H, sums_2BHM[0], batch, time)
    da_H, dd_H = (each.sum((0, 2)) for each in sums_2BHM)
    if blocks == 1:
        return Gradients(dx_BTHP, ddt_BTH, da_H, db_NBTGS[0], dc_NBTGS[0], dd_H)
    db_BTGS, dc_BTGS = (each.sum(0).to(b_BTGS.dtype) for each in (db_NBTGS, dc_NBTGS))
    return Gradients(dx_BTHP, ddt_BTH, da_H, db_BTGS, dc_BTGS, dd_H)
