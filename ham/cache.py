"""Decoding memories that hold keys and values: dense, sliding-window, and paged (`ham.paging`).

Every class allocates what it declares: `bytes_allocated` counts the tensors themselves, and the
`state_bytes` methods of the mixers are tested against it. Letters as in `ham.model.mixer`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from ham.model.positions import Positions
from ham.paging.cache import PackedKeys, PagedKVCache
from ham.paging.layout import PAGE_TOKENS, paged_bytes

__all__ = [
    "BLOCK_TOKENS",
    "PAGE_TOKENS",
    "DenseKVCache",
    "PackedKeys",
    "PagedKVCache",
    "WindowKVCache",
    "grown_tokens",
    "paged_bytes",
]

BLOCK_TOKENS = 64
"""Tokens by which the dense cache grows."""


def grown_tokens(tokens: int, block: int) -> int:
    """`tokens` rounded up to whole blocks."""
    return -(-tokens // block) * block


class DenseKVCache:
    """Keys and values of every token; grows by blocks of `BLOCK_TOKENS`.

    Each sequence begins at slot 0. In a batch of different lengths all have the slots of the
    longest, and those that a sequence has not filled hold zeros: attention reads and masks them,
    and NaN x 0 would spread.
    """

    def __init__(self, batch: int, heads: int, head_dim: int, like: Tensor):
        self.positions = Positions.zeros(batch, like.device)
        self.k_BTHK = like.new_empty(batch, 0, heads, head_dim)
        self.v_BTHV = like.new_empty(batch, 0, heads, head_dim)

    @classmethod
    def join(cls, caches: Sequence[Self]) -> Self:
        """One cache of all sequences of `caches`."""
        joined = cls.__new__(cls)
        joined.positions = Positions.join([cache.positions for cache in caches])
        capacity = grown_tokens(joined.positions.longest, BLOCK_TOKENS)
        filled = [cache.positions.longest for cache in caches]
        joined.k_BTHK = _stacked([cache.k_BTHK for cache in caches], filled, capacity)
        joined.v_BTHV = _stacked([cache.v_BTHV for cache in caches], filled, capacity)
        return joined

    def append(self, k_BTHK: Tensor, v_BTHV: Tensor) -> tuple[Tensor, Tensor]:
        """Add T tokens to each sequence; returns views of all keys and values so far.

        The views reach to the end of the longest sequence.
        """
        tokens = k_BTHK.shape[1]
        begin, end = self.positions.longest, self.positions.longest + tokens
        if end > self.k_BTHK.shape[1]:
            capacity = grown_tokens(end, BLOCK_TOKENS)
            enlarged = _enlarged_with_zeros if self.positions.ragged else _enlarged
            self.k_BTHK = enlarged(self.k_BTHK, capacity, begin)
            self.v_BTHV = enlarged(self.v_BTHV, capacity, begin)
        if self.positions.ragged:
            slots_BT = self.positions.upcoming(tokens)
            _write(self.k_BTHK, slots_BT, k_BTHK)
            _write(self.v_BTHV, slots_BT, v_BTHV)
        else:
            self.k_BTHK[:, begin:end] = k_BTHK
            self.v_BTHV[:, begin:end] = v_BTHV
        self.positions.advance(tokens)
        return self.k_BTHK[:, :end], self.v_BTHV[:, :end]

    def select(self, index_B: Tensor) -> None:
        """Keep the sequences `index_B`, in that order; slots that none of them needs are freed."""
        self.positions.select(index_B)
        capacity = grown_tokens(self.positions.longest, BLOCK_TOKENS)
        self.k_BTHK = self.k_BTHK[:, :capacity][index_B]
        self.v_BTHV = self.v_BTHV[:, :capacity][index_B]

    def tensors(self) -> list[Tensor]:
        """The tensors held."""
        return [self.k_BTHK, self.v_BTHV]


class WindowKVCache:
    """Keys and values of the last `window` tokens in a ring, and of the first `sinks` before it.

    A sink has the slot of its position; a token at position p after them has slot
    sinks + (p - sinks) mod window. No token has two slots. There are at most `window` sinks.
    """

    def __init__(
        self, batch: int, window: int, heads: int, head_dim: int, like: Tensor, sinks: int = 0
    ):
        self.window = window
        self.sinks = sinks
        self.positions = Positions.zeros(batch, like.device)
        self.k_BWHK = like.new_zeros(batch, self.slots, heads, head_dim)
        self.v_BWHV = like.new_zeros(batch, self.slots, heads, head_dim)

    @classmethod
    def join(cls, caches: Sequence[Self]) -> Self:
        """One cache of all sequences of `caches`, whose windows and sinks are the same."""
        joined = cls.__new__(cls)
        joined.window, joined.sinks = caches[0].window, caches[0].sinks
        joined.positions = Positions.join([cache.positions for cache in caches])
        joined.k_BWHK = torch.cat([cache.k_BWHK for cache in caches])
        joined.v_BWHV = torch.cat([cache.v_BWHV for cache in caches])
        return joined

    @property
    def slots(self) -> int:
        """Tokens that a sequence has room for."""
        return self.window + self.sinks

    def append(self, k_BTHK: Tensor, v_BTHV: Tensor) -> None:
        """Add T tokens to each sequence; the oldest but the sinks are overwritten."""
        tokens = k_BTHK.shape[1]
        # Sinks of the shortest sequence; a longer one puts these tokens into its ring. Neither
        # these nor the last `window` tokens share a slot, but the two parts together may.
        early = min(tokens, max(self.sinks - self.positions.shortest, 0))
        late = min(tokens - early, self.window)
        slots_BT = self._slots(self.positions.upcoming(tokens))
        for part in (slice(0, early), slice(tokens - late, tokens)):
            if part.start < part.stop:
                _write(self.k_BWHK, slots_BT[:, part], k_BTHK[:, part])
                _write(self.v_BWHV, slots_BT[:, part], v_BTHV[:, part])
        self.positions.advance(tokens)

    def positions_BW(self) -> Tensor:
        """Position of the token in each slot, -1 in an empty one; `[1, W]` unless ragged."""
        slots_W = torch.arange(self.slots, device=self.k_BWHK.device)
        newest_B1 = self.positions.upcoming(1) - 1
        ring_BW = newest_B1 - (newest_B1 - slots_W) % self.window
        position_BW = torch.where(slots_W < self.sinks, slots_W, ring_BW)
        first_W = slots_W.clamp(max=self.sinks)
        held_BW = (position_BW >= first_W) & (position_BW <= newest_B1)
        return torch.where(held_BW, position_BW, -1)

    def _slots(self, positions_BT: Tensor) -> Tensor:
        if not self.sinks:
            return positions_BT % self.window
        ring_BT = self.sinks + (positions_BT - self.sinks) % self.window
        return torch.where(positions_BT < self.sinks, positions_BT, ring_BT)

    def select(self, index_B: Tensor) -> None:
        """Keep the sequences `index_B`, in that order."""
        self.positions.select(index_B)
        self.k_BWHK = self.k_BWHK[index_B]
        self.v_BWHV = self.v_BWHV[index_B]

    def tensors(self) -> list[Tensor]:
        """The tensors held."""
        return [self.k_BWHK, self.v_BWHV]


def _enlarged(old: Tensor, capacity: int, used: int) -> Tensor:
    new = old.new_empty(old.shape[0], capacity, *old.shape[2:])
    new[:, :used] = old[:, :used]
    return new


def _enlarged_with_zeros(old: Tensor, capacity: int, used: int) -> Tensor:
    return _stacked([old], [used], capacity)


def _stacked(parts: Sequence[Tensor], filled: Sequence[int], capacity: int) -> Tensor:
    """The batches one after the other, each cut to its filled slots and padded with zeros."""
    rows = sum(part.shape[0] for part in parts)
    stacked = parts[0].new_zeros(rows, capacity, *parts[0].shape[2:])
    first = 0
    for part, used in zip(parts, filled, strict=True):
        stacked[first : first + part.shape[0], :used] = part[:, :used]
        first += part.shape[0]
    return stacked


def _write(cache_BNHK: Tensor, slots_BT: Tensor, new_BTHK: Tensor) -> None:
    """Put T tokens per sequence into its slots; `slots_BT` may be `[1, T]`, the same for all."""
    new_BTHK = new_BTHK.to(cache_BNHK.dtype)
    if slots_BT.shape[0] == 1:
        cache_BNHK[:, slots_BT[0]] = new_BTHK
    else:
        rows_B = torch.arange(cache_BNHK.shape[0], device=cache_BNHK.device)
        cache_BNHK[rows_B[:, None], slots_BT] = new_BTHK
