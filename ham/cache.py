"""Decoding memories that hold keys and values: dense, sliding-window, and paged (`ham.paging`).

Every class allocates what it declares: `bytes_allocated` counts the tensors themselves, and the
`state_bytes` methods of the mixers are tested against it. Letters as in `ham.model.mixer`.
"""

from __future__ import annotations

import torch
from torch import Tensor

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
    """Keys and values of every token; grows by blocks of `BLOCK_TOKENS`."""

    def __init__(self, batch: int, heads: int, head_dim: int, like: Tensor):
        self.length = 0
        self.k_BTHK = like.new_empty(batch, 0, heads, head_dim)
        self.v_BTHV = like.new_empty(batch, 0, heads, head_dim)

    def append(self, k_BTHK: Tensor, v_BTHV: Tensor) -> tuple[Tensor, Tensor]:
        """Add T tokens; returns views of all keys and values so far."""
        end = self.length + k_BTHK.shape[1]
        if end > self.k_BTHK.shape[1]:
            capacity = grown_tokens(end, BLOCK_TOKENS)
            self.k_BTHK = _enlarged(self.k_BTHK, capacity, self.length)
            self.v_BTHV = _enlarged(self.v_BTHV, capacity, self.length)
        self.k_BTHK[:, self.length : end] = k_BTHK
        self.v_BTHV[:, self.length : end] = v_BTHV
        self.length = end
        return self.k_BTHK[:, :end], self.v_BTHV[:, :end]

    def select(self, index_B: Tensor) -> None:
        """Keep the sequences `index_B`, in that order."""
        self.k_BTHK = self.k_BTHK[index_B]
        self.v_BTHV = self.v_BTHV[index_B]

    def tensors(self) -> list[Tensor]:
        """The tensors held."""
        return [self.k_BTHK, self.v_BTHV]


class WindowKVCache:
    """Keys and values of the last `window` tokens in a ring; slot = position mod window."""

    def __init__(self, batch: int, window: int, heads: int, head_dim: int, like: Tensor):
        self.window = window
        self.length = 0
        self.k_BWHK = like.new_zeros(batch, window, heads, head_dim)
        self.v_BWHV = like.new_zeros(batch, window, heads, head_dim)

    def append(self, k_BTHK: Tensor, v_BTHV: Tensor) -> None:
        """Add T tokens; the oldest are overwritten."""
        tokens = k_BTHK.shape[1]
        kept = min(tokens, self.window)
        first = self.length + tokens - kept
        slots = torch.arange(first, first + kept, device=k_BTHK.device) % self.window
        self.k_BWHK[:, slots] = k_BTHK[:, tokens - kept :].to(self.k_BWHK.dtype)
        self.v_BWHV[:, slots] = v_BTHV[:, tokens - kept :].to(self.v_BWHV.dtype)
        self.length += tokens

    def positions_W(self) -> Tensor:
        """Position of the token in each slot; -1 where the slot is empty."""
        slots = torch.arange(self.window, device=self.k_BWHK.device)
        newest = self.length - 1
        positions = newest - (newest - slots) % self.window
        return positions.clamp(min=-1)

    def select(self, index_B: Tensor) -> None:
        """Keep the sequences `index_B`, in that order."""
        self.k_BWHK = self.k_BWHK[index_B]
        self.v_BWHV = self.v_BWHV[index_B]

    def tensors(self) -> list[Tensor]:
        """The tensors held."""
        return [self.k_BWHK, self.v_BWHV]


def _enlarged(old: Tensor, capacity: int, used: int) -> Tensor:
    new = old.new_empty(old.shape[0], capacity, *old.shape[2:])
    new[:, :used] = old[:, :used]
    return new
