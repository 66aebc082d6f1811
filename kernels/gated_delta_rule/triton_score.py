"""Launch 3 of the Triton gated delta rule: routing scores from the sums of the walk."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_wait

from ham.kernels.gated_delta_rule.triton_tiles import dependent
from ham.kernels.triton_launch import launch
from ham.routing import PREDICTION_FLOOR, VALUE_FLOOR


@triton.jit(do_not_specialize=["R", "H"])
def score_kernel(
    p_sums,
    p_beta,
    p_score,
    p_reduced,
    R,
    H,
    SCORE: tl.constexpr,
    REDUCTION: tl.constexpr,
    N: tl.constexpr,
    BH: tl.constexpr,
    BR: tl.constexpr,
    P_FLOOR: tl.constexpr,
    V_FLOOR: tl.constexpr,
    PDL: tl.constexpr,
):
    """Scores of BR of the R tokens, all heads, from the sums of N blocks of columns."""
    o_r = (tl.program_id(0) * BR + tl.arange(0, BR)).to(tl.int64)
    o_h = tl.arange(0, BH)[None, :]
    mask = (o_r < R)[:, None] & (o_h < H)
    n = H * R.to(tl.int64)
    o_in = o_h * R.to(tl.int64) + o_r[:, None]
    o_out = o_r[:, None] * H + o_h
    first = tl.zeros([BR, BH], tl.float32)
    if PDL:
        gdc_wait()
    pv, vv = first, first
    for i_n in tl.static_range(N):
        first += tl.load(p_sums + (i_n * 3) * n + o_in, mask=mask, other=0.0)
        if SCORE == "cosine":
            pv += tl.load(p_sums + (i_n * 3 + 1) * n + o_in, mask=mask, other=0.0)
        if SCORE != "committed":
            vv += tl.load(p_sums + (i_n * 3 + 2) * n + o_in, mask=mask, other=0.0)
    v_norm = tl.sqrt(vv)
    if SCORE == "cosine":
        p_norm = tl.maximum(tl.sqrt(first), P_FLOOR * v_norm)
        lengths = tl.maximum(p_norm * tl.maximum(v_norm, V_FLOOR), V_FLOOR * V_FLOOR)
        b_score = 1.0 - pv / lengths
    elif SCORE == "l2":
        b_score = tl.sqrt(first) / (v_norm + V_FLOOR)
    else:
        b_beta = tl.load(p_beta + o_out, mask=mask, other=0.0).to(tl.float32)
        b_score = b_beta * tl.sqrt(first)
    tl.store(p_score + o_out, b_score, mask=mask)
    if p_reduced is not None:
        if REDUCTION == "min":
            b_reduced = tl.min(tl.where(mask, b_score, float("inf")), 1)
        elif REDUCTION == "max":
            b_reduced = tl.max(tl.where(mask, b_score, float("-inf")), 1)
        else:
            b_reduced = tl.sum(tl.where(mask, b_score, 0.0), 1) / H
        tl.store(p_reduced + o_r, b_reduced, mask=o_r < R)


def score_heads(
    score: str, reduction: str, sums_N3HR: Tensor, beta_BTH: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Launch `score_kernel`.

    Args:
        score: As defined by `ham.routing.head_scores`.
        reduction: As defined by `ham.routing.reduce_heads`; "" for none.
        sums_N3HR: From `walk`.
        beta_BTH: Contiguous write strengths.

    Returns:
        `score_BTH` and its reduction over heads `score_BT`, float32.
    """
    batch, time, heads = beta_BTH.shape
    score_BTH = torch.empty(beta_BTH.shape, dtype=torch.float32, device=beta_BTH.device)
    score_BT = torch.empty(beta_BTH.shape[:2], dtype=torch.float32, device=beta_BTH.device)
    block = 64
    launch(
        score_kernel,
        (-(-(batch * time) // block),),
        sums_N3HR,
        beta_BTH,
        score_BTH,
        score_BT if reduction else None,
        batch * time,
        heads,
        SCORE=score,
        REDUCTION=reduction,
        N=sums_N3HR.shape[0],
        BH=(1 << (heads - 1).bit_length()),
        BR=block,
        P_FLOOR=PREDICTION_FLOOR,
        V_FLOOR=VALUE_FLOOR,
        **dependent(beta_BTH.device, True),
    )
    return score_BTH, score_BT if reduction else None
