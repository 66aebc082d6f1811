"""Rules about what other software does to a model: torch.compile and transformers."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ham.conformance.finding import Finding, Judge, not_judged
from ham.conformance.subject import Subject
from ham.model.decoder import DecoderLM, DecoderOutput

LIMIT = 1e-9
"""In float64; |found - expected| / (1 + |expected|)."""


def compiled(subject: Subject) -> Finding:
    """Under torch.compile, in one graph unless it says otherwise, it computes what it did."""
    backend = subject.compiler
    if backend == "inductor" and (missing := _missing_compiler()):
        return not_judged(f"torch.compile cannot run here: {missing}")
    # A second layer would double the time and show nothing new.
    judge, model = Judge(LIMIT), subject.model(layers=1).train()
    tokens_BT = subject.tokens(2, 65)
    expected = _logits_and_gradients(model, model.forward, tokens_BT)
    # Code compiled for other models counts towards dynamo's limit of recompilations.
    torch._dynamo.reset()
    try:
        one_graph = subject.mixer.one_graph
        forward = torch.compile(model.forward, backend=backend, fullgraph=one_graph)
        found = _logits_and_gradients(model, forward, tokens_BT)
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


def _logits_and_gradients(
    model: DecoderLM, forward: Callable[[Tensor], DecoderOutput], tokens_BT: Tensor
) -> dict[str, Tensor]:
    """Logits and every gradient of their loss, which is taken in float64, unlike in training."""
    model.zero_grad()
    output = forward(tokens_BT[:, :-1])
    loss = F.cross_entropy(output.logits_BTV.flatten(0, 1), tokens_BT[:, 1:].flatten())
    sum((aux.loss for aux in output.aux if aux.loss is not None), loss).backward()
    gradients = {
        f"gradient of {name}": parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return {"logits": output.logits_BTV.detach(), **gradients}


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
