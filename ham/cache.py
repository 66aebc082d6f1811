"""Decoding memories that hold keys and values: dense, sliding-window, and paged for routed tokens.

Every class allocates what it declares: `bytes_allocated` counts the tensors themselves, and the
`state_bytes` methods of the mixers are tested against it. Letters as in `ham.model.mixer`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from ham.model.positions import Positions

BLOCK_TOKENS = 64
"""Tokens by which the dense cache grows."""

PAGE_TOKENS = 32
"""Tokens on one page of the routed cache."""

INT32_BYTES = 4


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
    """Keys and values of the last `window` tokens in a ring; slot = position mod window."""

    def __init__(self, batch: int, window: int, heads: int, head_dim: int, like: Tensor):
        self.window = window
        self.positions = Positions.zeros(batch, like.device)
        self.k_BWHK = like.new_zeros(batch, window, heads, head_dim)
        self.v_BWHV = like.new_zeros(batch, window, heads, head_dim)

    @classmethod
    def join(cls, caches: Sequence[Self]) -> Self:
        """One cache of all sequences of `caches`, whose windows are the same."""
        joined = cls.__new__(cls)
        joined.window = caches[0].window
        joined.positions = Positions.join([cache.positions for cache in caches])
        joined.k_BWHK = torch.cat([cache.k_BWHK for cache in caches])
        joined.v_BWHV = torch.cat([cache.v_BWHV for cache in caches])
        return joined

    def append(self, k_BTHK: Tensor, v_BTHV: Tensor) -> None:
        """Add T tokens to each sequence; the oldest are overwritten."""
        tokens = k_BTHK.shape[1]
        kept = min(tokens, self.window)
        slots_BT = self.positions.upcoming(tokens)[:, tokens - kept :] % self.window
        _write(self.k_BWHK, slots_BT, k_BTHK[:, tokens - kept :])
        _write(self.v_BWHV, slots_BT, v_BTHV[:, tokens - kept :])
        self.positions.advance(tokens)

    def positions_BW(self) -> Tensor:
        """Position of the token in each slot, -1 in an empty one; `[1, W]` unless ragged."""
        slots_W = torch.arange(self.window, device=self.k_BWHK.device)
        newest_B1 = self.positions.upcoming(1) - 1
        return (newest_B1 - (newest_B1 - slots_W) % self.window).clamp(min=-1)

    def select(self, index_B: Tensor) -> None:
        """Keep the sequences `index_B`, in that order."""
        self.positions.select(index_B)
        self.k_BWHK = self.k_BWHK[index_B]
        self.v_BWHV = self.v_BWHV[index_B]

    def tensors(self) -> list[Tensor]:
        """The tensors held."""
        return [self.k_BWHK, self.v_BWHV]


@dataclass(frozen=True)
class PackedKeys:
    """Routed keys and values side by side, padded to the longest sequence of the batch.

    Attributes:
        k_BNHK, v_BNHV: Keys and values; slots at and beyond the count are padding.
        positions_BN: Int32 position of each token.
        counts_B: Int32 number of routed tokens per sequence.
    """

    k_BNHK: Tensor
    v_BNHV: Tensor
    positions_BN: Tensor
    counts_B: Tensor


class PagedKVCache:
    """Keys, values and positions of routed tokens only, in pages that sequences own.

    The pool has exactly the pages in use, so allocated bytes follow the number of routed tokens
    of each sequence. Pages are handed out in order of need; `page_table_BP` lists each sequence's
    pages, -1 where it has none.
    """

    def __init__(self, batch: int, heads: int, head_dim: int, like: Tensor):
        self.k_PSHK = like.new_empty(0, PAGE_TOKENS, heads, head_dim)
        self.v_PSHV = like.new_empty(0, PAGE_TOKENS, heads, head_dim)
        self.positions_PS = like.new_empty(0, PAGE_TOKENS, dtype=torch.int32)
        self.page_table_BP = like.new_empty(batch, 0, dtype=torch.int32)
        self.counts_B = like.new_zeros(batch, dtype=torch.int32)
        self._counts: list[int] = [0] * batch

    @classmethod
    def join(cls, caches: Sequence[Self]) -> Self:
        """One cache of all sequences of `caches`: their pools one after the other."""
        joined = cls.__new__(cls)
        joined.k_PSHK = torch.cat([cache.k_PSHK for cache in caches])
        joined.v_PSHV = torch.cat([cache.v_PSHV for cache in caches])
        joined.positions_PS = torch.cat([cache.positions_PS for cache in caches])
        joined.counts_B = torch.cat([cache.counts_B for cache in caches])
        joined._counts = [count for cache in caches for count in cache._counts]
        table: list[list[int]] = []
        first = 0
        for cache in caches:
            owned = (cache._pages_of(row) for row in range(len(cache._counts)))
            table += [[first + page for page in pages] for pages in owned]
            first += cache.k_PSHK.shape[0]
        joined._write_table(table)
        return joined

    def append(
        self, k_BTHK: Tensor, v_BTHV: Tensor, routed_BT: Tensor, start: int | Tensor
    ) -> None:
        """Store the tokens with `routed_BT` true.

        The first token of each sequence stands at position `start`, an int for all or int64 `[B]`.
        """
        added = routed_BT.sum(dim=1, dtype=torch.int32)
        new_counts = [old + n for old, n in zip(self._counts, added.tolist(), strict=True)]
        if new_counts == self._counts:
            return
        self._reserve(new_counts)
        row, token = routed_BT.nonzero(as_tuple=True)
        rank_BT = routed_BT.cumsum(dim=1, dtype=torch.int32) - 1
        slot = (self.counts_B[row] + rank_BT[row, token]).long()
        page = self.page_table_BP[row, slot // PAGE_TOKENS].long()
        within = slot % PAGE_TOKENS
        self.k_PSHK[page, within] = k_BTHK[row, token].to(self.k_PSHK.dtype)
        self.v_PSHV[page, within] = v_BTHV[row, token].to(self.v_PSHV.dtype)
        begin = start if isinstance(start, int) else start[row]
        self.positions_PS[page, within] = (token + begin).to(torch.int32)
        self.counts_B = self.counts_B + added
        self._counts = new_counts

    def packed(self) -> PackedKeys:
        """All routed tokens, gathered through the page table."""
        longest = max(self._counts)
        if len(self._counts) == 1:
            # One sequence owns every page in order: a view, no copy.
            return PackedKeys(
                self.k_PSHK.flatten(0, 1)[None, :longest],
                self.v_PSHV.flatten(0, 1)[None, :longest],
                self.positions_PS.flatten()[None, :longest],
                self.counts_B,
            )
        pages_BP = self.page_table_BP.clamp(min=0).long()
        return PackedKeys(
            self.k_PSHK[pages_BP].flatten(1, 2)[:, :longest],
            self.v_PSHV[pages_BP].flatten(1, 2)[:, :longest],
            self.positions_PS[pages_BP].flatten(1, 2)[:, :longest],
            self.counts_B,
        )

    def select(self, index_B: Tensor) -> None:
        """Keep the sequences `index_B`, in that order; pages of the others are freed."""
        chosen = index_B.tolist()
        owned = [self._pages_of(row) for row in chosen]
        flat = [page for pages in owned for page in pages]
        old_pages = torch.tensor(flat, dtype=torch.long, device=self.k_PSHK.device)
        self.k_PSHK = self.k_PSHK[old_pages]
        self.v_PSHV = self.v_PSHV[old_pages]
        self.positions_PS = self.positions_PS[old_pages]
        self._counts = [self._counts[row] for row in chosen]
        self.counts_B = self.counts_B[index_B]
        ends = torch.tensor([len(pages) for pages in owned]).cumsum(0).tolist()
        renumbered = [
            list(range(end - len(pages), end)) for pages, end in zip(owned, ends, strict=True)
        ]
        self._write_table(renumbered)

    def tensors(self) -> dict[str, list[Tensor]]:
        """The tensors held, by kind."""
        return {
            "kv": [self.k_PSHK, self.v_PSHV],
            "positions": [self.positions_PS],
            "page_table": [self.page_table_BP, self.counts_B],
        }

    def _pages_of(self, row: int) -> list[int]:
        used = -(-self._counts[row] // PAGE_TOKENS)
        return self.page_table_BP[row, :used].tolist()

    def _reserve(self, new_counts: Sequence[int]) -> None:
        table = [self._pages_of(row) for row in range(len(new_counts))]
        next_page = self.k_PSHK.shape[0]
        for pages, count in zip(table, new_counts, strict=True):
            while len(pages) * PAGE_TOKENS < count:
                pages.append(next_page)
                next_page += 1
        if next_page == self.k_PSHK.shape[0]:
            return
        self.k_PSHK = _more_pages(self.k_PSHK, next_page)
        self.v_PSHV = _more_pages(self.v_PSHV, next_page)
        self.positions_PS = _more_pages(self.positions_PS, next_page)
        self._write_table(table)

    def _write_table(self, table: list[list[int]]) -> None:
        width = max((len(pages) for pages in table), default=0)
        padded = [pages + [-1] * (width - len(pages)) for pages in table]
        self.page_table_BP = torch.tensor(
            padded, dtype=torch.int32, device=self.k_PSHK.device
        ).reshape(len(table), width)


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


def _more_pages(old: Tensor, pages: int) -> Tensor:
    # Zeros, because padding slots are read (and masked) by the attention: NaN x 0 would spread.
    new = old.new_zeros(pages, *old.shape[1:])
    new[: old.shape[0]] = old
    return new
