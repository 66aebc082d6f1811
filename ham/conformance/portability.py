"""Rules about what other software does to a model: torch.compile and transformers."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ham.conformance.finding import Finding, Judge, not_judged
from ham.conformance.subject import Subject
from ham.model.decoder import DecoderLM

LIMIT = 1e-9
"""In float64; |found - expected| / (1 + |expected|)."""


def compiled(subject: Subject) -> Finding:
    """Under torch.compile, in one graph unless it says otherwise, it computes what it did."""
    backend = subject.compiler
    if backend == "inductor" and (missing := _missing_compiler()):
        return not_judged(f"torch.compile cannot run here: {missing}")
    judge, model = Judge(LIMIT), subject.model().train()
    tokens_BT = subject.tokens(2, 65)
    expected = _loss_and_gradients(model, model.loss, tokens_BT)
    # Code compiled for other models counts towards dynamo's limit of recompilations.
    torch._dynamo.reset()
    try:
        function = torch.compile(model.loss, backend=backend, fullgraph=subject.mixer.one_graph)
        found = _loss_and_gradients(model, function, tokens_BT)
    except torch._dynamo.exc.TorchDynamoException as error:
        judge.fail(f"with backend {backend}: {_reason(error)}")
        return judge.finding()
    finally:
        torch._dynamo.reset()
    for name, tensor in expected.items():
        axes = "BTV" if name == "logits" else ""
        judge.same(f"compiled by {backend}, {name}", found[name], tensor, axes)
    return judge.finding()


@torch.no_grad()
def pretrained(subject: Subject) -> Finding:
    """Saved for transformers and loaded by its auto class, it gives the same logits."""
    if missing := _missing_transformers():
        return not_judged(missing)
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    from ham.hf import save
    from ham.train.tokenizer import ByteTokenizer

    logging.disable_progress_bar()
    judge, tokens_BT = Judge(subject.exact), subject.tokens(2, 40)
    model = subject.model(torch.float32)
    with tempfile.TemporaryDirectory() as parent:
        save(model, ByteTokenizer(), Path(parent) / "model")
        loaded = AutoModelForCausalLM.from_pretrained(Path(parent) / "model").to(subject.device)
    found_BTV, expected_BTV = loaded(tokens_BT).logits, model(tokens_BT).logits_BTV
    judge.same("logits after from_pretrained", found_BTV, expected_BTV, "BTV")
    return judge.finding()


@torch.no_grad()
def padding(subject: Subject) -> Finding:
    """Masked tokens before or after a sequence, as transformers pads batches, change nothing."""
    if missing := _missing_transformers():
        return not_judged(missing)
    from ham.hf import HamForCausalLM

    judge, model = Judge(LIMIT), subject.model()
    wrapped, tokens_BT = HamForCausalLM.from_decoder(model), subject.tokens(3, 50)
    spans = ((13, 50), (0, 50), (0, 31))
    mask_BT = torch.zeros_like(tokens_BT)
    for row, (first, end) in enumerate(spans):
        mask_BT[row, first:end] = 1
    found_BTV = wrapped(tokens_BT, mask_BT).logits
    for row, (first, end) in enumerate(spans):
        alone_BTV = model(tokens_BT[row : row + 1, first:end]).logits_BTV
        what = f"logits of sequence {row} with {first} masked tokens before and {50 - end} after"
        judge.same(what, found_BTV[row : row + 1, first:end], alone_BTV, "BTV", first)
    return judge.finding()


def _loss_and_gradients(
    model: DecoderLM, loss_function: Callable, tokens_BT: Tensor
) -> dict[str, Tensor]:
    """Loss, logits and every gradient of one training step without its update."""
    model.zero_grad()
    loss, output = loss_function(tokens_BT[:, :-1], tokens_BT[:, 1:])
    loss.backward()
    gradients = {
        f"gradient of {name}": parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return {"logits": output.logits_BTV.detach(), "loss": loss.detach(), **gradients}


def _missing_compiler() -> str:
    """Why inductor cannot build code here; empty where it can."""
    from ham.doctor import examine

    (check,) = examine("compiler")
    return "" if check.good else check.detail


def _missing_transformers() -> str:
    """Why transformers cannot be used; empty where it can."""
    from ham.errors import ConfigError
    from ham.hf.requirement import require_transformers

    try:
        require_transformers()
    except ConfigError as error:
        return str(error)
    return ""


def _reason(error: Exception) -> str:
    """The first sentence of a failed compilation and the line of the mixer that caused it."""
    text = " ".join(str(error).split("\n\n")[0].split())
    frames = getattr(error, "real_stack", None)
    place = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {text[:300]}{place}"
