"""The interface between a sequence mixer and everything else.

Dimension letters, used in every module of this project: B batch, T time, D model width, H heads,
K head size of queries and keys, V head size of values, N packed (routed) keys, L layers,
P head size and S state size of Mamba-2. `q_BTHK` is a tensor with those axes in that order.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn

from ham.config import Strict
from ham.model.knob import Knob

if TYPE_CHECKING:
    from ham.routing import ThresholdController


class MixerOptions(Strict):
    """Base of the options of a mixer: typed, no unknown keys."""

    def check_context(self, context: int) -> None:
        """Raise `ConfigError` when an option does not fit the training context (tokens)."""


@dataclass(frozen=True)
class MixerShape:
    """Where in which decoder a mixer sits.

    Attributes:
        width: Model width D.
        heads: Number of heads H; D is a multiple of it.
        layer: Index of the layer, from 0.
        layers: Number of layers.
        max_positions: Longest sequence the mixer may be asked to read.
        kernels: Provider of the operations in `kernels/`, or `auto`.
        vocabulary_size: Number of token ids; 0 where the mixer is used without a vocabulary.
        seed: Of the training; that of every hash for which no option names one.
    """

    width: int
    heads: int
    layer: int = 0
    layers: int = 1
    max_positions: int = 8192
    kernels: str = "auto"
    vocabulary_size: int = 0
    seed: int = 0

    @property
    def head_dim(self) -> int:
        """Head size K = D / H."""
        return self.width // self.heads


@dataclass
class RoutingHints:
    """What a mixer may know of its tokens besides their vectors.

    Attributes:
        tokens_BT: Int64 token ids.
        wanted_BT: Boolean; which tokens a later question will ask for. None outside recall tasks.
    """

    tokens_BT: Tensor
    wanted_BT: Tensor | None = None


@dataclass
class MixerAux:
    """What a mixer reports besides its output.

    Attributes:
        routed_BT: Boolean; which tokens entered the KV cache that the heads share. None where that
            is not a choice, or where every head has a cache of its own.
        score_BT: Float32 routing score, detached; a token is routed if its score >= threshold.
        loss: Scalar auxiliary loss to add to the task loss, or None.
        routed_BTH: Boolean; the same for every head, where each decides alone.
        score_BTH: Float32 score of every head, where each decides alone.
    """

    routed_BT: Tensor | None = None
    score_BT: Tensor | None = None
    loss: Tensor | None = None
    routed_BTH: Tensor | None = None
    score_BTH: Tensor | None = None

    def kept_share_BT(self) -> Tensor | None:
        """Float32 share of the layer's caches that keep each token; None if it does not route.

        0 or 1 where the heads share one cache.
        """
        if self.routed_BTH is not None:
            return self.routed_BTH.float().mean(-1)
        return None if self.routed_BT is None else self.routed_BT.float()


class MixerState(ABC):
    """The decoding memory of one layer for a batch of sequences.

    Every byte that decoding keeps per sequence is a tensor listed by `tensors`.
    """

    @abstractmethod
    def tensors(self) -> dict[str, list[Tensor]]:
        """All tensors held, by kind: `kv`, `positions`, `page_table`, `recurrent`, `conv`.

        A paged cache adds `free_pages` while its pool has pages that no sequence owns.
        """

    def bytes_allocated(self) -> dict[str, int]:
        """Allocated bytes by kind, counted on the tensors themselves."""
        return {
            kind: sum(tensor.numel() * tensor.element_size() for tensor in tensors)
            for kind, tensors in self.tensors().items()
        }

    @abstractmethod
    def select(self, index_B: Tensor) -> None:
        """Keep only the sequences `index_B` (int64), in that order; used to reorder a batch."""

    @classmethod
    @abstractmethod
    def join(cls, states: Sequence[Self]) -> Self:
        """One memory of all sequences of `states` (at least one), which stay as they are.

        The sequences may stand at different positions. From then on every sequence must go on
        exactly as it would alone.
        """

    def kept_B(self) -> Tensor | None:
        """Tokens that each sequence keeps in its cache (int); None where that is not a choice."""
        return None


@dataclass(frozen=True)
class StateBytes:
    """Declared bytes of one layer's decoding memory for one sequence.

    Attributes:
        kv: Keys and values of the tokens kept, without unused slots.
        positions: Positions stored with them.
        page_table: Page tables and counts.
        recurrent: Recurrent state.
        conv: Inputs that a short convolution still needs.
        allocated: Everything, including slots allocated and not used yet.
    """

    kv: int = 0
    positions: int = 0
    page_table: int = 0
    recurrent: int = 0
    conv: int = 0
    allocated: int = 0

    @property
    def used(self) -> int:
        """Bytes that hold information."""
        return self.kv + self.positions + self.page_table + self.recurrent + self.conv


class SequenceMixer(nn.Module, ABC):
    """Maps a sequence to a sequence, causally, in parallel or token by token.

    A subclass registers with `ham.model.registry.register_baseline` and lives alone in
    `baselines/<name>.py`. Its constructor takes `(shape: MixerShape, options: Options)`.

    Class attributes:
        Options: The pydantic class of its options.
        title: Name for tables and figures.
        paper: Where it is described.
        routes: Whether it chooses which tokens enter its cache; it then has a `controller`.
        uses_hints: Whether forward, prefill and step take the keyword `hints: RoutingHints`.
        one_graph: Whether torch.compile makes one graph of it on every device; false where shapes
            depend on what was computed, such as the number of routed tokens.
        operations: Operations of `kernels/` that it calls with `provider=shape.kernels`.
        small_options: Options with which a sequence of a hundred tokens meets all of its branches;
            the rules of `ham.conformance` and the tests use them at a width of 32.
        memory_knobs: Options that decide how much decoding remembers; `ham match` turns the first
            that applies, and tries the others where that one does not come close enough.

    Attributes:
        controller: The threshold of a mixer that routes by one, else None.
    """

    Options: ClassVar[type[MixerOptions]] = MixerOptions
    registered_name: ClassVar[str] = ""
    title: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    routes: ClassVar[bool] = False
    uses_hints: ClassVar[bool] = False
    controller: ThresholdController | None = None
    one_graph: ClassVar[bool] = True
    operations: ClassVar[tuple[str, ...]] = ()
    small_options: ClassVar[dict[str, Any]] = {}
    memory_knobs: ClassVar[tuple[Knob, ...]] = ()

    def __init__(self, shape: MixerShape, options: MixerOptions):
        super().__init__()
        self.shape = shape
        self.options = options

    @abstractmethod
    def forward(self, x_BTD: Tensor) -> tuple[Tensor, MixerAux]:
        """Mix a whole sequence from an empty memory; returns `y_BTD` and the report."""

    @abstractmethod
    def init_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> MixerState:
        """An empty decoding memory; KV and conv tensors in `dtype`, recurrent ones in float32.

        With `dtype=torch.float64` everything is float64.
        """

    @abstractmethod
    def prefill(self, x_BTD: Tensor, state: MixerState) -> tuple[Tensor, MixerAux]:
        """Continue from `state` with T tokens at once and update it; same result as T steps."""

    @abstractmethod
    def step(self, x_BD: Tensor, state: MixerState) -> Tensor:
        """Continue from `state` with one token and update it; returns `y_BD`."""

    @abstractmethod
    def forward_flops(self, context: int, kv_fraction: float = 1.0) -> float:
        """FLOPs of one forward pass over one sequence of `context` tokens (multiply-add = 2).

        Training costs three times that (Kaplan et al. 2020, section 2.1: backward = 2 forward).
        """

    @abstractmethod
    def decode_flops(self, position: int, kv_fraction: float = 1.0) -> float:
        """FLOPs of one decode step with `position` tokens already read."""

    @abstractmethod
    def state_bytes(
        self, position: int, kv_fraction: float = 1.0, element_size: int = 2
    ) -> StateBytes:
        """Declared bytes after `position` tokens of one sequence, of which that share was routed.

        `element_size` is the size of a KV element in bytes; recurrent states are float32 (or
        float64 when `element_size` is 8).
        """

    def held_share(self, position: int) -> float | None:
        """Share of the `position` >= 1 tokens read that is in the cache, where a schedule decides.

        1 for full attention; None where a router or a window decides, or there is no cache.
        """
        return None

    def attention_provider(self, device: torch.device) -> str | None:
        """What computes its attention over long sequences on `device`, for rows to name.

        None where it is an operation of `kernels/`, torch's own attention, or there is none.
        """
        return None

    def end_step(self) -> None:
        """Called once after each optimiser step, unless there is a `controller`.

        A model moves the thresholds of all its layers together, by `ham.routing.follow`.
        """
