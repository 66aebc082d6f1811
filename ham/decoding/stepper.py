"""What generation asks of a decoder, and the plain one: the model's own step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ham.model.language_model import LanguageModel, Memory


class Stepper(Protocol):
    """Continues a batch of sequences, one token each per step.

    Attributes:
        name: What computes, in a few words.
        lengths: Tokens read of each sequence.
    """

    name: str
    lengths: list[int]

    def step(self, tokens_B: Tensor) -> Tensor:
        """Read one token per sequence; `logits_BV`, valid until the next step."""

    def select(self, index: Sequence[int]) -> None:
        """Keep the sequences `index`, increasing."""

    def kept(self, places: Sequence[int]) -> dict[int, int]:
        """Tokens in the caches of the sequences `places`, by layer that routes."""

    def bytes_allocated(self) -> dict[str, int]:
        """Bytes of the decoding memory by kind."""

    def check(self) -> None:
        """Raise `NotFiniteError` if routing met numbers that are not finite."""

    def release(self) -> Memory:
        """Give the decoding state back; the stepper is of no use afterwards."""


class EagerStepper:
    """The model's own step, for every architecture and device."""

    name = "the model's own steps"

    def __init__(self, model: LanguageModel, state: Memory):
        self.model = model
        self.state = state

    @property
    def lengths(self) -> list[int]:
        """Tokens read of each sequence."""
        return self.state.positions.lengths

    def step(self, tokens_B: Tensor) -> Tensor:
        """One step of the model."""
        return self.model.step(tokens_B, self.state)

    def select(self, index: Sequence[int]) -> None:
        """Keep the sequences `index`."""
        self.state.select(torch.tensor(list(index), device=self.model.device))

    def kept(self, places: Sequence[int]) -> dict[int, int]:
        """Tokens in the caches, by layer."""
        counts = {}
        for layer, memory in enumerate(self.state.layers):
            kept_B = memory.kept_B()
            if kept_B is not None:
                counts[layer] = round(float(kept_B[list(places)].double().sum()))
        return counts

    def bytes_allocated(self) -> dict[str, int]:
        """Bytes of the state by kind."""
        return self.state.bytes_allocated()

    def check(self) -> None:
        """Scores are checked where a prompt is read, logits at every step."""

    def release(self) -> Memory:
        """The state."""
        return self.state


def make_stepper(model: LanguageModel, state: Memory, fused: bool | None = None) -> Stepper:
    """A decoder for `state`, which it takes over.

    Args:
        model: In evaluation mode.
        state: What a prefill left.
        fused: True for a `GraphDecoder`, False for the model's own step, None for the first on a
            CUDA device where it supports the model.

    Raises:
        ConfigError: If fused kernels are asked for and cannot do this model.
    """
    if fused is None:
        fused = model.device.type == "cuda" and _supported(model)
    if not fused:
        return EagerStepper(model, state)
    from ham.decoding.graph import GraphDecoder

    return GraphDecoder(model, state)


def _supported(model: LanguageModel) -> bool:
    # Loads Triton, which most uses of a model on a CPU never need.
    from ham.decoding.graph import unsupported

    return unsupported(model) is None
