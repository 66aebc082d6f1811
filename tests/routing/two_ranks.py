"""What each of two data-parallel processes does; a module of its own, so that starting is cheap."""

from __future__ import annotations

import torch
import torch.distributed as dist

from ham.routing import ThresholdController, follow

STEPS, COUNTED_STEPS = 60, 40


def train(rank: int, folder: str) -> None:
    """Follow random scores for `STEPS` steps and write what this rank ended with."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    layers = [
        ThresholdController(0.25, gain=0.5).train(),
        ThresholdController(0.25, gain=0.5, scope="global").train(),
        ThresholdController(0.25, gain=0.5, scope="global").train(),
    ]
    generator = torch.Generator().manual_seed(rank)
    shares = []
    for _ in range(STEPS):
        masks = []
        for index, controller in enumerate(layers):
            # Ranks see different text: rank 1 twice as many tokens, with higher scores.
            score = torch.randn(1 + rank, 128, generator=generator) + rank + index
            masks.append(float(controller.route(score).float().sum()))
        follow(layers)
        shares.append(masks)
    calibrated = ThresholdController(0.25)
    calibrated.calibrate(torch.arange(100.0) + 10 * rank, 0.25)
    torch.save(
        {
            "thresholds": [float(controller.threshold) for controller in layers],
            "calibrated": float(calibrated.threshold),
            "kept": torch.tensor(shares[-COUNTED_STEPS:]).sum(0),
        },
        f"{folder}/rank{rank}.pt",
    )
    dist.destroy_process_group()
