"""Losses on held-out rows while a model trains."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ham.model.decoder import IGNORED
from ham.model.language_model import LanguageModel
from ham.model.precision import precision_context
from ham.train.batches import BatchSampler


@torch.no_grad()
def mean_loss(model: LanguageModel, sampler: BatchSampler, batches: int, precision: str) -> float:
    """Mean loss in nats per target over the first `batches` of a sampler; ends in training mode."""
    model.eval()
    total, count = torch.zeros((), device=model.device), 0
    for index in range(batches):
        batch = sampler.batch(index)
        targets_N = batch.targets_BT.to(model.device).flatten()
        with precision_context(model.device, precision):
            logits_BTV = model(batch.inputs_BT.to(model.device)).logits_BTV
        logits_NV = logits_BTV.flatten(0, 1).float()
        total += F.cross_entropy(logits_NV, targets_N, reduction="sum", ignore_index=IGNORED)
        count += int((batch.targets_BT != IGNORED).sum())
    model.train()
    return float(total) / max(1, count)


def mixture_loss(text: float, recall: float, recall_fraction: float) -> float:
    """Text and recall loss by their shares of the training rows; what decides a learning rate."""
    return (1 - recall_fraction) * text + recall_fraction * recall
