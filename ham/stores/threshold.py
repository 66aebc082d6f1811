"""The cache of HAM: every token whose score reaches the threshold, in pages that sequences own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from ham.cache import INT32_BYTES, PAGE_TOKENS, PagedKVCache, grown_tokens
from ham.kernels.routed_attention import routed_attention, routed_attention_cached
from ham.measure.cost import causal_pairs
from ham.model.mixer import StateBytes
from ham.stores.attention import Position, Stretch, attend_stretches, positions_of
from ham.stores.base import KVFraction, StoreCache, TokenStore
from ham.stores.recent import RecentTokens


@dataclass
class ThresholdCache(StoreCache):
    """Routed tokens in pages, recent ones in a ring; where each head decides, a row is a head.

    Attributes:
        paged: Routed tokens of `B * rows_per_sequence` rows.
        recent: The window of the same rows.
        rows_per_sequence: 1, or H where each head has its own cache.
    """

    paged: PagedKVCache
    recent: RecentTokens
    rows_per_sequence: int = 1

    def tensors(self) -> dict[str, list[Tensor]]:
        """All tensors held, by kind."""
        held = self.paged.tensors()
        return {**held, "kv": [*held["kv"], *self.recent.tensors()]}

    def select(self, index_B: Tensor) -> None:
        """Keep the sequences `index_B`, in that order."""
        rows = torch.arange(self.rows_per_sequence, device=index_B.device)
        index_R = (index_B[:, None] * self.rows_per_sequence + rows).flatten()
        self.paged.select(index_R)
        self.recent.select(index_R)

    @classmethod
    def join(cls, caches: Sequence[Self]) -> Self:
        """One cache for the sequences of all `caches`, in order."""
        return cls(
            PagedKVCache.join([cache.paged for cache in caches]),
            RecentTokens.join([cache.recent for cache in caches]),
            caches[0].rows_per_sequence,
        )


class ThresholdStore(TokenStore):
    """Visible are the routed tokens, the window and the sink."""

    uses_threshold: ClassVar[bool] = True

    def attend(
        self,
        q_BTHK: Tensor,
        k_BTHK: Tensor,
        v_BTHV: Tensor,
        score: Tensor,
        routed: Tensor,
        router_score: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Read a whole sequence from an empty memory; `kept` is `routed`."""
        if not self.per_head:
            o_BTHV = routed_attention(
                q_BTHK,
                k_BTHK,
                v_BTHV,
                routed,
                window=self.window,
                sink_HK=self.sink_HK,
                router_score_BT=router_score,
                provider=self.provider,
            )
            return o_BTHV, routed
        parts = [self._rows(x) for x in (q_BTHK, k_BTHK, v_BTHV)]
        masks = [None if x is None else self._mask_rows(x) for x in (routed, router_score)]
        if self.sink_HK is not None:
            parts, masks = self._behind_the_sink(parts, masks)
        o_RT1V = routed_attention(
            *parts,
            masks[0],
            window=self.window,
            router_score_BT=masks[1],
            provider=self.provider,
        )[:, -q_BTHK.shape[1] :]
        return self._from_rows(o_RT1V), routed

    def init_cache(self, batch: int, device: torch.device, dtype: torch.dtype) -> ThresholdCache:
        """No page, and an empty ring."""
        like = torch.empty(0, device=device, dtype=dtype)
        rows, heads = batch * self.groups, self.heads // self.groups
        paged = PagedKVCache(rows, heads, self.head_dim, like)
        return ThresholdCache(paged, self._init_recent(rows, like, heads), self.groups)

    def attend_cached(
        self,
        q_BTHK: Tensor,
        k_BTHK: Tensor,
        v_BTHV: Tensor,
        score: Tensor,
        routed: Tensor,
        cache: ThresholdCache,
        position: Position,
    ) -> tuple[Tensor, Tensor]:
        """Continue from `cache` with T tokens."""
        starts = position
        if self.per_head and isinstance(position, Tensor):
            starts = position.repeat_interleave(self.heads)
        q_RTHK, k_RTHK, v_RTHV = (self._rows(x) for x in (q_BTHK, k_BTHK, v_BTHV))
        cache.paged.append(k_RTHK, v_RTHV, self._mask_rows(routed), starts)
        if isinstance(position, int) and position == 0:
            o_BTHV, _ = self.attend(q_BTHK, k_BTHK, v_BTHV, score, routed)
        else:
            o_BTHV = self._from_rows(self._read(q_RTHK, k_RTHK, v_RTHV, cache, starts))
        if self.ring_size:
            cache.recent.append(k_RTHK.transpose(1, 2), v_RTHV.transpose(1, 2), starts)
        return o_BTHV, routed

    def state_bytes(
        self, position: int, kv_fraction: KVFraction = 1.0, element_size: int = 2
    ) -> StateBytes:
        """Pages of each cache and the ring; exact if `kv_fraction` is that of each cache."""
        shared = isinstance(kv_fraction, float | int)
        fractions = [kv_fraction] * self.groups if shared else list(kv_fraction)
        counts = [round(position * fraction) for fraction in fractions]
        slots = [grown_tokens(count, PAGE_TOKENS) for count in counts]
        # The table is as wide as its longest row, and each row has a count.
        table = self.groups * (max(slots) // PAGE_TOKENS + 1) * INT32_BYTES
        pair = self._pair_bytes(element_size) // self.groups
        ring = self.ring_size * self._pair_bytes(element_size)
        window = min(position, self.ring_size) * self._pair_bytes(element_size)
        return StateBytes(
            kv=sum(counts) * pair + window,
            positions=sum(counts) * INT32_BYTES,
            page_table=table,
            allocated=sum(slots) * (pair + INT32_BYTES) + table + ring,
        )

    def memory_pairs(self, tokens: int, kv_fraction: float) -> float:
        """Routed tokens spread evenly, outside the window."""
        return kv_fraction * causal_pairs(max(tokens - self.window, 0))

    def memory_keys(self, position: int, kv_fraction: float) -> float:
        """Routed tokens outside the window."""
        return kv_fraction * max(position + 1 - self.window, 0)

    def _read(
        self,
        q_RTHK: Tensor,
        k_RTHK: Tensor,
        v_RTHV: Tensor,
        cache: ThresholdCache,
        starts: Position,
    ) -> Tensor:
        rows, time = q_RTHK.shape[:2]
        positions_RT = positions_of(starts, rows, time, q_RTHK.device)
        packed = cache.paged.packed()
        if not self.window and self.sink_HK is None:
            return routed_attention_cached(
                q_RTHK,
                packed.k_BNHK,
                packed.v_BNHV,
                packed.positions_BN,
                packed.counts_B,
                positions_RT,
            )
        slots_N = torch.arange(packed.k_BNHK.shape[1], device=q_RTHK.device)
        # A routed token inside the window is read there, once.
        outside_RTN = packed.positions_BN[:, None] <= positions_RT[:, :, None] - self.window
        visible_RTN = outside_RTN & (slots_N < packed.counts_B[:, None])[:, None]
        stretches = [
            Stretch(
                packed.k_BNHK.transpose(1, 2), packed.v_BNHV.transpose(1, 2), visible_RTN[:, None]
            )
        ]
        if self.window:
            new = (k_RTHK.transpose(1, 2), v_RTHV.transpose(1, 2))
            stretches.append(self._recent_stretch(cache.recent, *new, starts, positions_RT))
        o_RHTV = attend_stretches(q_RTHK.transpose(1, 2), stretches, self._sink_rows(rows))
        return o_RHTV.transpose(1, 2).to(v_RTHV.dtype)

    def _rows(self, x_BTHX: Tensor) -> Tensor:
        """Heads with caches of their own as sequences of one head, `[B * H, T, 1, X]`."""
        return x_BTHX.transpose(1, 2).flatten(0, 1)[:, :, None] if self.per_head else x_BTHX

    def _mask_rows(self, x: Tensor) -> Tensor:
        """A mask or score of each head, `[B * H, T]`; `[B, T]` serves all heads alike."""
        if not self.per_head:
            return x
        x_BTH = x if x.ndim == 3 else x[..., None].expand(-1, -1, self.heads)
        return x_BTH.transpose(1, 2).flatten(0, 1)

    def _from_rows(self, o_RTHV: Tensor) -> Tensor:
        if not self.per_head:
            return o_RTHV
        return o_RTHV[:, :, 0].unflatten(0, (-1, self.heads)).transpose(1, 2)

    def _sink_rows(self, rows: int) -> Tensor | None:
        """The null key of each row, `[B, H, K]` or `[B * H, 1, K]`."""
        if self.sink_HK is None:
            return None
        if not self.per_head:
            return self.sink_HK.expand(rows, -1, -1)
        return self.sink_HK.repeat(rows // self.heads, 1)[:, None]

    def _behind_the_sink(
        self, parts: list[Tensor], masks: list[Tensor | None]
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        """Put the null key in front as a routed token with the value 0.

        The operation knows one null key per head, shared by the batch, and here heads are rows.
        """
        q_RT1K, k_RT1K, v_RT1V = parts
        sink_R11K = self._sink_rows(q_RT1K.shape[0])[:, None].to(k_RT1K.dtype)
        front = [torch.zeros_like(q_RT1K[:, :1]), sink_R11K, torch.zeros_like(v_RT1V[:, :1])]
        routed_RT, score_RT = masks
        return (
            [torch.cat(pair, dim=1) for pair in zip(front, parts, strict=True)],
            [
                F.pad(routed_RT, (1, 0), value=True),
                None if score_RT is None else F.pad(score_RT, (1, 0)),
            ],
        )
