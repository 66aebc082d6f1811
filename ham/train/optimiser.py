"""AdamW with warm-up and cosine decay; weight decay on matrices only."""

from __future__ import annotations

import math

import torch
from torch import nn

from ham.config import TrainConfig


def make_optimiser(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over the model's parameters.

    Matrices decay; vectors (norm gains, biases, decay rates of the recurrences), the weights of the
    short convolutions and null keys do not, nor does what a library marks `_no_weight_decay`.
    """
    decayed, free = [], []
    for name, parameter in model.named_parameters():
        matrix = parameter.ndim >= 2 and not name.endswith(("conv.weight_WC", "sink_HK"))
        matrix = matrix and not getattr(parameter, "_no_weight_decay", False)
        (decayed if matrix else free).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": free, "weight_decay": 0.0},
    ]
    fused = next(model.parameters()).device.type == "cuda"
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=fused)


def learning_rate(step: int, config: TrainConfig) -> float:
    """Learning rate of optimiser step `step` (from 0): linear warm-up, then cosine decay.

    The last step gets `learning_rate × final_learning_rate_ratio`.
    """
    warmup = round(config.steps * config.warmup_fraction)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, config.steps - 1 - warmup)
    floor = config.final_learning_rate_ratio
    return config.learning_rate * (floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2)


def set_learning_rate(optimiser: torch.optim.Optimizer, value: float) -> None:
    """Give every parameter group the same learning rate; where it is a tensor, in place."""
    for group in optimiser.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(value)
        else:
            group["lr"] = value


def make_capturable(optimiser: torch.optim.Optimizer) -> None:
    """Let a CUDA graph of a step read its learning rate from the device.

    Done before the first step, and again after a state was loaded.
    """
    for group in optimiser.param_groups:
        group["capturable"] = True
        device = group["params"][0].device
        group["lr"] = torch.as_tensor(group["lr"], dtype=torch.float32).to(device)
