"""Who enters the KV cache: routing scores and the threshold that turns them into a decision.

Letters as in `ham.model.mixer`. Equation numbers are those of the paper (arXiv 2603.22325) as far
as readers report them.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

ScoreName = Literal["cosine", "committed", "l2"]
ReductionName = Literal["min", "mean", "max"]

PREDICTION_FLOOR = 1e-3
VALUE_FLOOR = 1e-6


def head_scores(
    score: ScoreName, prediction_BTHV: Tensor, value_BTHV: Tensor, beta_BTH: Tensor
) -> Tensor:
    """How badly the recurrent state predicted each value, per head (Eq. 9).

    Args:
        score: `cosine`, 1 - cos(p, v) in 0..2, with the norm of p floored at 1e-3 of that of v so
            that an empty state scores 1; `committed`, b ||v - p||, what the write really changes
            (HOLA, arXiv 2607.02303); `l2`, ||v - p|| / ||v||.
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
        return error / (v_norm + VALUE_FLOOR)


def reduce_heads(score_BTH: Tensor, reduction: ReductionName) -> Tensor:
    """One score per token: the heads share one cache, so they decide together (Eq. 10: min)."""
    if reduction == "min":
        return score_BTH.amin(dim=-1)
    if reduction == "max":
        return score_BTH.amax(dim=-1)
    return score_BTH.mean(dim=-1)


class ThresholdController(nn.Module):
    """Holds a layer's threshold so that a target share of tokens is routed (Alg. 2).

    During training the threshold starts at the (1 - target) quantile of the first scores, then
    follows a closed loop once per optimiser step:
    `threshold += gain × EMA[std(score)] × (realised - target)`. Scaling by the spread makes one
    gain serve scores of any scale. Frozen, it only compares. Targets 0 and 1 use an infinite
    threshold, so that rounding cannot leak tokens over a finite bound.

    Everything that the loop needs is a buffer, so a checkpoint resumes it exactly.

    Args:
        target: Share of tokens to route, 0..1.
        gain: Step of the loop in standard deviations of the score per unit of error.
        spread_decay: Decay of the moving average of the standard deviation.
    """

    def __init__(self, target: float, gain: float = 0.1, spread_decay: float = 0.9):
        super().__init__()
        self.target = target
        self.gain = gain
        self.spread_decay = spread_decay
        start = _infinite_threshold(target)
        self.register_buffer("threshold", torch.tensor(math.nan if start is None else start))
        self.register_buffer("spread", torch.tensor(math.nan))
        self.register_buffer("frozen", torch.tensor(False))
        # Sums over the current optimiser step: tokens, routed tokens, score, squared score.
        self.register_buffer("step_sums_4", torch.zeros(4, dtype=torch.float64))
        self._started: bool | None = None
        self.register_load_state_dict_post_hook(lambda module, _: module._forget_mirror())

    def route(self, score_BT: Tensor) -> Tensor:
        """Decide which tokens enter the cache; returns boolean `routed_BT`.

        In training mode it also observes the scores for the closed loop.
        """
        if self.training and torch.is_grad_enabled():
            self._start(score_BT)
            routed_BT = score_BT >= self.threshold
            self._observe(score_BT, routed_BT)
            return routed_BT
        return score_BT >= self.threshold

    @torch.no_grad()
    def end_step(self) -> None:
        """Move the threshold by what was observed since the last call, without a device sync."""
        tokens, routed, total, squares = self.step_sums_4.unbind()
        seen = tokens > 0
        mean = total / tokens.clamp(min=1)
        std = (squares / tokens.clamp(min=1) - mean**2).clamp(min=0).sqrt().float()
        blended = self.spread_decay * self.spread + (1 - self.spread_decay) * std
        spread = torch.where(self.spread.isnan(), std, blended)
        error = (routed / tokens.clamp(min=1) - self.target).float()
        moves = seen & ~self.frozen & self.threshold.isfinite()
        self.spread.copy_(torch.where(seen, spread, self.spread))
        self.threshold.add_(torch.where(moves, self.gain * spread * error, 0.0))
        self.step_sums_4.zero_()

    @torch.no_grad()
    def calibrate(self, scores: Tensor, fraction: float) -> None:
        """Freeze the threshold at the quantile of `scores` (any shape) that routes `fraction`."""
        limit = _infinite_threshold(fraction)
        value = upper_quantile(scores, fraction) if limit is None else torch.tensor(limit)
        self.threshold.copy_(value)
        self.frozen.fill_(True)
        self._started = True

    def _start(self, score_BT: Tensor) -> None:
        if self._started is None:
            self._started = not bool(self.threshold.isnan())
        if not self._started:
            self.threshold.copy_(upper_quantile(score_BT, self.target))
            self._started = True

    @torch.no_grad()
    def _observe(self, score_BT: Tensor, routed_BT: Tensor) -> None:
        wide = score_BT.double()
        count = torch.full_like(self.step_sums_4[0], score_BT.numel())
        sums = torch.stack((count, routed_BT.sum().double(), wide.sum(), wide.square().sum()))
        self.step_sums_4.add_(sums)

    def _forget_mirror(self) -> None:
        self._started = None


def upper_quantile(scores: Tensor, fraction: float) -> Tensor:
    """The value that the `fraction` largest scores reach; 0 < fraction < 1.

    Exact order statistic by `kthvalue`: `torch.quantile` refuses more than 16 million values.
    """
    flat = scores.detach().flatten().float()
    rank = min(max(round(flat.numel() * (1 - fraction)), 0), flat.numel() - 1)
    return flat.kthvalue(rank + 1).values


def _infinite_threshold(fraction: float) -> float | None:
    if fraction <= 0:
        return math.inf
    if fraction >= 1:
        return -math.inf
    return None
