"""Launch 1 of the Triton gated delta rule: gates and inverted triangle of every chunk.

Letters of the kernels: B batch, T tokens, H heads, K key size, V value size, M chunks, C = 64
tokens per chunk, G key heads; `p_` pointer, `o_` offsets, `i_` index, `b_` block in registers. The
derivation stands in the README beside this file.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents

from ham.kernels.gated_delta_rule.triton_sequences import Sequences, chunk_of
from ham.kernels.gated_delta_rule.triton_tiles import (
    CHUNK,
    Gates,
    InverseTile,
    dependent_launch,
    padded,
)
from ham.kernels.triton_launch import launch

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _block_gates(p_log_decay, p_beta, row, mask, before):
    """Cumulative decay of 16 tokens in units of log2, as two float32 that add up to a float64.

    One float32 would lose what strong decay adds up: 6e-5 of the differences at 64 × log2(e^-10).
    """
    b_decay = tl.load(p_log_decay + row, mask=mask, other=0.0).to(tl.float64) * LOG2_E
    b_total = before + tl.cumsum(b_decay, 0)
    b_high = b_total.to(tl.float32)
    b_low = (b_total - b_high.to(tl.float64)).to(tl.float32)
    b_beta = tl.load(p_beta + row, mask=mask, other=0.0).to(tl.float32)
    return b_high, b_low, b_beta, before + tl.sum(b_decay, 0)


@triton.jit
def _store_gates(p_gates, o, b_high, b_low, b_beta, C: tl.constexpr):
    tl.store(p_gates + o, b_high)
    tl.store(p_gates + C + o, b_low)
    tl.store(p_gates + 2 * C + o, b_beta)


@triton.jit
def _weighted(b_product, high_i, low_i, high_j, low_j, beta_j):
    """`Gamma_ij (k_i . k_j) beta_j` for a block below or on the diagonal.

    No decay grows: the minimum keeps entries above the diagonal, which nobody uses, finite.
    """
    difference = (high_i[:, None] - high_j[None, :]) + (low_i[:, None] - low_j[None, :])
    return b_product * tl.exp2(tl.minimum(difference, 0.0)) * beta_j[None, :]


@triton.jit
def _product(b_left, b_right, PRECISION: tl.constexpr, b_sum=None):
    """Product of two 16 × 16 blocks.

    `half` has the 10-bit mantissa of tf32 in half the instructions, and the sums of one product are
    the left operand of the next without moving between threads. Its range up to 65504 suffices:
    entries of stable triangles are of order 1.
    """
    if PRECISION == "half":
        b_left, b_right = b_left.to(tl.float16), b_right.to(tl.float16)
        return tl.dot(b_left, b_right, b_sum)
    else:
        return tl.dot(b_left, b_right, b_sum, input_precision=PRECISION)


@triton.jit
def _invert_diagonal(b_lower, PRECISION: tl.constexpr):
    """`(I + L)^-1` of a 16 × 16 block whose part on and above the diagonal is ignored.

    Two levels of the finite series `(I + N)^-1 = I - N + N^2 - N^3`: over the 4 × 4 blocks on the
    diagonal, and over what is left, where `N^4 = 0` too. One series over all 16 rows would add
    terms up to 6435 times larger than their sum (equal keys, beta = 1), these at most 3 times.
    """
    o_r = tl.arange(0, 16)[:, None]
    o_c = tl.arange(0, 16)[None, :]
    eye = tl.where(o_r == o_c, 1.0, 0.0)
    b_lower = tl.where(o_r > o_c, b_lower, 0.0)
    b_inner = tl.where(o_r // 4 == o_c // 4, b_lower, 0.0)
    b_square = _product(b_inner, b_inner, PRECISION)
    b_cube = _product(b_inner, b_square, PRECISION)
    b_inverse = eye - b_inner + b_square - b_cube
    b_outer = _product(b_inverse, b_lower - b_inner, PRECISION)
    b_square = _product(b_outer, b_outer, PRECISION)
    b_cube = _product(b_outer, b_square, PRECISION)
    b_series = eye - b_outer + b_square - b_cube
    return _product(b_series, b_inverse, PRECISION)


@triton.jit
def _load_rows(p_k, row, mask, i_k, K: tl.constexpr, BK: tl.constexpr):
    o_k = i_k + tl.arange(0, BK)
    return tl.load(
        p_k + row[:, None] * K + o_k[None, :], mask=mask[:, None] & (o_k < K)[None, :], other=0.0
    )


@triton.jit
def _store_block(p_inverse, b_block, i_r: tl.constexpr, i_c: tl.constexpr, C: tl.constexpr):
    o_r = i_r * 16 + tl.arange(0, 16)[:, None]
    o_c = i_c * 16 + tl.arange(0, 16)[None, :]
    tl.store(p_inverse + o_r * C + o_c, b_block.to(p_inverse.dtype.element_ty))


@triton.jit
def _growth(b_product, beta):
    """Sum of log2 of the norms of `I - beta k k^T`; 0 for keys no longer than sqrt(2 / beta)."""
    o = tl.arange(0, 16)
    b_square = tl.sum(tl.where(o[:, None] == o[None, :], b_product, 0.0), 1)
    return tl.sum(tl.log2(tl.maximum(beta * b_square - 1.0, 1.0)), 0)


@triton.jit(do_not_specialize=["T", "M", "H", "G"])
def inverse_kernel(
    p_k,
    p_log_decay,
    p_beta,
    p_first,
    p_left,
    p_inverse,
    p_gates,
    p_passing,
    T,
    M,
    H,
    G,
    K: tl.constexpr,
    BK: tl.constexpr,
    C: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    """Gates and `(I + tril(Gamma o K K^T, -1) diag(beta))^-1 - I` of one chunk of one head."""
    if PDL:
        gdc_launch_dependents()
    i_m = tl.program_id(0)
    i_bh = tl.program_id(1).to(tl.int64)
    i_h, first, left = chunk_of(i_m, i_bh, p_first, p_left, T, H, C)
    p_gates += (i_bh * M + i_m) * 3 * C
    p_inverse += (i_bh * M + i_m) * C * C

    o = tl.arange(0, 16)
    m0, m1, m2, m3 = o < left, o + 16 < left, o + 32 < left, o + 48 < left
    r0 = (first + o) * H + i_h
    r1, r2, r3 = r0 + 16 * H, r0 + 32 * H, r0 + 48 * H
    s0 = (first + o) * G + i_h // (H // G)
    s1, s2, s3 = s0 + 16 * G, s0 + 32 * G, s0 + 48 * G
    zero = tl.sum(tl.zeros([16], tl.float64), 0)
    high0, low0, beta0, total = _block_gates(p_log_decay, p_beta, r0, m0, zero)
    high1, low1, beta1, total = _block_gates(p_log_decay, p_beta, r1, m1, total)
    high2, low2, beta2, total = _block_gates(p_log_decay, p_beta, r2, m2, total)
    high3, low3, beta3, total = _block_gates(p_log_decay, p_beta, r3, m3, total)
    _store_gates(p_gates, o, high0, low0, beta0, C)
    _store_gates(p_gates, o + 16, high1, low1, beta1, C)
    _store_gates(p_gates, o + 32, high2, low2, beta2, C)
    _store_gates(p_gates, o + 48, high3, low3, beta3, C)

    OF_KEYS: tl.constexpr = "tf32" if PRECISION == "half" else PRECISION
    a00 = tl.zeros([16, 16], tl.float32)
    a10, a11 = a00, a00
    a20, a21, a22 = a00, a00, a00
    a30, a31, a32, a33 = a00, a00, a00, a00
    for i_k in range(0, K, BK):
        k0 = _load_rows(p_k, s0, m0, i_k, K, BK)
        k1 = _load_rows(p_k, s1, m1, i_k, K, BK)
        k2 = _load_rows(p_k, s2, m2, i_k, K, BK)
        k3 = _load_rows(p_k, s3, m3, i_k, K, BK)
        a00 = tl.dot(k0, tl.trans(k0), a00, input_precision=OF_KEYS)
        a10 = tl.dot(k1, tl.trans(k0), a10, input_precision=OF_KEYS)
        a20 = tl.dot(k2, tl.trans(k0), a20, input_precision=OF_KEYS)
        a30 = tl.dot(k3, tl.trans(k0), a30, input_precision=OF_KEYS)
        a11 = tl.dot(k1, tl.trans(k1), a11, input_precision=OF_KEYS)
        a21 = tl.dot(k2, tl.trans(k1), a21, input_precision=OF_KEYS)
        a31 = tl.dot(k3, tl.trans(k1), a31, input_precision=OF_KEYS)
        a22 = tl.dot(k2, tl.trans(k2), a22, input_precision=OF_KEYS)
        a32 = tl.dot(k3, tl.trans(k2), a32, input_precision=OF_KEYS)
        a33 = tl.dot(k3, tl.trans(k3), a33, input_precision=OF_KEYS)

    if p_passing is not None:
        growth = _growth(a00, beta0) + _growth(a11, beta1)
        growth += _growth(a22, beta2) + _growth(a33, beta3)
        tl.store(p_passing + i_bh * M + i_m, total.to(tl.float32) + growth)

    x00 = _invert_diagonal(_weighted(a00, high0, low0, high0, low0, beta0), PRECISION)
    x11 = _invert_diagonal(_weighted(a11, high1, low1, high1, low1, beta1), PRECISION)
    x22 = _invert_diagonal(_weighted(a22, high2, low2, high2, low2, beta2), PRECISION)
    x33 = _invert_diagonal(_weighted(a33, high3, low3, high3, low3, beta3), PRECISION)
    l10 = _weighted(a10, high1, low1, high0, low0, beta0)
    l20 = _weighted(a20, high2, low2, high0, low0, beta0)
    l30 = _weighted(a30, high3, low3, high0, low0, beta0)
    l21 = _weighted(a21, high2, low2, high1, low1, beta1)
    l31 = _weighted(a31, high3, low3, high1, low1, beta1)
    l32 = _weighted(a32, high3, low3, high2, low2, beta2)

    x10 = -_product(x11, _product(l10, x00, PRECISION), PRECISION)
    x21 = -_product(x22, _product(l21, x11, PRECISION), PRECISION)
    x32 = -_product(x33, _product(l32, x22, PRECISION), PRECISION)
    s20 = _product(l20, x00, PRECISION)
    s20 = _product(l21, x10, PRECISION, s20)
    x20 = -_product(x22, s20, PRECISION)
    s31 = _product(l31, x11, PRECISION)
    s31 = _product(l32, x21, PRECISION, s31)
    x31 = -_product(x33, s31, PRECISION)
    s30 = _product(l30, x00, PRECISION)
    s30 = _product(l31, x10, PRECISION, s30)
    s30 = _product(l32, x20, PRECISION, s30)
    x30 = -_product(x33, s30, PRECISION)

    eye = tl.where(o[:, None] == o[None, :], 1.0, 0.0)
    nothing = tl.zeros([16, 16], tl.float32)
    _store_block(p_inverse, x00 - eye, 0, 0, C)
    _store_block(p_inverse, x10, 1, 0, C)
    _store_block(p_inverse, x11 - eye, 1, 1, C)
    _store_block(p_inverse, x20, 2, 0, C)
    _store_block(p_inverse, x21, 2, 1, C)
    _store_block(p_inverse, x22 - eye, 2, 2, C)
    _store_block(p_inverse, x30, 3, 0, C)
    _store_block(p_inverse, x31, 3, 1, C)
    _store_block(p_inverse, x32, 3, 2, C)
    _store_block(p_inverse, x33 - eye, 3, 3, C)
    _store_block(p_inverse, nothing, 0, 1, C)
    _store_block(p_inverse, nothing, 0, 2, C)
    _store_block(p_inverse, nothing, 0, 3, C)
    _store_block(p_inverse, nothing, 1, 2, C)
    _store_block(p_inverse, nothing, 1, 3, C)
    _store_block(p_inverse, nothing, 2, 3, C)


def invert_chunks(
    k_BTGK: Tensor,
    log_decay_BTH: Tensor,
    beta_BTH: Tensor,
    sequences: Sequences,
    tile: InverseTile,
    *,
    passing: bool,
) -> Gates:
    """Launch `inverse_kernel` over all chunks.

    Args:
        k_BTGK: Contiguous keys, float32 or bfloat16.
        log_decay_BTH: Contiguous logarithms of the decay.
        beta_BTH: Contiguous write strengths.
        sequences: Where chunks begin.
        tile: How to cut the work.
        passing: Bound what is left of a state after every chunk, as segments need it.

    Returns:
        The inverted triangles in the dtype of the keys, the rest in float32.
    """
    heads, key_heads, key_size = log_decay_BTH.shape[2], *k_BTGK.shape[2:]
    chunks, rows = sequences.chunks, sequences.rows * heads
    float32 = {"dtype": torch.float32, "device": k_BTGK.device}
    gates_XM3C = torch.empty(rows, chunks, 3, CHUNK, **float32)
    square = (rows, chunks, CHUNK, CHUNK)
    inverse_XMCC = torch.empty(square, dtype=k_BTGK.dtype, device=k_BTGK.device)
    passing_XM = torch.empty(rows, chunks if passing else 0, **float32)
    launch(
        inverse_kernel,
        (chunks, rows),
        k_BTGK,
        log_decay_BTH,
        beta_BTH,
        sequences.first_M,
        sequences.left_M,
        inverse_XMCC,
        gates_XM3C,
        passing_XM if passing else None,
        sequences.time,
        chunks,
        heads,
        key_heads,
        K=key_size,
        BK=min(padded(key_size), tile.block_k),
        C=CHUNK,
        PRECISION=tile.precision,
        PDL=dependent_launch(k_BTGK.device),
        num_warps=1,
        num_stages=tile.stages,
        **({"maxnreg": tile.registers} if tile.registers else {}),
    )
    return Gates(gates_XM3C, inverse_XMCC, passing_XM)
