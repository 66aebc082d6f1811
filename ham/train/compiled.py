"""Forward pass and loss of a decoder as compiled code.

Compiled block by block: one code serves all layers of a kind, where that of a whole model takes
`torch.compile` a minute. What is not fused across blocks is one addition.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ham.model.decoder import Block, DecoderLM, add_auxiliary_losses
from ham.model.language_model import LanguageModel
from ham.model.mixer import MixerAux, RoutingHints

RECOMPILATIONS = 64
"""Codes of one function that torch keeps; beyond them it would fall back to plain launches."""


LossFunction = Callable[[Tensor, Tensor], tuple[Tensor, list[MixerAux]]]
"""From `inputs_BT` and `targets_BT` to the loss and what each layer reported."""


def compiled_loss(model: LanguageModel) -> LossFunction:
    """`model.loss` as compiled code; a model of another library is compiled whole."""
    if model.library is None:
        return CompiledLoss(model)
    whole = torch.compile(model.loss, dynamic=False)

    def loss_of(inputs_BT: Tensor, targets_BT: Tensor) -> tuple[Tensor, list[MixerAux]]:
        loss, output = whole(inputs_BT, targets_BT)
        return loss, output.aux

    return loss_of


class CompiledLoss:
    """What `DecoderLM.loss` computes, without the logits.

    Args:
        model: Its thresholds must have started (`ThresholdController.settle`).
    """

    def __init__(self, model: DecoderLM):
        self.model = model
        self._block = torch.compile(_run_block, dynamic=False)
        self._head = torch.compile(model.head_loss, dynamic=False)

    def __call__(self, inputs_BT: Tensor, targets_BT: Tensor) -> tuple[Tensor, list[MixerAux]]:
        """Loss in nats per token, and what each layer reported."""
        hints = RoutingHints(inputs_BT, None)
        reports = []
        with torch._dynamo.config.patch(recompile_limit=RECOMPILATIONS):
            x_BTD = self.model.embedding(inputs_BT)
            for block in self.model.blocks:
                x_BTD, aux = self._block(block, x_BTD, hints)
                reports.append(aux)
            loss = self._head(x_BTD, targets_BT)
        return add_auxiliary_losses(loss, reports), reports


def _run_block(block: Block, x_BTD: Tensor, hints: RoutingHints) -> tuple[Tensor, MixerAux]:
    return block(x_BTD, hints)
