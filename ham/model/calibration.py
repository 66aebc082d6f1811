"""Setting the thresholds of a trained model to a target fraction, layer by layer.

A layer's scores depend on the thresholds below it, so the layers are set from the bottom up: one
layer's threshold becomes the quantile of its scores over all calibration batches, then its output
feeds the next. The thresholds are frozen afterwards; nothing looks at the evaluated text.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ham.model.decoder import DecoderLM


@torch.no_grad()
def calibrate(
    model: DecoderLM, batches: Iterable[Tensor], fraction: float | None = None
) -> list[float]:
    """Freeze every routing layer at the threshold that routes `fraction` of the batches' tokens.

    Args:
        model: The model; its training mode is left as it was.
        batches: `tokens_BT` from a split that is not evaluated.
        fraction: Target share, 0..1; each layer's own target when None.

    Returns:
        The realised fraction of each routing layer on these batches.
    """
    was_training = model.training
    model.eval()
    hidden = [model.embedding(tokens_BT) for tokens_BT in batches]
    realised = []
    for block in model.blocks:
        if block.mixer.routes:
            normed = [block.mixer_norm(x_BTD) for x_BTD in hidden]
            scores = torch.cat([block.mixer.score(x_BTD).flatten() for x_BTD in normed])
            controller = block.mixer.controller
            controller.calibrate(scores, controller.target if fraction is None else fraction)
        outputs = [block(x_BTD) for x_BTD in hidden]
        hidden = [x_BTD for x_BTD, _ in outputs]
        if block.mixer.routes:
            routed = torch.cat([aux.routed_BT.flatten() for _, aux in outputs])
            realised.append(float(routed.float().mean()))
    model.train(was_training)
    return realised


def thresholds(model: DecoderLM) -> list[float]:
    """The current threshold of each routing layer."""
    return [float(block.mixer.controller.threshold) for block in model.blocks if block.mixer.routes]
