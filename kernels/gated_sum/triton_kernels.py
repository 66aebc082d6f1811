"""Triton kernels of the gated sum of two normed read-outs, and their launches.

Letters of the kernels: B batch, T time, H heads, V size of a head; `p_x` a pointer, `i_x` a program
index, `o_x` offsets, `b_x` a block in registers. All arithmetic is float32. A row is one head of
one token.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ham.kernels.gated_sum.reference import EPSILON
from ham.kernels.triton_launch import launch

# Elements that a program holds of each tensor: 16 a thread of 4 warps.
BLOCK = 2048
# Rows of one program of the backward, whose shares of the gains are added afterwards.
SEGMENT_ROWS = 1024
WARPS = 4


@triton.jit
def normed_rows(p_x, o_row, o_v, mask, V: tl.constexpr, EPSILON: tl.constexpr):
    """Rows over their root mean square, and one over that."""
    b_x = tl.load(p_x + o_row * V + o_v, mask=mask, other=0.0).to(tl.float32)
    b_scale = tl.rsqrt(tl.sum(b_x * b_x, 1)[:, None] / V + EPSILON)
    return b_x * b_scale, b_scale


@triton.jit
def gate_of(p_gates, o_row, offset, mask_row, H: tl.constexpr):
    """Opened gate of each row, and where it stands."""
    o_gate = o_row // H * 2 * H + offset + o_row % H
    b_logit = tl.load(p_gates + o_gate, mask=mask_row, other=0.0).to(tl.float32)
    return tl.sigmoid(b_logit), o_gate


@triton.jit(do_not_specialize=["rows"])
def forward_kernel(
    p_recurrent,
    p_attended,
    p_gates,
    p_recurrent_gain,
    p_attention_gain,
    p_y,
    rows,
    H: tl.constexpr,
    V: tl.constexpr,
    BR: tl.constexpr,
    BV: tl.constexpr,
    EPSILON: tl.constexpr,
):
    """BR rows."""
    o_row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)[:, None]
    o_v = tl.arange(0, BV)[None, :]
    mask_row, mask_v = o_row < rows, o_v < V
    mask = mask_row & mask_v
    b_recurrent, _ = normed_rows(p_recurrent, o_row, o_v, mask, V, EPSILON)
    b_attended, _ = normed_rows(p_attended, o_row, o_v, mask, V, EPSILON)
    b_recurrent *= tl.load(p_recurrent_gain + o_v, mask=mask_v, other=0.0).to(tl.float32)
    b_attended *= tl.load(p_attention_gain + o_v, mask=mask_v, other=0.0).to(tl.float32)
    b_recurrent_gate, _ = gate_of(p_gates, o_row, 0, mask_row, H)
    b_attention_gate, _ = gate_of(p_gates, o_row, H, mask_row, H)
    b_y = b_recurrent_gate * b_recurrent + b_attention_gate * b_attended
    tl.store(p_y + o_row * V + o_v, b_y.to(p_y.dtype.element_ty), mask=mask)


@triton.jit
def branch_gradient(
    p_x,
    p_gates,
    p_dx,
    p_dgates,
    b_gain,
    b_dy,
    o_row,
    o_v,
    offset,
    mask_row,
    mask,
    H: tl.constexpr,
    V: tl.constexpr,
    EPSILON: tl.constexpr,
):
    """Writes the gradients of one branch's rows and gates; returns its rows' share of the gain."""
    b_normed, b_scale = normed_rows(p_x, o_row, o_v, mask, V, EPSILON)
    b_gate, o_gate = gate_of(p_gates, o_row, offset, mask_row, H)
    b_product = b_dy * b_normed
    b_dgate = tl.sum(b_product * b_gain, 1)[:, None] * b_gate * (1.0 - b_gate)
    tl.store(p_dgates + o_gate, b_dgate.to(p_dgates.dtype.element_ty), mask=mask_row)
    b_dn = b_dy * b_gate * b_gain
    b_along = tl.sum(b_dn * b_normed, 1)[:, None] / V
    b_dx = (b_dn - b_normed * b_along) * b_scale
    tl.store(p_dx + o_row * V + o_v, b_dx.to(p_dx.dtype.element_ty), mask=mask)
    return tl.sum(b_product * b_gate, 0)[None, :]


@triton.jit(do_not_specialize=["rows"])
def backward_kernel(
    p_recurrent,
    p_attended,
    p_gates,
    p_recurrent_gain,
    p_attention_gain,
    p_dy,
    p_drecurrent,
    p_dattended,
    p_dgates,
    p_dgains,
    rows,
    H: tl.constexpr,
    V: tl.constexpr,
    BR: tl.constexpr,
    BV: tl.constexpr,
    STEPS: tl.constexpr,
    EPSILON: tl.constexpr,
):
    """STEPS blocks of BR rows."""
    i_s = tl.program_id(0).to(tl.int64)
    o_v = tl.arange(0, BV)[None, :]
    mask_v = o_v < V
    b_recurrent_gain = tl.load(p_recurrent_gain + o_v, mask=mask_v, other=0.0).to(tl.float32)
    b_attention_gain = tl.load(p_attention_gain + o_v, mask=mask_v, other=0.0).to(tl.float32)
    b_drecurrent_gain = tl.zeros([1, BV], tl.float32)
    b_dattention_gain = tl.zeros([1, BV], tl.float32)
    steps = tl.cdiv(tl.minimum(rows - i_s * STEPS * BR, STEPS * BR), BR)
    for i_step in range(steps):
        o_row = (i_s * STEPS + i_step) * BR + tl.arange(0, BR)[:, None]
        mask_row = o_row < rows
        mask = mask_row & mask_v
        b_dy = tl.load(p_dy + o_row * V + o_v, mask=mask, other=0.0).to(tl.float32)
        b_drecurrent_gain += branch_gradient(
            p_recurrent,
            p_gates,
            p_drecurrent,
            p_dgates,
            b_recurrent_gain,
            b_dy,
            o_row,
            o_v,
            0,
            mask_row,
            mask,
            H,
            V,
            EPSILON,
        )
        b_dattention_gain += branch_gradient(
            p_attended,
            p_gates,
            p_dattended,
            p_dgates,
            b_attention_gain,
            b_dy,
            o_row,
            o_v,
            H,
            mask_row,
            mask,
            H,
            V,
            EPSILON,
        )
    p_dgains += i_s * 2 * V
    tl.store(p_dgains + o_v, b_drecurrent_gain, mask=mask_v)
    tl.store(p_dgains + V + o_v, b_dattention_gain, mask=mask_v)


class Gradients(NamedTuple):
    """Of everything; those of the gains in float32."""

    drecurrent_BTHV: Tensor
    dattended_BTHV: Tensor
    dgates_BTH: Tensor
    drecurrent_gain_V: Tensor
    dattention_gain_V: Tensor


def block_rows(size: int) -> tuple[int, int]:
    """Rows of a block and the padded size of a head."""
    padded = triton.next_power_of_2(size)
    return max(BLOCK // padded, 8), padded


def add(
    recurrent_BTHV: Tensor,
    attended_BTHV: Tensor,
    gates_BTH: Tensor,
    recurrent_gain_V: Tensor,
    attention_gain_V: Tensor,
) -> Tensor:
    """Launch `forward_kernel` on contiguous tensors."""
    batch, length, heads, size = recurrent_BTHV.shape
    rows = batch * length * heads
    block, padded = block_rows(size)
    y_BTHV = torch.empty_like(recurrent_BTHV)
    launch(
        forward_kernel,
        (triton.cdiv(rows, block),),
        recurrent_BTHV,
        attended_BTHV,
        gates_BTH,
        recurrent_gain_V,
        attention_gain_V,
        y_BTHV,
        rows,
        H=heads,
        V=size,
        BR=block,
        BV=padded,
        EPSILON=EPSILON,
        num_warps=WARPS,
    )
    return y_BTHV


def gradients(
    dy_BTHV: Tensor,
    recurrent_BTHV: Tensor,
    attended_BTHV: Tensor,
    gates_BTH: Tensor,
    recurrent_gain_V: Tensor,
    attention_gain_V: Tensor,
) -> Gradients:
    """Launch `backward_kernel` on contiguous tensors."""
    batch, length, heads, size = recurrent_BTHV.shape
    rows = batch * length * heads
    block, padded = block_rows(size)
    segments = triton.cdiv(rows, SEGMENT_ROWS)
    made = [torch.empty_like(x) for x in (recurrent_BTHV, attended_BTHV, gates_BTH)]
    dgains_S2V = dy_BTHV.new_empty(segments, 2, size, dtype=torch.float32)
    launch(
        backward_kernel,
        (segments,),
        recurrent_BTHV,
        attended_BTHV,
        gates_BTH,
        recurrent_gain_V,
        attention_gain_V,
        dy_BTHV,
        *made,
        dgains_S2V,
        rows,
        H=heads,
        V=size,
        BR=block,
        BV=padded,
        STEPS=SEGMENT_ROWS // block,
        EPSILON=EPSILON,
        num_warps=WARPS,
    )
    # Two sums: an operator must not return two views of one tensor.
    return Gradients(*made, dgains_S2V[:, 0].sum(0), dgains_S2V[:, 1].sum(0))
