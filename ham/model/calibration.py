"""Setting the thresholds of a trained model to a target fraction.

A layer's scores depend on the thresholds below it, so the layers are set from the bottom up: one
layer's threshold becomes the quantile of its scores over all calibration batches, then its output
feeds the next. A threshold that all layers share is found by bisection over whole passes. The
thresholds are frozen afterwards; nothing looks at the evaluated text.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ham.model.decoder import Block, DecoderLM
from ham.model.mixer import RoutingHints
from ham.routing import ThresholdController, upper_quantile

BISECTIONS = 20
TOLERANCE = 0.002
"""Where the search for a shared threshold stops: |mean share - target|."""


@torch.no_grad()
def calibrate(
    model: DecoderLM, batches: Iterable[Tensor | RoutingHints], fraction: float | None = None
) -> list[float]:
    """Freeze every routing layer at the threshold that routes `fraction` of the batches' tokens.

    Where every head decides alone, one threshold serves all heads of a layer. A layer whose store
    decides without a threshold is left as it is.

    Args:
        model: The model; its training mode is left as it was.
        batches: `tokens_BT` from a split that is not evaluated, or hints with the wanted tokens.
        fraction: Target share, 0..1; each layer's own target when None, and layers whose control
            is `fixed` then keep their threshold.

    Returns:
        The realised fraction of each routing layer on these batches.

    Raises:
        RoutingError: If scores are not finite.
    """
    was_training = model.training
    model.eval()
    try:
        shares = _calibrate_layers(model, _with_hints(batches), fraction)
        return list(shares.values())
    finally:
        model.train(was_training)


@torch.no_grad()
def realised_fractions(
    model: DecoderLM, batches: Iterable[Tensor | RoutingHints]
) -> dict[int, float]:
    """The share of the batches' tokens that each routing layer keeps, thresholds as they are.

    Args:
        model: The model, in evaluation mode.
        batches: As in `calibrate`.

    Returns:
        The share by layer.
    """
    kept: dict[int, float] = {}
    tokens = 0
    for hints in _with_hints(batches):
        tokens += hints.tokens_BT.numel()
        x_BTD = model.embedding(hints.tokens_BT)
        for layer, block in enumerate(model.blocks):
            x_BTD, aux = block(x_BTD, hints)
            share_BT = aux.kept_share_BT()
            if share_BT is not None:
                kept[layer] = kept.get(layer, 0.0) + float(share_BT.double().sum())
    return {layer: count / tokens for layer, count in kept.items()}


def thresholds(model: DecoderLM) -> list[float]:
    """The current threshold of each layer that routes by one."""
    return [float(controller.threshold) for controller in model.controllers]


def _calibrate_layers(
    model: DecoderLM, batches: list[RoutingHints], fraction: float | None
) -> dict[int, float]:
    """Set each layer at its own quantile, then those that share a threshold together."""
    hidden = _embedded(model, batches)
    shares: dict[int, float] = {}
    pooled: dict[int, Tensor] = {}
    for layer, block in enumerate(model.blocks):
        controller = block.mixer.controller
        if controller is not None and controller.control != "none":
            scores = _scores(block, hidden, batches)
            _set_alone(controller, scores, fraction)
            held = fraction is None and controller.control == "fixed"
            if controller.scope == "global" and controller.control != "share" and not held:
                pooled[layer] = scores
        hidden, share = _advance(block, hidden, batches)
        if share is not None:
            shares[layer] = share
    return _set_together(model, batches, fraction, pooled) if pooled else shares


def _set_alone(controller: ThresholdController, scores: Tensor, fraction: float | None) -> None:
    if fraction is None and controller.control == "fixed":
        controller.hold()
    else:
        controller.calibrate(scores, controller.target if fraction is None else fraction)


def _set_together(
    model: DecoderLM,
    batches: list[RoutingHints],
    fraction: float | None,
    scores: dict[int, Tensor],
) -> dict[int, float]:
    """Give the layers in `scores` the threshold at which the mean of their shares is the target.

    Bisects over the quantile level of the scores seen so far, which suits a score of any scale.
    Returns the realised share of every routing layer.
    """
    controllers = [model.blocks[layer].mixer.controller for layer in scores]
    target = controllers[0].target if fraction is None else fraction
    pooled = torch.cat(list(scores.values()))
    low, high, level = 0.0, 1.0, target
    best: tuple[float, Tensor, dict[int, float]] | None = None
    for _ in range(BISECTIONS):
        threshold = upper_quantile(pooled, level)
        _freeze_all(controllers, threshold, target)
        shares = realised_fractions(model, batches)
        error = sum(shares[layer] for layer in scores) / len(scores) - target
        if best is None or abs(error) < best[0]:
            best = (abs(error), threshold, shares)
        if best[0] <= TOLERANCE:
            break
        low, high = (level, high) if error < 0 else (low, level)
        level = (low + high) / 2
    _freeze_all(controllers, best[1], target)
    return best[2]


def _freeze_all(controllers: list[ThresholdController], threshold: Tensor, target: float) -> None:
    for controller in controllers:
        controller.freeze(threshold, target)


def _with_hints(batches: Iterable[Tensor | RoutingHints]) -> list[RoutingHints]:
    return [one if isinstance(one, RoutingHints) else RoutingHints(one) for one in batches]


def _embedded(model: DecoderLM, batches: list[RoutingHints]) -> list[Tensor]:
    return [model.embedding(hints.tokens_BT) for hints in batches]


def _scores(block: Block, hidden: list[Tensor], batches: list[RoutingHints]) -> Tensor:
    """All scores of a layer, flat."""
    parts = [
        block.mixer.score(block.mixer_norm(x_BTD), hints)
        for x_BTD, hints in zip(hidden, batches, strict=True)
    ]
    return torch.cat([part.flatten() for part in parts])


def _advance(
    block: Block, hidden: list[Tensor], batches: list[RoutingHints]
) -> tuple[list[Tensor], float | None]:
    """The layer's outputs, and the share of tokens it kept; None if it does not route."""
    outputs = [block(x_BTD, hints) for x_BTD, hints in zip(hidden, batches, strict=True)]
    kept = [aux.kept_share_BT() for _, aux in outputs]
    share = None
    if kept[0] is not None:
        share = float(torch.cat([share_BT.flatten() for share_BT in kept]).double().mean())
    return [x_BTD for x_BTD, _ in outputs], share
