"""The threshold that turns scores into a decision, and its control (Alg. 2 of the paper).

Letters as in `ham.model.mixer`. All state is in buffers, so a checkpoint resumes the control
exactly; nothing here waits for the device once training has started.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ham.errors import RoutingError

ControlName = Literal["loop", "fixed"]
ScopeName = Literal["layer", "global"]


class WideBuffers(nn.Module):
    """A module whose floating buffers are never narrowed.

    `model.to(torch.bfloat16)` would otherwise round a threshold to eight bits and move tokens
    across it.
    """

    def _apply(self, fn, recurse: bool = True):
        before = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if old.is_floating_point() and new.element_size() < old.element_size():
                self._buffers[name] = old.to(new.device)
        return self


class ThresholdController(WideBuffers):
    """Holds a layer's threshold so that a target share of tokens is routed.

    During training the threshold starts at the (1 - target) quantile of the first scores, then
    follows a closed loop once per optimiser step:
    `threshold += gain × EMA[std(score)] × (realised - target)`. Scaling by the spread makes one
    gain serve scores of any scale. Frozen, it only compares. Targets 0 and 1 use an infinite
    threshold, so that rounding cannot leak tokens over a finite bound.

    Where torch.distributed is initialised, the start is averaged and the sums of a step are added
    over all ranks, so that ranks agree. `DistributedDataParallel` must then be told
    `broadcast_buffers=False`, or it overwrites the sums of the other ranks.

    Args:
        target: Share of tokens to route, 0..1.
        gain: Step of the loop in standard deviations of the score per unit of error.
        spread_decay: Decay of the moving average of the standard deviation.
        control: `loop`; `fixed` at `threshold`, which training and freezing leave alone; `share`,
            where the score is 0 or 1 and itself keeps the share `fraction`; `none`, where a store
            decides without a threshold.
        scope: `layer`, or `global`: all global controllers of a model share one threshold (see
            `follow`), which holds the mean over their layers at the target.
        threshold: Where `fixed` stands.
        name: How errors call it.
    """

    def __init__(
        self,
        target: float,
        gain: float = 0.1,
        spread_decay: float = 0.9,
        *,
        control: Literal[ControlName, "share", "none"] = "loop",
        scope: ScopeName = "layer",
        threshold: float | None = None,
        name: str = "a router",
    ):
        super().__init__()
        self.target = target
        self.gain = gain
        self.spread_decay = spread_decay
        self.control = control
        self.scope = scope
        self.name = name
        start = {"fixed": threshold, "share": 0.5}.get(control, _infinite_threshold(target))
        self.register_buffer("threshold", torch.tensor(math.nan if start is None else start))
        self.register_buffer("spread", torch.tensor(math.nan))
        self.register_buffer("frozen", torch.tensor(False))
        # The share asked for now: the target, or what the last calibration was told.
        self.register_buffer("fraction", torch.tensor(target, dtype=torch.float64))
        # Sums over the current optimiser step: tokens, routed tokens, score, squared score.
        self.register_buffer("step_sums_4", torch.zeros(4, dtype=torch.float64))
        # Optimiser steps so far, so that each explores other tokens.
        self.register_buffer("steps", torch.tensor(0))
        self.register_buffer("bad_scores", torch.tensor(0), persistent=False)
        self._started: bool | None = None
        self.register_load_state_dict_post_hook(lambda module, _: module._forget_mirror())

    def fill_tables(self) -> None:
        """Set what is not stored with the weights, as after loading into empty memory."""
        self.bad_scores.zero_()

    def route(self, score: Tensor, explored: Tensor | None = None) -> Tensor:
        """Decide which tokens enter the cache.

        In training mode it also observes the scores for the closed loop.

        Args:
            score: `score_BT`, or `score_BTH` where heads decide alone.
            explored: Boolean, of that shape; tokens to route whatever their score, as long as the
                threshold still moves. They count in the realised share.

        Returns:
            Boolean mask of the shape of `score`.
        """
        observing = self.training and torch.is_grad_enabled()
        if observing:
            self._start(score)
        routed = score >= self.threshold
        if explored is not None:
            routed = routed | (explored & self.threshold.isfinite() & ~self.frozen)
        if observing:
            self._observe(score, routed)
        return routed

    @torch.no_grad()
    def count_bad(self, score: Tensor) -> None:
        """Remember how many scores are NaN or infinite; `raise_on_bad_scores` tells."""
        self.bad_scores.add_((~score.isfinite()).sum())

    def end_step(self) -> None:
        """Move the threshold by what was observed since the last call, without a device sync."""
        follow([self])

    @torch.no_grad()
    def calibrate(self, scores: Tensor, fraction: float) -> None:
        """Freeze the threshold at the value that routes `fraction` of `scores` (any shape).

        Raises:
            RoutingError: If a score is NaN or infinite.
        """
        self.count_bad(scores)
        raise_on_bad_scores([self])
        if self.control == "share" or _infinite_threshold(fraction) is not None:
            value = self.threshold
        else:
            value = _mean_over_ranks(closest_threshold(scores, fraction))
        self.freeze(value, fraction)

    @torch.no_grad()
    def freeze(self, threshold: Tensor | float, fraction: float) -> None:
        """Freeze at `threshold`, which is meant to route `fraction`; infinite at the ends."""
        limit = None if self.control == "share" else _infinite_threshold(fraction)
        self.threshold.copy_(torch.as_tensor(threshold if limit is None else limit))
        self.fraction.fill_(fraction)
        self.frozen.fill_(True)
        self._started = True

    def hold(self) -> None:
        """Freeze the threshold where it stands."""
        self.frozen.fill_(True)

    def settle(self) -> bool:
        """Whether the threshold stands, or has yet to start at a quantile of the first scores.

        Waits for the device the first time, so that `route` never has to.
        """
        if self._started is None:
            self._started = not bool(self.threshold.isnan())
        return self._started

    def _start(self, score: Tensor) -> None:
        if not self.settle():
            self.threshold.copy_(_mean_over_ranks(upper_quantile(score, self.target)))
            self._started = True

    @torch.no_grad()
    def _observe(self, score: Tensor, routed: Tensor) -> None:
        wide = score.double()
        count = torch.full_like(self.step_sums_4[0], score.numel())
        sums = torch.stack((count, routed.sum().double(), wide.sum(), wide.square().sum()))
        self.step_sums_4.add_(sums)

    def _move(self, sums_4: Tensor, threshold: Tensor) -> None:
        """Set the threshold one step of the loop away from `threshold`."""
        self.step_sums_4.zero_()
        self.steps.add_(1)
        if self.control != "loop":
            return
        tokens, routed, total, squares = sums_4.unbind()
        seen = tokens > 0
        mean = total / tokens.clamp(min=1)
        std = (squares / tokens.clamp(min=1) - mean**2).clamp(min=0).sqrt().float()
        blended = self.spread_decay * self.spread + (1 - self.spread_decay) * std
        spread = torch.where(self.spread.isnan(), std, blended)
        error = (routed / tokens.clamp(min=1) - self.target).float()
        moves = seen & ~self.frozen & self.threshold.isfinite()
        self.spread.copy_(torch.where(seen, spread, self.spread))
        moved = threshold + self.gain * spread * error
        self.threshold.copy_(torch.where(moves, moved, self.threshold))

    def _forget_mirror(self) -> None:
        self._started = None


@torch.no_grad()
def follow(controllers: Sequence[ThresholdController]) -> None:
    """Let thresholds follow what was observed since the last call; called once a step.

    Controllers of scope `global` pool their observations and move together from the mean of their
    thresholds: at the first step the mean of their quantile starts, later the one they share.
    """
    if not controllers:
        return
    sums_L4 = torch.stack([controller.step_sums_4 for controller in controllers])
    if _distributed():
        dist.all_reduce(sums_L4)
    shared = [index for index, one in enumerate(controllers) if one.scope == "global"]
    if shared:
        pooled_4 = torch.stack([sums_L4[index] for index in shared]).sum(0)
        # In float64 the mean of equal float32 values is that value.
        together = torch.stack([controllers[index].threshold for index in shared]).double().mean()
    for index, controller in enumerate(controllers):
        if controller.scope == "global":
            controller._move(pooled_4, together.to(controller.threshold.dtype))
        else:
            controller._move(sums_L4[index], controller.threshold)


def raise_on_bad_scores(controllers: Sequence[ThresholdController]) -> None:
    """Raise if a score seen since the last call was NaN or infinite; waits for the device once.

    A NaN is below every threshold, so its token would silently stay out of the cache.

    Raises:
        RoutingError: Names each layer and score, and how many.
    """
    if not controllers:
        return
    counts = torch.stack([controller.bad_scores for controller in controllers]).tolist()
    bad = [(one, count) for one, count in zip(controllers, counts, strict=True) if count]
    if bad:
        for controller, _ in bad:
            controller.bad_scores.zero_()
        found = ", ".join(f"{count} in {controller.name}" for controller, count in bad)
        raise RoutingError(
            f"routing scores must be finite, but some are NaN or infinite: {found}; the weights or "
            "the activations that reach that layer are not finite"
        )


def upper_quantile(scores: Tensor, fraction: float) -> Tensor:
    """The value that the `fraction` largest scores reach; 0 < fraction < 1.

    Exact order statistic by `kthvalue`: `torch.quantile` refuses more than 16 million values.
    """
    flat = scores.detach().flatten()
    flat = flat.float() if flat.element_size() < 4 else flat
    rank = min(max(round(flat.numel() * (1 - fraction)), 0), flat.numel() - 1)
    return flat.kthvalue(rank + 1).values


def closest_threshold(scores: Tensor, fraction: float) -> Tensor:
    """The threshold whose realised share of `scores` is closest to `fraction`; 0 < fraction < 1.

    Unlike `upper_quantile` it looks at ties: where many scores are equal it may be better to
    leave all of them out.
    """
    value = upper_quantile(scores, fraction)
    flat = scores.detach().flatten().to(value.dtype)
    wanted = fraction * flat.numel()
    above = flat > value
    with_ties, without = int((flat >= value).sum()), int(above.sum())
    if abs(without - wanted) >= abs(with_ties - wanted):
        return value
    if without == 0:
        return torch.nextafter(value, torch.full_like(value, math.inf))
    return flat[above].min()


def _infinite_threshold(fraction: float) -> float | None:
    if fraction <= 0:
        return math.inf
    if fraction >= 1:
        return -math.inf
    return None


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _mean_over_ranks(value: Tensor) -> Tensor:
    if not _distributed():
        return value
    total = value.double()
    dist.all_reduce(total)
    return (total / dist.get_world_size()).to(value.dtype)
