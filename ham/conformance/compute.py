"""Rules about numbers that are finite, repeatable, and not left over from before."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch
from torch import Tensor

from ham.conformance.finding import Finding, Judge
from ham.conformance.subject import Subject
from ham.model.decoder import DecoderLM
from ham.model.decoder_state import DecoderState

LENGTH = 70


def finite(subject: Subject) -> Finding:
    """No NaN and no infinity, in outputs and gradients, at zero, tiny, large and equal inputs."""
    judge = Judge(unit="numbers not finite")
    mixer = subject.model(torch.float32).blocks[0].mixer
    x_BTD = subject.vectors(2, LENGTH, torch.float32)
    extremes = {
        "zeros": torch.zeros_like(x_BTD),
        "inputs of 1e-20": 1e-20 * x_BTD,
        "inputs of 1e4": 1e4 * x_BTD,
        "equal tokens": x_BTD[:, :1].expand_as(x_BTD),
    }
    for name, values_BTD in extremes.items():
        leaf_BTD = values_BTD.clone().requires_grad_()
        y_BTD, _ = mixer(leaf_BTD, **subject.told(2, LENGTH))
        _count(judge, f"forward of {name}", y_BTD)
        (gradient_BTD,) = torch.autograd.grad(y_BTD.sum(), leaf_BTD)
        _count(judge, f"gradient of the input at {name}", gradient_BTD)
        state = mixer.init_state(2, x_BTD.device, torch.float32)
        with torch.no_grad():
            y_BTD, _ = mixer.prefill(values_BTD[:, :-1], state, **subject.told(2, LENGTH, 0, -1))
            y_BD = mixer.step(values_BTD[:, -1], state, **subject.told(2, LENGTH, -1))
        _count(judge, f"prefill of {name}", y_BTD)
        _count(judge, f"step of {name}", y_BD[:, None])
    return judge.finding()


def unwritten(subject: Subject) -> Finding:
    """Memory that nobody wrote stays unread: it may hold NaN, and a mask does not keep NaN out."""
    judge = Judge(unit="numbers not finite")
    with torch.no_grad(), _poisoned_memory():
        model, tokens_BT = subject.model(torch.float32), subject.tokens(2, LENGTH)
        state = DecoderState.join(
            [_read(model, tokens_BT[:1, :1]), _read(model, tokens_BT[1:, :60])]
        )
        for step in range(10):
            _count(judge, f"step {step}", model.step(tokens_BT[:, step], state)[:, None])
    return judge.finding()


def fresh(subject: Subject) -> Finding:
    """Nothing is kept from one sequence to the next: the same input gives the same output."""
    judge, model = Judge(subject.exact), subject.model()
    first_BT, other_BT = subject.tokens(2, 40), subject.tokens(2, 40, seed=4)
    with torch.no_grad():
        for name, logits in (("forward", _forward), ("prefill", _prefill), ("step", _step)):
            before_BTV = logits(model, first_BT)
            logits(model, other_BT)
            again_BTV = logits(model, first_BT)
            judge.same(f"logits of {name} after another sequence", again_BTV, before_BTV, "BTV")
    return judge.finding()


def deterministic(subject: Subject) -> Finding:
    """The same seed gives the same weights, loss and gradients, twice."""
    judge = Judge(subject.exact)
    runs = []
    for _ in range(2):
        model = subject.model(torch.float32).train()
        found = {f"weight {name}": one.detach().clone() for name, one in model.named_parameters()}
        tokens_BT = subject.tokens(2, 65)
        torch.manual_seed(0)
        found["loss"], _ = model.loss(tokens_BT[:, :-1], tokens_BT[:, 1:])
        found["loss"].backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                found[f"gradient {name}"] = parameter.grad
        runs.append(found)
    for name, expected in runs[0].items():
        judge.same(name, runs[1][name], expected)
    return judge.finding()


def _forward(model: DecoderLM, tokens_BT: Tensor) -> Tensor:
    return model(tokens_BT).logits_BTV


def _prefill(model: DecoderLM, tokens_BT: Tensor) -> Tensor:
    return model.prefill(tokens_BT, model.init_state(tokens_BT.shape[0])).logits_BTV


def _step(model: DecoderLM, tokens_BT: Tensor) -> Tensor:
    state = model.init_state(tokens_BT.shape[0])
    return torch.stack([model.step(tokens_B, state) for tokens_B in tokens_BT[:, :8].unbind(1)], 1)


def _read(model: DecoderLM, tokens_BT: Tensor) -> DecoderState:
    state = model.init_state(tokens_BT.shape[0])
    model.prefill(tokens_BT, state)
    return state


def _count(judge: Judge, what: str, y_BTD: Tensor) -> None:
    bad = ~y_BTD.isfinite()
    if bad.any():
        row, token, channel = (int(i) for i in bad.nonzero()[0])
        judge.figure(
            int(bad.sum()), f"{what}: the first at sequence {row}, token {token}, channel {channel}"
        )


@contextlib.contextmanager
def _poisoned_memory() -> Iterator[None]:
    """Memory that torch hands out uninitialised is filled with NaN."""

    def poisoning(make):
        def made(*arguments, **options):
            tensor = make(*arguments, **options)
            # A model's parameters start as such memory too, and on the meta device there is none.
            usable = tensor.is_floating_point() and not tensor.is_meta
            return tensor.fill_(float("nan")) if usable else tensor

        return made

    with (
        mock.patch.object(torch.Tensor, "new_empty", poisoning(torch.Tensor.new_empty)),
        mock.patch.object(torch, "empty_like", poisoning(torch.empty_like)),
    ):
        yield
