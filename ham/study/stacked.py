"""Weights of several equal models side by side, and AdamW over them with a rate for each.

A tensor with an axis of runs is what `torch.vmap` takes. The models stay usable: their parameters
and buffers become views of it, so that each can be calibrated, evaluated and inspected alone.

Letters: R runs, S steps, N weights of a group; further axes are those of a parameter.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ham.study.config import MqarTrain
from ham.study.model import RecallModel
from ham.study.training import decays, rates

# Those of torch's AdamW, and what its clipping adds to a norm.
FIRST_DECAY, SECOND_DECAY, EPSILON = 0.9, 0.999, 1e-8
NORM_EPSILON = 1e-6


@dataclass(frozen=True)
class Group:
    """Parameters that decay alike, one after another in a matrix of a row for each run.

    Attributes:
        leaves: Each parameter with an axis of runs, by name; views of `weights_RN`.
        first_RN, second_RN: Moments of AdamW.
        decay: Weight decay.
    """

    leaves: dict[str, Tensor]
    weights_RN: Tensor
    first_RN: Tensor
    second_RN: Tensor
    decay: float


class StackedModels:
    """Models of one architecture whose weights and buffers share memory.

    Args:
        models: Models alike in everything but the values of their tensors, on one device.
        weight_decay: For those parameters that `decays` names.

    Attributes:
        groups: The weights.
        buffers: Buffers with an axis of runs, by name. Tables that all runs share are left out:
            floating buffers that are not stored with the weights and are equal.
    """

    def __init__(self, models: Sequence[RecallModel], weight_decay: float):
        self.models = list(models)
        parameters = [dict(model.named_parameters()) for model in models]
        parts: dict[str, list[str]] = {"embedding": [], "decayed": [], "free": []}
        for name, parameter in parameters[0].items():
            # A look-up wants the rows of all runs without a gap, and it is most of the model.
            kind = "decayed" if decays(name, parameter) else "free"
            parts["embedding" if name.startswith("embedding.") else kind].append(name)
        self.groups = [
            _group(parameters, names, 0.0 if kind == "free" else weight_decay)
            for kind, names in parts.items()
            if names
        ]
        self.buffers: dict[str, Tensor] = {}
        stored = models[0].state_dict().keys()
        for name, buffer in models[0].named_buffers():
            every = [model.get_buffer(name) for model in models]
            table = buffer.is_floating_point() and name not in stored
            if table and all(torch.equal(buffer, other) for other in every):
                continue
            self.buffers[name] = torch.stack(every)
            for model, value in zip(models, self.buffers[name], strict=True):
                owner, _, own_name = name.rpartition(".")
                model.get_submodule(owner)._buffers[own_name] = value

    @property
    def leaves(self) -> dict[str, Tensor]:
        """Every parameter with an axis of runs, by name."""
        return {name: leaf for group in self.groups for name, leaf in group.leaves.items()}

    def tensors(self) -> Iterator[Tensor]:
        """Weights and buffers of all runs."""
        for group in self.groups:
            yield group.weights_RN
        yield from self.buffers.values()

    def moments(self) -> Iterator[Tensor]:
        """What AdamW keeps."""
        for group in self.groups:
            yield group.first_RN
            yield group.second_RN


class StackedAdamW:
    """Gradient clipping and AdamW (arXiv 1711.05101) of each run, without waiting for the device.

    Args:
        stacked: The weights.
        settings: Steps, decay, clipping.
        peaks: Peak learning rate of each run.
    """

    def __init__(self, stacked: StackedModels, settings: MqarTrain, peaks: Sequence[float]):
        self.stacked = stacked
        self.clip = settings.gradient_clip
        steps = torch.arange(1, settings.steps + 1, dtype=torch.float64)
        rates_RS = torch.tensor([rates(settings, peak) for peak in peaks]).double()
        # By step: the rate of each run, its step size, and the root of the second correction.
        tables = (
            rates_RS,
            rates_RS / (1 - FIRST_DECAY**steps),
            (1 - SECOND_DECAY**steps).sqrt().expand_as(rates_RS),
        )
        self.tables_3RS = torch.stack(tables).to(stacked.groups[0].weights_RN)

    @torch.no_grad()
    def step(self, grads: Sequence[Tensor], step_index_1: Tensor) -> None:
        """Update the weights in place.

        Args:
            grads: Of `stacked.leaves`, in their order.
            step_index_1: int64; steps done so far.
        """
        rest = iter(grads)
        grads_RN = [
            torch.cat([next(rest).flatten(1) for _ in group.leaves], dim=1)
            if len(group.leaves) > 1
            else next(rest).flatten(1)
            for group in self.stacked.groups
        ]
        norms_GR = torch.stack([torch.linalg.vector_norm(grad, dim=1) for grad in grads_RN])
        norm_R1 = torch.linalg.vector_norm(norms_GR, dim=0).unsqueeze(1)
        kept_R1 = (self.clip / (norm_R1 + NORM_EPSILON)).clamp(max=1.0)
        numbers_3R1 = self.tables_3RS.index_select(2, step_index_1)
        for group, grad_RN in zip(self.stacked.groups, grads_RN, strict=True):
            _update(group, grad_RN * kept_R1, *numbers_3R1)


def _update(
    group: Group, grad_RN: Tensor, rate_R1: Tensor, size_R1: Tensor, correction_R1: Tensor
) -> None:
    """A step of AdamW in the order of torch's."""
    if group.decay:
        group.weights_RN.mul_(1 - rate_R1 * group.decay)
    group.first_RN.lerp_(grad_RN, 1 - FIRST_DECAY)
    group.second_RN.mul_(SECOND_DECAY).addcmul_(grad_RN, grad_RN, value=1 - SECOND_DECAY)
    scale_RN = group.second_RN.sqrt().div_(correction_R1).add_(EPSILON)
    group.weights_RN.addcmul_(group.first_RN / scale_RN, size_R1, value=-1)


@torch.no_grad()
def _group(parameters: list[dict[str, nn.Parameter]], names: list[str], decay: float) -> Group:
    """The named parameters side by side; those of the models become views of them."""
    weights_RN = torch.stack(
        [torch.cat([of_run[name].detach().flatten() for name in names]) for of_run in parameters]
    )
    sizes = [parameters[0][name].numel() for name in names]
    leaves = {}
    for name, part in zip(names, weights_RN.split(sizes, dim=1), strict=True):
        shape = parameters[0][name].shape
        leaves[name] = part.unflatten(1, shape).requires_grad_()
        for of_run, value in zip(parameters, leaves[name].detach(), strict=True):
            of_run[name].data = value
    return Group(
        leaves, weights_RN, torch.zeros_like(weights_RN), torch.zeros_like(weights_RN), decay
    )
