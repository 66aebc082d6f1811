"""Models whose every score can be worked out by hand, for the tests of this folder."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch

from ham.model.decoder import DecoderOutput
from ham.model.mixer import MixerAux


class UniformModel(torch.nn.Module):
    """Gives every token the same probability; it prefers token 0 by the order of the ids."""

    routes = False
    device = torch.device("cpu")

    def __init__(self, vocabulary_size: int = 257, context: int = 4096, max_positions: int = 8192):
        super().__init__()
        self.config = SimpleNamespace(
            context=context, max_positions=max_positions, vocabulary_size=vocabulary_size
        )
        self.batches: list[tuple[int, int]] = []

    def forward(self, tokens_BT: torch.Tensor) -> DecoderOutput:
        self.batches.append(tuple(tokens_BT.shape))
        logits = torch.zeros(1).expand(*tokens_BT.shape, self.config.vocabulary_size)
        return DecoderOutput(logits, [MixerAux()])


class SuccessorModel(UniformModel):
    """Believes with logit 5 that token n is followed by n + 1; routes tokens with even ids."""

    routes = True

    def forward(self, tokens_BT: torch.Tensor) -> DecoderOutput:
        self.batches.append(tuple(tokens_BT.shape))
        size = self.config.vocabulary_size
        logits = 5.0 * torch.nn.functional.one_hot((tokens_BT + 1) % size, size).float()
        return DecoderOutput(logits, [MixerAux(), MixerAux(routed_BT=tokens_BT % 2 == 0)])


@dataclass
class FakeRequest:
    """What the adapter reads of an lm-eval `Instance`."""

    args: tuple[Any, ...]
    task_name: str = "task"
    resps: list[Any] = field(default_factory=list)


class ByteText:
    """The byte tokenizer, written out again so that these tests do not rest on it."""

    name = "byte"
    vocabulary_size = 257
    end_of_text = 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, tokens: Any) -> str:
        return bytes(token for token in tokens if token < 256).decode(errors="replace")

    def count_bytes(self, tokens: Any) -> int:
        return sum(token < 256 for token in tokens)
