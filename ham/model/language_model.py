"""What training, evaluation, generation and measurement ask of a language model.

`DecoderLM` and `ham.external.model.ExternalLM` both answer it, and nothing else is asked of either
outside their own packages; so a model of another library goes through the same code. Letters as in
`ham.model.mixer`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from ham.model.decoder import DecoderOutput
from ham.model.mixer import StateBytes
from ham.model.positions import Positions
from ham.routing import ThresholdController


class ModelFacts(Protocol):
    """What is stored beside the weights of any model.

    Attributes:
        arm: Name of the arm.
        mixer: Registered mixer, or `LIBRARY:MODEL_TYPE`.
        vocabulary_size: Number of logits.
        max_positions: Longest sequence that the model may read.
        context: Training context; the default length of an input where there was no training.
        tokenizer: Name of its tokenizer (`ham.train.tokenizer.load_tokenizer`).
    """

    arm: str
    mixer: str
    vocabulary_size: int
    max_positions: int
    context: int
    tokenizer: str

    def to_dict(self) -> dict[str, Any]:
        """A dictionary that JSON can hold."""

    def build(self) -> nn.Module:
        """A `LanguageModel` with new weights, drawn from torch's random numbers."""


class Memory(Protocol):
    """The decoding memory of a batch of sequences.

    Attributes:
        layers: Those of its layers that can tell what they keep.
        positions: How far each sequence has been read.
    """

    layers: Sequence[Any]
    positions: Positions

    @classmethod
    def join(cls, states: Sequence[Self]) -> Self:
        """One memory of all sequences of `states`, which stay as they are."""

    @property
    def position(self) -> int | Tensor:
        """Tokens read: an int while all sequences agree, else int64 `[B]`."""

    def bytes_allocated(self) -> dict[str, int]:
        """Allocated bytes by kind, of all sequences."""

    def select(self, index_B: Tensor) -> None:
        """Keep only the sequences `index_B` (int64, each at most once), in that order."""


class LanguageModel(Protocol):
    """A causal language model; also an `nn.Module`.

    Attributes:
        config: Facts about it.
        training: Whether it is in training mode.
        routes: Whether any layer chooses which tokens enter its cache.
        routing_layers: Indices of these layers.
        controllers: Their thresholds.
        needs_unigram_counts: Whether `set_unigram_counts` must be called before training.
        target_fraction: Share of tokens that its routers are to keep; 1 without one.
        library: Where it comes from; None for this project.
        flops_source: How `forward_flops` is found; None where each layer declares its own.
    """

    config: ModelFacts
    training: bool
    routes: bool
    routing_layers: Sequence[int]
    controllers: Sequence[ThresholdController]
    needs_unigram_counts: bool
    target_fraction: float
    library: str | None
    flops_source: str | None

    @property
    def device(self) -> torch.device:
        """Where the weights are."""

    def train(self, mode: bool = True) -> Self:
        """Training or evaluation mode."""

    def eval(self) -> Self:
        """Evaluation mode."""

    def check_trains(self) -> None:
        """Raise `UnusableModelError` if it cannot be trained where its weights are."""

    def __call__(self, tokens_BT: Tensor, wanted_BT: Tensor | None = None) -> DecoderOutput:
        """Logits at every position, each sequence read from its start."""

    def loss(
        self, inputs_BT: Tensor, targets_BT: Tensor, wanted_BT: Tensor | None = None
    ) -> tuple[Tensor, DecoderOutput]:
        """Mean cross-entropy in nats per token, plus auxiliary losses."""

    def end_step(self) -> None:
        """Called once after each optimiser step."""

    def check_scores(self) -> None:
        """Raise if a routing score was not finite."""

    def set_unigram_counts(self, counts_V: Tensor) -> None:
        """How often each token occurs in the training text."""

    def init_state(self, batch_size: int) -> Memory:
        """An empty decoding memory."""

    def prefill(
        self, tokens_BT: Tensor, state: Memory, *, last_only: bool = False
    ) -> DecoderOutput:
        """Read T tokens, continuing from `state`, which is updated."""

    def step(self, tokens_B: Tensor, state: Memory) -> Tensor:
        """Read one token per sequence; `logits_BV`."""

    def held_share(self, position: int) -> float | None:
        """Share of `position` tokens that its caches hold; None where there is no such share."""

    def planned_bytes(self, context: int) -> int:
        """Bytes of one sequence's memory after `context` tokens, keys and values in 16 bits."""

    def declared_bytes(self, position: int, cache_fractions: Sequence[Any]) -> StateBytes | None:
        """What its own formula says a sequence's memory takes; None where there is no formula."""

    def count_parameters(self) -> int | None:
        """Trained parameters, shared ones counted once."""

    def forward_flops(self, context: int, kv_fraction: float = 1.0) -> float:
        """FLOPs of one forward pass over one sequence."""

    def decode_flops(self, position: int, kv_fraction: float = 1.0) -> float:
        """FLOPs of one decode step with `position` tokens already read."""

    def write(self, folder: Path) -> Path:
        """Write the weights into a folder; returns the file that holds them."""

    def state_dict(self) -> dict[str, Tensor]:
        """All tensors by name."""

    def load_state_dict(self, state: Mapping[str, Tensor], strict: bool = True) -> Any:
        """The inverse."""


def flops_labels(model: LanguageModel) -> dict[str, str]:
    """Labels of a row whose value rests on FLOPs that no layer declared: how they were found."""
    return {} if model.flops_source is None else {"flops": model.flops_source}
