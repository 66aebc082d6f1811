"""Scores that measure how badly the recurrent state predicted a token's value.

Letters as in `ham.model.mixer`. Equation numbers are those of the paper (arXiv 2603.22325) as far
as readers report them.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

ScoreName = Literal["cosine", "committed", "l2"]
"""Scores that the kernels compute while they have the predictions at hand."""

StateScore = Literal["cosine", "committed", "l2", "post_update"]
"""Scores made from the state's prediction."""

ReductionName = Literal["min", "mean", "max"]

PREDICTION_FLOOR = 1e-3
VALUE_FLOOR = 1e-6


def head_scores(
    score: StateScore, prediction_BTHV: Tensor, value_BTHV: Tensor, beta_BTH: Tensor
) -> Tensor:
    """How badly the recurrent state predicted each value, per head (Eq. 9).

    Args:
        score: `cosine`, 1 - cos(p, v) in 0..2, with the norm of p floored at 1e-3 of that of v so
            that an empty state scores 1; `committed`, b ||v - p||, what the write really changes
            (HOLA, arXiv 2607.02303); `l2`, ||v - p|| / ||v||; `post_update`, (1 - b) ||v - p||,
            what is still wrong after the write.
        prediction_BTHV: What the state before the token returns for its key, p.
        value_BTHV: The token's value, v.
        beta_BTH: Write gate, b.

    Returns:
        `score_BTH`, float32 or wider, without gradient.
    """
    with torch.no_grad():
        wide = torch.float64 if value_BTHV.dtype == torch.float64 else torch.float32
        p, v = prediction_BTHV.to(wide), value_BTHV.to(wide)
        v_norm = v.norm(dim=-1)
        if score == "cosine":
            p_norm = torch.maximum(p.norm(dim=-1), PREDICTION_FLOOR * v_norm)
            return 1 - (p * v).sum(-1) / (p_norm * v_norm.clamp(min=VALUE_FLOOR)).clamp(
                min=VALUE_FLOOR**2
            )
        error = (v - p).norm(dim=-1)
        if score == "committed":
            return beta_BTH.to(wide) * error
        if score == "post_update":
            return (1 - beta_BTH.to(wide)) * error
        return error / (v_norm + VALUE_FLOOR)


@torch.no_grad()
def post_update_from_l2(l2_BTH: Tensor, value_BTHV: Tensor, beta_BTH: Tensor) -> Tensor:
    """The score `post_update` from the score `l2`, which a kernel gives without the prediction.

    (1 - b) ||v - p|| = (1 - b) l2 (||v|| + floor); `score_BTH` in the dtype of `l2_BTH`.
    """
    length_BTH = value_BTHV.to(l2_BTH.dtype).norm(dim=-1) + VALUE_FLOOR
    return (1 - beta_BTH.to(l2_BTH.dtype)) * l2_BTH * length_BTH


def reduce_heads(score_BTH: Tensor, reduction: ReductionName) -> Tensor:
    """One score per token from the scores of its heads; the paper takes the minimum (Eq. 10)."""
    if reduction == "min":
        return score_BTH.amin(dim=-1)
    if reduction == "max":
        return score_BTH.amax(dim=-1)
    return score_BTH.mean(dim=-1)
