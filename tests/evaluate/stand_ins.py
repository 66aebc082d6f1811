"""Models whose every score can be worked out by hand, and small shards."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from ham.model.decoder import DecoderOutput
from ham.model.mixer import MixerAux
from ham.train.shards import ShardWriter
from ham.train.tokenizer import ByteTokenizer


class UniformModel(torch.nn.Module):
    """Gives every token the same probability; it prefers token 0 by the order of the ids."""

    routes = False
    library = None
    device = torch.device("cpu")

    def __init__(self, vocabulary_size: int = 257, context: int = 4096, max_positions: int = 8192):
        super().__init__()
        self.config = SimpleNamespace(
            context=context,
            max_positions=max_positions,
            vocabulary_size=vocabulary_size,
            width=8,
            layers=2,
        )
        self.batches: list[tuple[int, int]] = []

    def held_share(self, position: int) -> None:
        """Nothing is remembered."""

    def check_scores(self) -> None:
        """There is no router."""

    def forward(self, tokens_BT: torch.Tensor) -> DecoderOutput:
        self.batches.append(tuple(tokens_BT.shape))
        logits = torch.zeros(1).expand(*tokens_BT.shape, self.config.vocabulary_size)
        return DecoderOutput(logits, [MixerAux()])

    def init_state(self, batch_size: int) -> TokenMemory:
        """Nothing read yet."""
        return TokenMemory(torch.zeros(batch_size, 0, dtype=torch.int64))

    def prefill(
        self, tokens_BT: torch.Tensor, state: TokenMemory, last_only: bool = False
    ) -> DecoderOutput:
        """What `forward` says of these tokens behind those read before."""
        before = state.tokens_BT.shape[1]
        state.tokens_BT = torch.cat([state.tokens_BT, tokens_BT], dim=1)
        output = self(state.tokens_BT)
        routed = [aux.routed_BT for aux in output.aux]
        aux = [MixerAux(routed_BT=None if r is None else r[:, before:]) for r in routed]
        return DecoderOutput(output.logits_BTV[:, before:], aux)


@dataclass
class TokenMemory:
    """The decoding memory of a stand-in: every token read."""

    tokens_BT: torch.Tensor

    @classmethod
    def join(cls, states: list[TokenMemory]) -> TokenMemory:
        """All sequences of `states`."""
        return cls(torch.cat([state.tokens_BT for state in states]))


class SuccessorModel(UniformModel):
    """Believes with logit 5 that token n is followed by n + 1; routes tokens with even ids."""

    routes = True

    def forward(self, tokens_BT: torch.Tensor) -> DecoderOutput:
        self.batches.append(tuple(tokens_BT.shape))
        size = self.config.vocabulary_size
        logits = 5.0 * torch.nn.functional.one_hot((tokens_BT + 1) % size, size).float()
        return DecoderOutput(logits, [MixerAux(), MixerAux(routed_BT=tokens_BT % 2 == 0)])


class InductionModel(UniformModel):
    """Predicts what followed the longest earlier copy of the text just read."""

    def forward(self, tokens_BT: torch.Tensor) -> DecoderOutput:
        logits = torch.zeros(*tokens_BT.shape, self.config.vocabulary_size)
        for row, tokens in enumerate(tokens_BT.numpy()):
            length = len(tokens)
            same = tokens[:, None] == tokens[None, :]
            matched = np.zeros((length, length), dtype=int)
            for end in range(1, length):
                before = np.concatenate(([0], matched[end - 1, :-1]))
                matched[end] = np.where(same[end], before + 1, 0)
                matched[end, end:] = 0
                if matched[end].any():
                    logits[row, end, tokens[matched[end].argmax() + 1]] = 9.0
        return DecoderOutput(logits, [MixerAux()])


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


WORDS = "the whale and a ship of old men sailed upon that wide sea while stars were far"


def write_shard(path: Path, documents: list[list[int]]) -> None:
    """A byte shard of these documents."""
    with ShardWriter(path, ByteTokenizer()) as writer:
        for document in documents:
            writer.add(np.array(document), len(document))


def prose(rng: np.random.Generator, length: int) -> list[int]:
    """`length` bytes of words in random order."""
    text = " ".join(rng.choice(WORDS.split(), size=length // 2))
    return list(text.encode())[:length]
