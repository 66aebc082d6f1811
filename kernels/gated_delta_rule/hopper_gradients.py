"""The gradients local to a chunk for Hopper, written in Gluon; bfloat16 only.

The same mathematics as `triton_gradient_kernels.gradient_kernel`. That kernel takes 64 key columns
a program and reads dO, r, W and both states again from the L2 cache for the second 64, with spilled
registers: 1.03 ms at B8 T4096 H16 D128 on one H100, twice the time that its bytes need. Here one
program owns all columns of a chunk, keeps its tiles in shared memory (112 KiB, so that two programs
fit on a multiprocessor), takes the states in two halves of key columns, and walks several chunks so
that the loads of the next one start while this one is finished. Sums over the products Q K^T and
K K^T are taken in an order that does not need them (README beside this file). What is made of F and
G, each times beta, carries one rounding, as gradients of the decay are left of terms that cancel.
Letters as in `triton_forward.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ham.kernels.gated_delta_rule.hopper_walk import decay_where, fetch, fetch_pair
from ham.kernels.gated_delta_rule.triton_gradients import Gradients, over_groups
from ham.kernels.gated_delta_rule.triton_sequences import Sequences
from ham.kernels.gated_delta_rule.triton_tiles import CHUNK, Gates, allow_descriptors
from ham.kernels.triton_launch import launch
from ham.kernels.triton_target import target_of

COLUMNS = 32
PROGRAMS_PER_MULTIPROCESSOR = 2


@gluon.jit
def no_zero(b_beta):
    """Beta, or 2^-60 in the place of less: what is made with it divides by it again."""
    return gl.where(gl.abs(b_beta) < 2.0**-60, 2.0**-60, b_beta)


@gluon.jit
def fetch_columns(q_TK, k_TK, row, bar, q_s, k_s, there, SIZE: gl.constexpr, BK: gl.constexpr):
    """Start to load queries and keys in parts of BK columns."""
    PARTS: gl.constexpr = q_s.shape[0]
    mbarrier.expect(bar, 2 * PARTS * SIZE * 2, pred=there)
    for i in gl.static_range(PARTS):
        tma.async_copy_global_to_shared(q_TK, [row, i * BK], bar, q_s.index(i), pred=there)
        tma.async_copy_global_to_shared(k_TK, [row, i * BK], bar, k_s.index(i), pred=there)


@gluon.jit(do_not_specialize=["T", "M", "H", "G", "per_program"])
def hopper_gradient_kernel(
    p_q,
    p_k,
    p_do,
    p_residual,
    p_w,
    p_states,
    p_dstates,
    p_gates,
    p_dq,
    p_dk,
    p_dlog_decay,
    p_dbeta,
    scale,
    T,
    M,
    H,
    G,
    per_program,
    K: gl.constexpr,
    V: gl.constexpr,
    BK: gl.constexpr,
    C: gl.constexpr,
):
    """Gradients of some chunks of one head."""
    dtype: gl.constexpr = gl.bfloat16
    PARTS: gl.constexpr = K // BK
    start = gl.program_id(0) * per_program
    stop = gl.minimum(start + per_program, M)
    i_bh = gl.program_id(1).to(gl.int64)
    i_b = i_bh // H
    i_h = i_bh % H
    value = i_b * T * H + i_h
    key = i_b * T * G + i_h // (H // G)

    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C, 16])
    mma_k: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BK, 16])
    rows: gl.constexpr = gl.SliceLayout(1, mma)
    rows_k: gl.constexpr = gl.SliceLayout(1, mma_k)
    cols: gl.constexpr = gl.SliceLayout(0, mma)
    left: gl.constexpr = gl.DotOperandLayout(0, mma_k, 2)
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [256 // V, V // 8], [4, 1], [1, 0])
    key_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([C, BK], dtype)
    value_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([C, V], dtype)
    square_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([C, C], dtype)
    state_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BK, V], dtype)

    value_row = H * V
    do_TV = tma.make_tensor_descriptor(
        p_do + value * V, [T, V], [value_row, 1], [C, V], value_layout
    )
    r_TV = tma.make_tensor_descriptor(
        p_residual + value * V, [T, V], [value_row, 1], [C, V], value_layout
    )
    w_TV = tma.make_tensor_descriptor(p_w + value * V, [T, V], [value_row, 1], [C, V], value_layout)
    q_TK = tma.make_tensor_descriptor(p_q + key * K, [T, K], [G * K, 1], [C, BK], key_layout)
    k_TK = tma.make_tensor_descriptor(p_k + key * K, [T, K], [G * K, 1], [C, BK], key_layout)
    dq_TK = tma.make_tensor_descriptor(p_dq + value * K, [T, K], [H * K, 1], [C, BK], key_layout)
    dk_TK = tma.make_tensor_descriptor(p_dk + value * K, [T, K], [H * K, 1], [C, BK], key_layout)
    first_state = i_bh * M * K * V
    s_KV = tma.make_tensor_descriptor(
        p_states + first_state, [M * K, V], [V, 1], [BK, V], state_layout
    )
    ds_KV = tma.make_tensor_descriptor(
        p_dstates + first_state, [M * K, V], [V, 1], [BK, V], state_layout
    )

    q_s = gl.allocate_shared_memory(dtype, [PARTS, C, BK], key_layout)
    k_s = gl.allocate_shared_memory(dtype, [PARTS, C, BK], key_layout)
    do_s = gl.allocate_shared_memory(dtype, [C, V], value_layout)
    r_s = gl.allocate_shared_memory(dtype, [C, V], value_layout)
    w_s = gl.allocate_shared_memory(dtype, [C, V], value_layout)
    s_s = gl.allocate_shared_memory(dtype, [BK, V], state_layout)
    ds_s = gl.allocate_shared_memory(dtype, [BK, V], state_layout)
    f_s = gl.allocate_shared_memory(dtype, [C, C], square_layout)
    g_s = gl.allocate_shared_memory(dtype, [C, C], square_layout)
    r_bar = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    qk_bar = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    w_bar = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    s_bar = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(r_bar, count=1)
    mbarrier.init(qk_bar, count=1)
    mbarrier.init(w_bar, count=1)
    mbarrier.init(s_bar, count=1)
    row = start * C
    fetch_pair(do_TV, r_TV, row, r_bar, do_s, r_s, True, C * V)
    fetch_columns(q_TK, k_TK, row, qk_bar, q_s, k_s, True, C * BK, BK)
    fetch(w_TV, row, 0, w_bar, w_s, True, C * V)
    fetch_pair(s_KV, ds_KV, start * K, s_bar, s_s, ds_s, True, BK * V)

    o_r = gl.arange(0, C, layout=rows)
    o_c = gl.arange(0, C, layout=cols)
    i_row = gl.expand_dims(o_r, 1)
    i_column = gl.expand_dims(o_c, 0)
    zero = gl.zeros([C, C], gl.float32, mma)
    zero_k = gl.zeros([C, BK], gl.float32, mma_k)

    for i_m in range(start, stop):
        phase = (i_m - start) & 1
        row = i_m * C
        more = i_m + 1 < stop
        p_g = p_gates + (i_bh * M + i_m) * 3 * C
        high_r = gl.load(p_g + o_r)
        beta_k = no_zero(gl.convert_layout(gl.load(p_g + 2 * C + o_r), rows_k))
        high_end = gl.load(p_g + C - 1)
        high_c = gl.load(p_g + o_c)
        beta_c = no_zero(gl.load(p_g + 2 * C + o_c))

        mbarrier.wait(r_bar, phase)
        f = warpgroup_mma(do_s, r_s.permute((1, 0)), zero, use_acc=False, is_async=True)
        mbarrier.wait(w_bar, phase)
        g = warpgroup_mma(w_s, r_s.permute((1, 0)), zero, use_acc=False, is_async=True)
        b_f = warpgroup_mma_wait(num_outstanding=1, deps=[f])
        b_f *= decay_where(i_row >= i_column, high_r, high_c, True) * scale
        b_f = (b_f * gl.expand_dims(beta_c, 0)).to(dtype)
        f_s.store(b_f)
        b_f = gl.convert_layout(b_f, left)
        b_g = warpgroup_mma_wait(num_outstanding=0, deps=[g])
        b_g *= -decay_where(i_row > i_column, high_r, high_c, True)
        b_g = (b_g * gl.expand_dims(beta_c, 0)).to(dtype)
        g_s.store(b_g)
        b_g = gl.convert_layout(b_g, left)
        fence_async_shared()

        high_k = gl.convert_layout(high_r, rows_k)
        b_from_start = gl.exp2(high_k)
        b_to_end = gl.exp2(high_end - high_k) * beta_k
        b_dc = gl.zeros([C], gl.float32, rows_k)
        b_dbeta = gl.zeros([C], gl.float32, rows_k)
        b_ends = gl.zeros([C], gl.float32, rows_k)
        b_inner = gl.zeros([16], gl.float32, gl.SliceLayout(1, wide))
        mbarrier.wait(qk_bar, phase)
        for i in range(PARTS):
            mbarrier.wait(s_bar, ((i_m - start) * PARTS + i) & 1)
            dq = warpgroup_mma(do_s, s_s.permute((1, 0)), zero_k, use_acc=False, is_async=True)
            read = warpgroup_mma(w_s, s_s.permute((1, 0)), zero_k, use_acc=False, is_async=True)
            write = warpgroup_mma(r_s, ds_s.permute((1, 0)), zero_k, use_acc=False, is_async=True)
            for j in gl.static_range(BK // 16):
                b_s = s_s.slice(j * 16, 16).load(wide).to(gl.float32)
                b_inner += gl.sum(b_s * ds_s.slice(j * 16, 16).load(wide).to(gl.float32), 1)
            b_dq, b_read, b_write = warpgroup_mma_wait(num_outstanding=0, deps=[dq, read, write])
            last = i + 1 == PARTS
            at = i_m * K + (i + 1) * BK
            fetch_pair(s_KV, ds_KV, at, s_bar, s_s, ds_s, more | (i + 1 < PARTS), BK * V)
            fetch_pair(do_TV, r_TV, row + C, r_bar, do_s, r_s, more & last, C * V)
            fetch(w_TV, row + C, 0, w_bar, w_s, more & last, C * V)
            b_dq *= gl.expand_dims(b_from_start * scale, 1)
            dq = warpgroup_mma(b_f, k_s.index(i), b_dq, is_async=True)
            b_read *= gl.expand_dims(-b_from_start, 1)
            read = warpgroup_mma(b_g, k_s.index(i), b_read, is_async=True)
            b_write *= gl.expand_dims(b_to_end, 1)
            b_k = k_s.index(i).load(mma_k).to(gl.float32)
            b_ends += gl.sum(b_k * b_write, 1)
            write = warpgroup_mma(f_s.permute((1, 0)), q_s.index(i), b_write, is_async=True)
            write = warpgroup_mma(g_s.permute((1, 0)), k_s.index(i), write, is_async=True)
            b_q = q_s.index(i).load(mma_k).to(gl.float32)
            b_dq, b_read = warpgroup_mma_wait(num_outstanding=2, deps=[dq, read])
            b_dc += gl.sum(b_q * b_dq + b_k * b_read, 1)
            b_write = warpgroup_mma_wait(num_outstanding=0, deps=[write])
            b_dbeta += gl.sum(b_k * b_write, 1)
            q_s.index(i).store(b_dq.to(dtype))
            k_s.index(i).store((b_read + b_write).to(dtype))
            fence_async_shared()
            tma.async_copy_shared_to_global(dq_TK, [row, i * BK], q_s.index(i))
            tma.async_copy_shared_to_global(dk_TK, [row, i * BK], k_s.index(i))

        b_dc -= b_dbeta
        end = gl.sum(b_ends, 0) + gl.exp2(high_end) * gl.sum(b_inner, 0)
        b_dc_c = gl.expand_dims(gl.convert_layout(b_dc, cols), 0)
        b_dlog_decay = gl.sum(gl.where(i_column >= i_row, b_dc_c, 0.0), 1) + end
        mask_t = row + o_r < T
        o_gate = value + (row + o_r).to(gl.int64) * H
        gl.store(p_dlog_decay + o_gate, b_dlog_decay, mask=mask_t)
        gl.store(p_dbeta + o_gate, gl.convert_layout(b_dbeta / beta_k, rows), mask=mask_t)
        tma.store_wait(0)
        fetch_columns(q_TK, k_TK, row + C, qk_bar, q_s, k_s, more, C * BK, BK)

    mbarrier.invalidate(r_bar)
    mbarrier.invalidate(qk_bar)
    mbarrier.invalidate(w_bar)
    mbarrier.invalidate(s_bar)


def chunks_per_program(chunks: int, rows: int, device: torch.device) -> int:
    """As many as keep every multiprocessor busy: a program's first loads are not overlapped."""
    slots = target_of(device).multiprocessors * PROGRAMS_PER_MULTIPROCESSOR
    return -(-chunks // max(1, min(chunks, slots // rows)))


def hopper_gradients(
    q_BTGK: Tensor,
    k_BTGK: Tensor,
    do_BTHV: Tensor,
    residual_BTHV: Tensor,
    w_BTHV: Tensor,
    states_XMKV: Tensor,
    dstates_XMKV: Tensor,
    gates: Gates,
    sequences: Sequences,
    scale: float,
) -> Gradients:
    """Launch `hopper_gradient_kernel`; arguments as of `triton_gradients.gradients`."""
    batch, time, heads, value_size = do_BTHV.shape
    key_heads, key_size = q_BTGK.shape[2:]
    dq_BTHK = torch.empty(batch, time, heads, key_size, dtype=q_BTGK.dtype, device=q_BTGK.device)
    dk_BTHK = torch.empty_like(dq_BTHK)
    wide = {"dtype": torch.float32, "device": q_BTGK.device}
    dlog_decay_BTH = torch.empty(batch, time, heads, **wide)
    dbeta_BTH = torch.empty_like(dlog_decay_BTH)
    allow_descriptors()
    each = chunks_per_program(sequences.chunks, batch * heads, q_BTGK.device)
    grid = (-(-sequences.chunks // each), batch * heads)
    launch(
        hopper_gradient_kernel,
        grid,
        q_BTGK,
        k_BTGK,
        do_BTHV,
        residual_BTHV,
        w_BTHV,
        states_XMKV,
        dstates_XMKV,
        gates.gates_XM3C,
        dq_BTHK,
        dk_BTHK,
        dlog_decay_BTH,
        dbeta_BTH,
        scale,
        time,
        sequences.chunks,
        heads,
        key_heads,
        each,
        K=key_size,
        V=value_size,
        BK=COLUMNS,
        C=CHUNK,
        num_warps=4,
    )
    return Gradients(
        over_groups(dq_BTHK, q_BTGK), over_groups(dk_BTHK, k_BTGK), dlog_decay_BTH, dbeta_BTH
    )
