"""Device functions that the gradient kernels of the Triton Mamba-2 recurrence share.

Letters as in `triton_states.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ham.kernels.gated_delta_rule.triton_forward import row_column_mask


@triton.jit
def load_rows(p_rows, stride, first, mask_t, N: tl.constexpr, BN: tl.constexpr, C: tl.constexpr):
    """`BN` columns of the rows of a chunk, zero beyond the sequence and beyond column `N`."""
    o_n = first + tl.arange(0, BN)
    mask = row_column_mask(mask_t, o_n < N, N % BN == 0)
    o_rows = tl.arange(0, C)[:, None] * stride + o_n[None, :]
    return tl.load(p_rows + o_rows, mask=mask, other=0.0)


@triton.jit
def load_state(
    p_state, first, S: tl.constexpr, P: tl.constexpr, BS: tl.constexpr, BP: tl.constexpr
):
    """`BP` columns of the state of a chunk."""
    o_s = tl.arange(0, BS)
    o_p = first + tl.arange(0, BP)
    mask = row_column_mask(o_s < S, o_p < P, P % BP == 0)
    return tl.load(p_state + o_s[:, None] * P + o_p[None, :], mask=mask, other=0.0)


@triton.jit
def store_rows(
    p_rows, stride, first, mask_t, b_rows, N: tl.constexpr, BN: tl.constexpr, C: tl.constexpr
):
    """Undo `load_rows`."""
    o_n = first + tl.arange(0, BN)
    mask = row_column_mask(mask_t, o_n < N, N % BN == 0)
    o_rows = tl.arange(0, C)[:, None] * stride + o_n[None, :]
    tl.store(p_rows + o_rows, b_rows.to(p_rows.dtype.element_ty), mask=mask)


@triton.jit
def inner_product(p_state, p_dstate, N: tl.constexpr):
    """Sum of the products of all `N` elements of two states, which lie in one piece."""
    BLOCK: tl.constexpr = 8192 if N % 8192 == 0 else 1024
    b_sum = tl.zeros([BLOCK], tl.float32)
    for i in range(0, N, BLOCK):
        o = i + tl.arange(0, BLOCK)
        b_state = tl.load(p_state + o, mask=o < N, other=0.0).to(tl.float32)
        b_sum += b_state * tl.load(p_dstate + o, mask=o < N, other=0.0).to(tl.float32)
    return tl.sum(b_sum, 0)


@triton.jit
def pairs_gate(b_pairs, later, PARTS: tl.constexpr):
    """Gradient of the log decay of each token from pairs of tokens inside the chunk.

    `b_pairs` holds what token j (row) contributes to the loss through token i (column). Both sums
    are taken of the same numbers, so that what has to cancel does; the diagonal, which always
    does, is left out. In float32 inputs the sums are in float64: what is left after strong decay
    drowned in their rounding, and the gradient of a was off by 8e-6 instead of 5e-7.
    """
    b_pairs = tl.where(later, b_pairs, 0.0)
    if PARTS == 2:
        b_pairs = b_pairs.to(tl.float64)
    b_net = tl.sum(b_pairs, 0) - tl.sum(b_pairs, 1)
    return tl.cumsum(b_net, 0, reverse=True).to(tl.float32)
