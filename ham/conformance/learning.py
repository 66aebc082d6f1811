"""Rules about training, and about the ends of the dial."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ham.conformance.finding import Finding, Judge
from ham.conformance.subject import Subject

COPY_STEPS = 300
COPY_SYMBOLS = 8
COPY_LENGTH = 4


def autocast(subject: Subject) -> Finding:
    """Training in bfloat16 by autocast runs, and its loss is that of float32."""
    judge = Judge(0.02)
    model = subject.model(torch.float32, fraction=1.0).train()
    tokens_BT = subject.tokens(2, 65)
    exact, _ = model.loss(tokens_BT[:, :-1], tokens_BT[:, 1:])
    with torch.autocast(torch.device(subject.device).type, dtype=torch.bfloat16):
        loss, _ = model.loss(tokens_BT[:, :-1], tokens_BT[:, 1:])
    loss.backward()
    narrow, wide = float(loss.detach()), float(exact.detach())
    judge.figure(
        abs(narrow - wide) / wide, f"a loss of {narrow:.5g} where float32 gives {wide:.5g}"
    )
    return judge.finding()


@torch.no_grad()
def dial_ends(subject: Subject) -> Finding:
    """A target of 0 routes nothing, a target of 1 everything."""
    judge, tokens_BT = Judge(unit="of all tokens"), subject.tokens(2, 90)
    for fraction in (0.0, 1.0):
        model = subject.model(torch.float32, fraction=fraction)
        for layer, found in enumerate(model(tokens_BT).kv_fraction_per_layer()):
            what = f"layer {layer} routes {found:.4g} where the target is {fraction:g}"
            judge.figure(abs(found - fraction), what)
    return judge.finding()


def repetition(subject: Subject) -> Finding:
    """Sixty steps halve the loss on a repeated sequence."""
    judge = Judge(0.5, "of the first loss")
    model = subject.model(torch.float32).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    tokens_BT = subject.tokens(1, 40).repeat(4, 2)
    losses = []
    for _ in range(60):
        loss, _ = model.loss(tokens_BT[:, :-1], tokens_BT[:, 1:])
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        model.end_step()
        losses.append(float(loss.detach()))
    judge.figure(losses[-1] / losses[0], f"the loss went from {losses[0]:.4g} to {losses[-1]:.4g}")
    return judge.finding()


def copying(subject: Subject) -> Finding:
    """A few hundred steps teach copying new random strings."""
    judge = Judge(0.5, "of the copied symbols wrong")
    model = subject.model(torch.float32).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(COPY_STEPS):
        tokens_BT = _strings_to_copy(subject, seed=step)
        logits, targets = _copied(model(tokens_BT[:, :-1]).logits_BTV, tokens_BT)
        F.cross_entropy(logits, targets).backward()
        optimiser.step()
        optimiser.zero_grad()
        model.end_step()
        # The strings of a step were never seen before it.
        if _wrong(logits, targets) == 0:
            break
    with torch.no_grad():
        tokens_BT = _strings_to_copy(subject, seed=COPY_STEPS)
        wrong = _wrong(*_copied(model(tokens_BT[:, :-1]).logits_BTV, tokens_BT))
    chance = 1 - 1 / COPY_SYMBOLS
    judge.figure(wrong, f"after {step + 1} steps; guessing gives {chance:.3g}")
    return judge.finding()


def _strings_to_copy(subject: Subject, seed: int) -> Tensor:
    """Random strings, a separator, and the strings again: `tokens_BT`."""
    text_BT = subject.tokens(32, COPY_LENGTH, seed) % COPY_SYMBOLS
    separator_BT = torch.full_like(text_BT[:, :1], COPY_SYMBOLS)
    return torch.cat((text_BT, separator_BT, text_BT), dim=1)


def _wrong(logits: Tensor, targets: Tensor) -> float:
    """Share of targets that are not the likeliest prediction."""
    return float((logits.argmax(-1) != targets).float().mean())


def _copied(logits_BTV: Tensor, tokens_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Predictions and targets in the second string, flat."""
    return (
        logits_BTV[:, -COPY_LENGTH:].flatten(0, 1),
        tokens_BT[:, -COPY_LENGTH:].flatten(),
    )
