"""The interface between the HAM layer and what its attention branch may read.

A store decides which tokens a query sees, keeps them while decoding, and says what that costs.
Letters as in `ham.model.mixer` and `ham.stores.attention`. A score or a mask has the shape
`[B, T]` where the heads share one cache and `[B, T, H]` where each head has its own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from ham.measure.cost import attention_flops, causal_pairs
from ham.model.mixer import StateBytes
from ham.stores.attention import Position, Stretch, attend_stretches
from ham.stores.options import StoreOptions
from ham.stores.recent import RecentTokens

INT32_BYTES = 4

KVFraction = float | Sequence[float]
"""Share of tokens in the cache: one number, or one per head where each head has its own cache."""


class StoreCache(ABC):
    """What a store keeps of the tokens read so far, for a batch of sequences."""

    @abstractmethod
    def tensors(self) -> dict[str, list[Tensor]]:
        """All tensors held, by kind: `kv`, `positions` (and scores beside them), `page_table`."""

    @abstractmethod
    def kept_B(self) -> Tensor:
        """Tokens in the cache of each sequence, the window left out; float32, mean over heads."""

    @abstractmethod
    def select(self, index_B: Tensor) -> None:
        """Keep only the sequences `index_B` (int64), in that order."""

    @classmethod
    @abstractmethod
    def join(cls, caches: Sequence[Self]) -> Self:
        """One cache for the sequences of all `caches`, in order; they are not used afterwards."""


class TokenStore(nn.Module, ABC):
    """Which tokens the attention branch of a layer sees.

    Args:
        options: Budget, sizes, window and sink.
        heads: Number of heads H.
        head_dim: Size of a key and of a value.
        per_head: Each head has a cache of its own.
        provider: Provider of the operations in `kernels/`.

    Class attributes:
        uses_threshold: Whether a threshold decides; if not, `routed` is ignored.
    """

    uses_threshold: ClassVar[bool] = False

    def __init__(
        self,
        options: StoreOptions,
        heads: int,
        head_dim: int,
        per_head: bool = False,
        provider: str = "auto",
    ):
        super().__init__()
        self.options = options
        self.heads = heads
        self.head_dim = head_dim
        self.per_head = per_head
        self.provider = provider
        self.window = options.visible_window
        # A learned null key starts as the zero one.
        sink_HK = torch.zeros(heads, head_dim)
        if options.sink == "learned":
            self.sink_HK = nn.Parameter(sink_HK)
        else:
            zero = options.sink == "zero"
            self.register_buffer("sink_HK", sink_HK if zero else None, persistent=False)

    @abstractmethod
    def attend(
        self,
        q_BTHK: Tensor,
        k_BTHK: Tensor,
        v_BTHV: Tensor,
        score: Tensor,
        routed: Tensor | None,
        router_score: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Read a whole sequence from an empty memory.

        Args:
            q_BTHK: Queries.
            k_BTHK: Keys, positions already applied.
            v_BTHV: Values.
            score: Routing score, `[B, T]` or `[B, T, H]`; higher is kept sooner. Ignored under a
                threshold.
            routed: Boolean of the same shape: what the threshold decided. Ignored otherwise.
            router_score: Score through which a learned router gets a gradient, of the same
                shape; see `ham.kernels.routed_attention`.

        Returns:
            `o_BTHV` in the dtype of the values, exactly 0 where a query sees nothing; and the
            boolean mask `kept`, shaped like the score, of the tokens that enter the cache.
        """

    @abstractmethod
    def init_cache(self, batch: int, device: torch.device, dtype: torch.dtype) -> StoreCache:
        """An empty cache with keys and values in `dtype`."""

    @abstractmethod
    def attend_cached(
        self,
        q_BTHK: Tensor,
        k_BTHK: Tensor,
        v_BTHV: Tensor,
        score: Tensor,
        routed: Tensor | None,
        cache: StoreCache,
        position: Position,
    ) -> tuple[Tensor, Tensor]:
        """Continue from `cache`, which is updated, with T >= 1 tokens that stand at `position`.

        Any division of a sequence into pieces gives the outputs of `attend`.
        """

    @abstractmethod
    def state_bytes(
        self, position: int, kv_fraction: KVFraction = 1.0, element_size: int = 2
    ) -> StateBytes:
        """Bytes of the cache of one sequence after `position` tokens, the window included."""

    @abstractmethod
    def memory_pairs(self, tokens: int, kv_fraction: float) -> float:
        """Query-key pairs of one sequence of `tokens` with keys read from the cache's budget."""

    @abstractmethod
    def memory_keys(self, position: int, kv_fraction: float) -> float:
        """Keys of the cache that the query at `position` reads, outside the window."""

    def forward_flops(self, context: int, kv_fraction: float = 1.0) -> float:
        """FLOPs of attention over one sequence; every query attends, only keys are thinned."""
        recent = causal_pairs(context, self.window) if self.window else 0.0
        return self._flops(self.memory_pairs(context, kv_fraction) + recent + self._sinks(context))

    def decode_flops(self, position: int, kv_fraction: float = 1.0) -> float:
        """FLOPs of the attention of one decode step with `position` tokens already read."""
        recent = min(position + 1, self.window)
        return self._flops(self.memory_keys(position, kv_fraction) + recent + self._sinks(1))

    def _sinks(self, queries: int) -> int:
        return 0 if self.sink_HK is None else queries

    def _flops(self, pairs: float) -> float:
        return attention_flops(pairs, self.heads, self.head_dim, self.head_dim)

    @property
    def groups(self) -> int:
        """Number of caches per sequence, G."""
        return self.heads if self.per_head else 1

    @property
    def ring_size(self) -> int:
        """Tokens that decoding keeps for the window."""
        return max(self.window - 1, 0)

    def _pair_bytes(self, element_size: int) -> int:
        """Bytes of the key and the value of one token, all heads together."""
        return 2 * self.heads * self.head_dim * element_size

    def _sink_BHK(self) -> Tensor | None:
        return None if self.sink_HK is None else self.sink_HK[None]

    def _init_recent(self, batch: int, like: Tensor, heads: int | None = None) -> RecentTokens:
        return RecentTokens(batch, heads or self.heads, self.ring_size, self.head_dim, like)

    def _attend(
        self,
        q_BHTK: Tensor,
        memory: Stretch,
        recent: RecentTokens,
        k_BHTK: Tensor,
        v_BHTV: Tensor,
        start: Position,
        positions_BT: Tensor,
    ) -> Tensor:
        """Attention of T new queries over the store's memory, the window and the sink."""
        stretches = [memory]
        if self.window:
            stretches.append(self._recent_stretch(recent, k_BHTK, v_BHTV, start, positions_BT))
        return attend_stretches(q_BHTK, stretches, self._sink_BHK())

    def _recent_stretch(
        self,
        recent: RecentTokens,
        k_BHTK: Tensor,
        v_BHTV: Tensor,
        start: Position,
        positions_BT: Tensor,
    ) -> Stretch:
        """The window of T new queries: the ring as it was before them, and the new tokens."""
        positions_BN = torch.cat((recent.positions_BW(start), positions_BT), dim=1)
        age_BTN = positions_BT[:, :, None] - positions_BN[:, None]
        inside_BTN = (age_BTN >= 0) & (age_BTN < self.window) & (positions_BN >= 0)[:, None]
        return Stretch(
            torch.cat((recent.k_BHWK.to(k_BHTK.dtype), k_BHTK), dim=2),
            torch.cat((recent.v_BHWV.to(v_BHTV.dtype), v_BHTV), dim=2),
            inside_BTN[:, None],
        )
