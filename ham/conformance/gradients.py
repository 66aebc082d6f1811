"""Rules about parameters and their gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from ham.conformance.finding import Finding, Judge
from ham.conformance.subject import Subject

NUDGE = 1e-6
"""Half the distance of the two points of a central difference, in float64."""


def registered(subject: Subject) -> Finding:
    """Every tensor that training would move is among the model's parameters, counted once."""
    judge, model = Judge(unit="numbers"), subject.model(torch.float32).train()
    tokens_BT = subject.tokens(2, 33)
    loss, _ = model.loss(tokens_BT[:, :-1], tokens_BT[:, 1:])
    known = {id(parameter) for parameter in model.parameters()}
    for leaf in _leaves(loss):
        if id(leaf) not in known:
            judge.figure(
                leaf.numel(), f"a trained tensor of shape {tuple(leaf.shape)} is not registered"
            )
    counted = sum(parameter.numel() for parameter in model.parameters())
    declared = model.count_parameters()
    judge.figure(abs(counted - declared), f"{declared} parameters declared, {counted} counted")
    return judge.finding()


def trained(subject: Subject) -> Finding:
    """Every parameter gets a finite gradient that is not zero."""
    judge, model = Judge(unit="parameters"), subject.model(torch.float32).train()
    tokens_BT = subject.tokens(2, 65)
    loss, _ = model.loss(tokens_BT[:, :-1], tokens_BT[:, 1:])
    loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            judge.fault(f"{name} gets no gradient")
        elif not parameter.grad.isfinite().all():
            judge.fault(f"the gradient of {name} is not finite")
        elif not parameter.grad.abs().max() > 0:
            judge.fault(f"the gradient of {name} is zero everywhere")
    return judge.finding()


def gradcheck(subject: Subject) -> Finding:
    """Gradients are the slopes of the output, in float64, for the input and every parameter."""
    judge, mixer = Judge(1e-6), subject.model().blocks[0].mixer.train()
    x_BTD = subject.vectors(2, 7, torch.float64).requires_grad_()
    told = subject.told(2, 7)
    generator = torch.Generator().manual_seed(7)

    def random_like(tensor: Tensor) -> Tensor:
        drawn = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
        return drawn.to(tensor.device)

    weights_BTD = random_like(x_BTD)
    leaves = {"the input": x_BTD, **dict(mixer.named_parameters())}
    value = (mixer(x_BTD, **told)[0] * weights_BTD).sum()
    slopes = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
    for (name, leaf), slope in zip(leaves.items(), slopes, strict=True):
        direction = random_like(leaf)
        ends = []
        with torch.no_grad():
            for sign in (1, -1):
                leaf.add_(direction, alpha=sign * NUDGE)
                ends.append((mixer(x_BTD, **told)[0] * weights_BTD).sum())
                leaf.sub_(direction, alpha=sign * NUDGE)
        found = torch.zeros_like(value) if slope is None else (slope * direction).sum()
        expected = (ends[0] - ends[1]) / (2 * NUDGE)
        judge.same(f"slope along a random direction of {name}", found, expected)
    return judge.finding()


@torch.no_grad()
def state_dict(subject: Subject) -> Finding:
    """Weights stored and loaded into a model of another seed give the same outputs."""
    judge, tokens_BT = Judge(subject.exact), subject.tokens(2, 40)
    model, other = subject.model(seed=0), subject.model(seed=1)
    other.load_state_dict({name: one.clone() for name, one in model.state_dict().items()})
    judge.same(
        "logits after loading", other(tokens_BT).logits_BTV, model(tokens_BT).logits_BTV, "BTV"
    )
    return judge.finding()


def _leaves(value: Tensor) -> list[Tensor]:
    """The tensors at which the graph behind `value` accumulates gradients."""
    seen, waiting, leaves = set(), [value.grad_fn], []
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.append(node.variable)
        waiting.extend(parent for parent, _ in node.next_functions)
    return leaves
