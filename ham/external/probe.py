"""What is checked of a model of another library before its numbers are believed.

A few tokens tell whether it runs on the device, whether a later token changes earlier logits (some
types of `transformers` are encoders unless told otherwise; their bits per byte would mean nothing),
whether it can be trained, and whether decoding from its cache gives what reading at once gives.

Each is asked in float32 where the model can: bfloat16 would hide a cache that forgets a part of the
past, which at random weights moves the logits by less than a thousandth.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ham.errors import UnusableModelError

if TYPE_CHECKING:
    from ham.external.model import ExternalLM

TOKENS = 12
CUTS = (5, 3)
"""Pieces that a sequence of `TOKENS` tokens is read in; the rest follows token by token."""

TOLERANCE = {"cpu": 1e-5, "cuda": 5e-3}
"""Largest difference of logits that counts as rounding in float32, relative to the largest logit.

On a GPU kernels multiply in TF32.
"""

AUTOCAST_TOLERANCE = 0.05
"""The same in bfloat16."""


@torch.no_grad()
def check_causal(model: ExternalLM) -> None:
    """Check that it runs, and that the last token changes only the last logits.

    Raises:
        UnusableModelError: If not; says how far an earlier logit moved.
    """
    tokens_BT, changed_BT = _tokens(model), _tokens(model)
    changed_BT[:, -1] += 1

    def moved() -> float:
        before_BTV, after_BTV = model(tokens_BT).logits_BTV, model(changed_BT).logits_BTV
        return _difference(before_BTV[:, :-1], after_BTV[:, :-1])

    found, limit = _measured(model, moved)
    if not found <= limit:
        raise UnusableModelError(
            f"model {model.config.arm!r} ({model.config.mixer}) is not causal: token "
            f"{TOKENS - 1} moves earlier logits by {found:.1e} of the largest (limit {limit:.0e}); "
            "a type that is an encoder by default may need `is_decoder: true` under `config`"
        )


def check_trains(model: ExternalLM) -> None:
    """Check that the loss of a short sequence has a gradient.

    Raises:
        UnusableModelError: If the backward pass fails or no weight gets a gradient.
    """
    was_training = model.training
    model.train()
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        # Dropout must not move the random numbers that training continues from.
        with torch.random.fork_rng(devices=devices):
            tokens_BT = _tokens(model)
            loss, _ = model.loss(tokens_BT[:, :-1], tokens_BT[:, 1:])
            loss.backward()
    except UnusableModelError:
        raise
    except Exception as error:  # backward kernels fail in their own ways
        raise UnusableModelError(
            f"model {model.config.arm!r} ({model.config.mixer}) cannot be trained on "
            f"{model.device.type}: {type(error).__name__}: {' '.join(str(error).split())}"
        ) from error
    finally:
        model.zero_grad(set_to_none=True)
        model.train(was_training)


@torch.no_grad()
def reads_pieces(model: ExternalLM) -> bool:
    """Compare prefill and steps with reading at once; returns whether prefill may come in pieces.

    Raises:
        UnusableModelError: If steps that follow a prefill give other logits.
    """
    tokens_BT = _tokens(model)

    def differs(cuts: tuple[int, ...]) -> float:
        return _difference(model(tokens_BT).logits_BTV, _continued(model, tokens_BT, cuts))

    found, limit = _measured(model, lambda: differs((sum(CUTS),)))
    if not found <= limit:
        raise UnusableModelError(
            f"model {model.config.arm!r} ({model.config.mixer}): steps from its cache give logits "
            f"that differ by {found:.1e} of the largest from reading at once (limit {limit:.0e}), "
            "so neither its decoding nor its cache can be measured"
        )
    try:
        found, limit = _measured(model, lambda: differs(CUTS))
    except UnusableModelError:
        return False
    return found <= limit


def _continued(model: ExternalLM, tokens_BT: Tensor, cuts: tuple[int, ...]) -> Tensor:
    cache, logits = None, []
    lengths = [*cuts, *[1] * (TOKENS - sum(cuts))]
    for part_BT in tokens_BT.split(lengths, dim=1):
        part_BTV, cache = model.read(part_BT, cache)
        logits.append(part_BTV)
    return torch.cat(logits, dim=1)


def _tokens(model: ExternalLM) -> Tensor:
    """Two sequences of different tokens."""
    tokens = 7 * torch.arange(2 * TOKENS, device=model.device)
    return (tokens % (model.config.vocabulary_size - 1)).reshape(2, TOKENS)


def _difference(one: Tensor, other: Tensor) -> float:
    """Relative to the largest; infinite for other shapes."""
    if one.shape != other.shape:
        return math.inf
    return float((one.float() - other.float()).abs().max() / one.float().abs().max())


def _measured(model: ExternalLM, difference: Callable[[], float]) -> tuple[float, float]:
    """A difference in evaluation mode, and its limit: in float32, or what a GPU's kernels take."""
    was_training, device = model.training, model.device.type
    model.eval()
    try:
        try:
            with torch.autocast(device, enabled=False):
                return difference(), TOLERANCE[device]
        except UnusableModelError:
            if device == "cpu":
                raise
        with torch.autocast(device, dtype=torch.bfloat16):
            return difference(), AUTOCAST_TOLERANCE
    finally:
        model.train(was_training)
