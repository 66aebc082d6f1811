"""Launches 1 and 2 of Triton routed attention: routed tokens to packed keys and values.

Letters of the kernels: B batch, T time, G key/value heads, N packed rows, D head size; `p_x` a
pointer, `i_x` a program index, `o_x` offsets, `b_x` a block in registers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ham.kernels.routed_attention.triton_tiles import PACK_ROWS, packed_rows, padded
from ham.kernels.triton_launch import launch

SCAN_TOKENS = 1024
# 32,768 flags in four steps of 32 bytes a thread.
SUM_TOKENS = 8192
COPY_ROWS = 64


class Index(NamedTuple):
    """Where the routed tokens are.

    Attributes:
        positions_BN: Int32; positions of the routed tokens in increasing order, then T.
        counts_BT: Int32; inclusive cumulative count of routed tokens.
    """

    positions_BN: Tensor
    counts_BT: Tensor


@triton.jit(do_not_specialize=["T", "N"])
def scan_kernel(
    p_routed,
    p_positions,
    p_counts,
    T,
    N,
    BT: tl.constexpr,
    BS: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Index of BT tokens. Every program sums all flags of its sequence itself: 32 KB at T = 32768,
    which costs less than a second launch or a wait for the program before."""
    i_b = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * BT
    if ALIGNED:
        # Tells the compiler so: flags are then loaded 16 at a time instead of one by one.
        T = T // 16 * 16
    p_routed += i_b * T
    before = tl.zeros([BS], tl.int32)
    total = tl.zeros([BS], tl.int32)
    for i_s in range(0, T, BS):
        o_s = i_s + tl.arange(0, BS)
        b_flag = tl.load(p_routed + o_s, mask=o_s < T, other=0).to(tl.int32)
        total += b_flag
        before += tl.where(o_s < first, b_flag, 0)
    o_t = first + tl.arange(0, BT)
    b_routed = tl.load(p_routed + o_t, mask=o_t < T, other=0).to(tl.int32)
    b_count = tl.sum(before) + tl.cumsum(b_routed, 0)
    tl.store(p_counts + i_b * T + o_t, b_count, mask=o_t < T)
    p_positions += i_b * N
    tl.store(p_positions + b_count - 1, o_t, mask=b_routed != 0)
    T_vector = tl.zeros([BT], tl.int32) + T
    tl.store(p_positions + o_t, T_vector, mask=(o_t >= tl.sum(total)) & (o_t < N))


@triton.jit
def copy_rows(p_from, p_to, o_from, o_to, mask, D: tl.constexpr, BD: tl.constexpr):
    """Rows where `mask`, zeros elsewhere."""
    o_d = tl.arange(0, BD)[None, :]
    b_x = tl.load(p_from + o_from * D + o_d, mask=mask & (o_d < D), other=0.0)
    tl.store(p_to + o_to * D + o_d, b_x, mask=o_d < D)


@triton.jit(do_not_specialize=["T", "N", "G"])
def pack_kernel(
    p_k,
    p_v,
    p_positions,
    p_counts,
    p_packed_k,
    p_packed_v,
    T,
    N,
    G,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    BS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """BS packed rows of one head; rows beyond the count are zero up to a multiple of ROWS."""
    i_bg = tl.program_id(0).to(tl.int64)
    i_b = i_bg // G
    count = tl.load(p_counts + i_b * T + T - 1)
    if tl.program_id(1) * BS >= (count + ROWS - 1) // ROWS * ROWS:
        return
    o_n = tl.program_id(1) * BS + tl.arange(0, BS)[:, None]
    b_position = tl.load(p_positions + i_b * N + o_n)
    o_from = (i_b * T + b_position) * G + i_bg % G
    o_to = i_bg * N + o_n
    copy_rows(p_k, p_packed_k, o_from, o_to, o_n < count, K, BK)
    copy_rows(p_v, p_packed_v, o_from, o_to, o_n < count, V, BV)


def scan(routed_BT: Tensor) -> Index:
    """Launch `scan_kernel` on a contiguous boolean tensor."""
    batch, time = routed_BT.shape
    rows = packed_rows(time)
    index = Index(
        torch.empty(batch, rows, dtype=torch.int32, device=routed_BT.device),
        torch.empty(batch, time, dtype=torch.int32, device=routed_BT.device),
    )
    launch(
        scan_kernel,
        (-(-rows // SCAN_TOKENS), batch),
        routed_BT.view(torch.uint8),
        *index,
        time,
        rows,
        BT=SCAN_TOKENS,
        BS=SUM_TOKENS,
        ALIGNED=time % 16 == 0,
        num_warps=8,
    )
    return index


def pack(k_BTGK: Tensor, v_BTGV: Tensor, index: Index) -> tuple[Tensor, Tensor]:
    """Launch `pack_kernel` on contiguous tensors; returns keys and values as `[B, G, N, D]`.

    Only the routed rows are moved. What lies beyond the first multiple of `PACK_ROWS` after the
    count is not written.
    """
    batch, time, groups, key_size = k_BTGK.shape
    value_size = v_BTGV.shape[-1]
    rows = index.positions_BN.shape[1]
    k_BGNK = k_BTGK.new_empty(batch, groups, rows, key_size)
    v_BGNV = v_BTGV.new_empty(batch, groups, rows, value_size)
    launch(
        pack_kernel,
        (batch * groups, rows // COPY_ROWS),
        k_BTGK,
        v_BTGV,
        *index,
        k_BGNK,
        v_BGNV,
        time,
        rows,
        groups,
        K=key_size,
        V=value_size,
        BK=padded(key_size),
        BV=padded(value_size),
        BS=COPY_ROWS,
        ROWS=PACK_ROWS,
        num_warps=4,
    )
    return k_BGNK, v_BGNV
