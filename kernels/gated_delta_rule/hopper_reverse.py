"""The reverse walk for Hopper, written in Gluon; bfloat16, without gradients of predictions.

The same mathematics as `triton_backward.reverse_walk_kernel`; how it is arranged is told in
`hopper_walk.py`. Letters as in `triton_forward.py`.
"""

from __future__ import annotations

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

from ham.kernels.gated_delta_rule.hopper_walk import (
    COLUMNS,
    decay_where,
    fetch,
    fetch_pair,
    sequence_of,
)
from ham.kernels.gated_delta_rule.triton_sequences import Sequences
from ham.kernels.gated_delta_rule.triton_tiles import CHUNK, Gates, allow_descriptors
from ham.kernels.triton_launch import launch


@gluon.jit(do_not_specialize=["T", "M", "H", "G"])
def hopper_reverse_kernel(
    p_q,
    p_k,
    p_do,
    p_inverse,
    p_gates,
    p_bounds,
    p_offsets,
    p_dfinal,
    p_w,
    p_dstates,
    p_dinitial,
    scale,
    T,
    M,
    H,
    G,
    K: gl.constexpr,
    V: gl.constexpr,
    BV: gl.constexpr,
    C: gl.constexpr,
):
    """Gradient of the state after every chunk and W, for a segment and a block of value columns."""
    dtype: gl.constexpr = gl.bfloat16
    i_v = gl.program_id(0)
    i_s = gl.program_id(1)
    segments = gl.num_programs(1)
    i_nh = gl.program_id(2).to(gl.int64)
    i_h, token, length, i_x, chunks = sequence_of(i_nh, p_bounds, p_offsets, T, M, H, C)
    each = (chunks + segments - 1) // segments
    start = gl.minimum(i_s * each, chunks)
    stop = gl.minimum(start + each, chunks)
    key = token * G + i_h // (H // G)
    value = token * H + i_h

    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BV, 16])
    mma_c: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C, 16])
    rows: gl.constexpr = gl.SliceLayout(1, mma)
    rows_c: gl.constexpr = gl.SliceLayout(1, mma_c)
    cols_c: gl.constexpr = gl.SliceLayout(0, mma_c)
    left: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    key_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([C, K], dtype)
    value_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([C, BV], dtype)
    square_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([C, C], dtype)
    state_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([K, BV], dtype)

    # A descriptor needs at least one row; an empty sequence has no chunk that would read it.
    tokens = gl.maximum(length, 1)
    blocks = gl.maximum(chunks, 1)
    q_TK = tma.make_tensor_descriptor(p_q + key * K, [tokens, K], [G * K, 1], [C, K], key_layout)
    k_TK = tma.make_tensor_descriptor(p_k + key * K, [tokens, K], [G * K, 1], [C, K], key_layout)
    do_TV = tma.make_tensor_descriptor(
        p_do + value * V, [tokens, V], [H * V, 1], [C, BV], value_layout
    )
    w_TV = tma.make_tensor_descriptor(
        p_w + value * V, [tokens, V], [H * V, 1], [C, BV], value_layout
    )
    x_TC = tma.make_tensor_descriptor(
        p_inverse + i_x * C * C, [blocks * C, C], [C, 1], [C, C], square_layout
    )
    ds_KV = tma.make_tensor_descriptor(
        p_dstates + i_x * K * V, [blocks * K, V], [V, 1], [K, BV], state_layout
    )

    q_s = gl.allocate_shared_memory(dtype, [2, C, K], key_layout)
    k_s = gl.allocate_shared_memory(dtype, [2, C, K], key_layout)
    do_s = gl.allocate_shared_memory(dtype, [C, BV], value_layout)
    x_s = gl.allocate_shared_memory(dtype, [C, C], square_layout)
    dstate_s = gl.allocate_shared_memory(dtype, [K, BV], state_layout)
    read_s = gl.allocate_shared_memory(dtype, [C, BV], value_layout)
    w_s = gl.allocate_shared_memory(dtype, [C, BV], value_layout)
    qk_bars = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    do_bar = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    x_bar = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(qk_bars.index(0), count=1)
    mbarrier.init(qk_bars.index(1), count=1)
    mbarrier.init(do_bar, count=1)
    mbarrier.init(x_bar, count=1)
    last = stop - 1
    for i in gl.static_range(2):
        there = last - i >= start
        row = (last - i) * C
        fetch_pair(k_TK, q_TK, row, qk_bars.index(i), k_s.index(i), q_s.index(i), there, C * K)
    there = last >= start
    fetch(do_TV, last * C, i_v * BV, do_bar, do_s, there, C * BV)
    fetch(x_TC, last * C, 0, x_bar, x_s, there, C * C)

    o_r = gl.arange(0, C, layout=rows)
    o_c = gl.arange(0, C, layout=cols_c)
    o_k = gl.arange(0, K, layout=rows)
    o_v = i_v * BV + gl.arange(0, BV, layout=gl.SliceLayout(0, mma))
    o_state = gl.expand_dims(o_k, 1) * V + gl.expand_dims(o_v, 0)
    if p_dfinal is not None:
        b_dstate = gl.load(p_dfinal + (i_nh * segments + i_s) * K * V + o_state)
    else:
        b_dstate = gl.zeros([K, BV], gl.float32, mma)
    zero = gl.zeros([C, BV], gl.float32, mma)
    zero_c = gl.zeros([C, C], gl.float32, mma_c)
    later = gl.expand_dims(gl.arange(0, C, layout=rows_c), 1) <= gl.expand_dims(o_c, 0)

    for i_back in range(0, stop - start):
        i_m = last - i_back
        phase = i_back & 1
        p_g = p_gates + (i_x + i_m) * 3 * C
        b_high = gl.load(p_g + o_r)
        b_beta = gl.load(p_g + 2 * C + o_r)
        high_end = gl.load(p_g + C - 1)
        b_high_c = gl.load(p_g + o_c)

        k_now = k_s.index(phase)
        q_now = q_s.index(phase)
        mbarrier.wait(qk_bars.index(phase), (i_back >> 1) & 1)
        within = warpgroup_mma(k_now, q_now.permute((1, 0)), zero_c, use_acc=False, is_async=True)
        tma.store_wait(1)
        dstate_s.store(b_dstate.to(dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(ds_KV, [i_m * K, i_v * BV], dstate_s)
        du = warpgroup_mma(k_now, dstate_s, zero, use_acc=False, is_async=True)
        b_within = warpgroup_mma_wait(num_outstanding=1, deps=[within])
        b_within *= decay_where(later, gl.convert_layout(b_high, rows_c), b_high_c, False) * scale
        b_within = gl.convert_layout(b_within.to(dtype), left)
        b_from_start = gl.exp2(b_high)
        mbarrier.wait(do_bar, phase)
        b_do = do_s.load(mma).to(gl.float32)
        read_s.store((b_do * gl.expand_dims(scale * b_from_start, 1)).to(dtype))
        b_du = warpgroup_mma_wait(num_outstanding=0, deps=[du])
        b_du *= gl.expand_dims(gl.exp2(high_end - b_high), 1)
        b_dr = warpgroup_mma(b_within, do_s, b_du, is_async=True)
        b_dr = warpgroup_mma_wait(num_outstanding=0, deps=[b_dr])
        b_dr *= gl.expand_dims(b_beta, 1)
        tma.store_wait(1)
        w_s.store(b_dr.to(dtype))
        fence_async_shared()
        mbarrier.wait(x_bar, phase)
        solved = warpgroup_mma(x_s.permute((1, 0)), w_s, zero, use_acc=False, is_async=True)
        b_dstate *= gl.exp2(high_end)
        dstate = warpgroup_mma(q_now.permute((1, 0)), read_s, b_dstate, is_async=True)
        b_solved = warpgroup_mma_wait(num_outstanding=1, deps=[solved])
        more = i_m > start
        fetch(x_TC, (i_m - 1) * C, 0, x_bar, x_s, more, C * C)
        b_w = b_dr + b_solved
        w_s.store(b_w.to(dtype))
        do_s.store((b_w * gl.expand_dims(-b_from_start, 1)).to(dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(w_TV, [i_m * C, i_v * BV], w_s)
        b_dstate = warpgroup_mma_wait(num_outstanding=0, deps=[dstate])
        dstate = warpgroup_mma(k_now.permute((1, 0)), do_s, b_dstate, is_async=True)
        b_dstate = warpgroup_mma_wait(num_outstanding=0, deps=[dstate])
        fetch(do_TV, (i_m - 1) * C, i_v * BV, do_bar, do_s, more, C * BV)
        row = (i_m - 2) * C
        fetch_pair(k_TK, q_TK, row, qk_bars.index(phase), k_now, q_now, i_m - 2 >= start, C * K)

    tma.store_wait(0)
    mbarrier.invalidate(qk_bars.index(0))
    mbarrier.invalidate(qk_bars.index(1))
    mbarrier.invalidate(do_bar)
    mbarrier.invalidate(x_bar)
    # Nested: an optional pointer is known when compiling, the segment is not.
    if p_dinitial is not None:  # noqa: SIM102
        if i_s == 0:
            gl.store(p_dinitial + i_nh * K * V + o_state, b_dstate)


def hopper_walk_back(
    q_BTGK: Tensor,
    k_BTGK: Tensor,
    do_BTHV: Tensor,
    gates: Gates,
    sequences: Sequences,
    dfinal_XSKV: Tensor | None,
    scale: float,
    segments: int,
    w_BTHV: Tensor,
    dstates_XMKV: Tensor,
    dinitial_NHKV: Tensor | None,
) -> None:
    """Launch `hopper_reverse_kernel`; arguments as of `triton_backward.walk_back`.

    Args:
        q_BTGK: Queries of the forward.
        k_BTGK: Keys of the forward.
        do_BTHV: Gradient of the read-outs.
        gates: From `invert_chunks`.
        sequences: Where sequences and chunks begin.
        dfinal_XSKV: Gradient of the state after each of the S segments, float32. Default: zeros.
        scale: Multiplies the queries.
        segments: Number of segments of each sequence.
        w_BTHV: Where to write W.
        dstates_XMKV: Where to write the gradient of the state after every chunk.
        dinitial_NHKV: Where to write the gradient of the initial state, if wanted.
    """
    heads, value_size = do_BTHV.shape[2:]
    key_heads, key_size = q_BTGK.shape[2:]
    allow_descriptors()
    launch(
        hopper_reverse_kernel,
        (value_size // COLUMNS, segments, sequences.count * heads),
        q_BTGK,
        k_BTGK,
        do_BTHV,
        gates.inverse_XMCC,
        gates.gates_XM3C,
        sequences.bounds_N1,
        sequences.offsets_N1,
        dfinal_XSKV,
        w_BTHV,
        dstates_XMKV,
        dinitial_NHKV,
        scale,
        sequences.time,
        sequences.chunks,
        heads,
        key_heads,
        K=key_size,
        V=value_size,
        BV=COLUMNS,
        C=CHUNK,
        num_warps=4,
    )
