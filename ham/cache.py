"""Decoding memories that hold keys and values: dense, sliding-window, and paged for routed tokens.

Every class allocates what it declares: `bytes_allocated` counts the tensors themselves, and the
`state_bytes` methods of the mixers are tested against it. Letters as in `ham.model.mixer`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK_TOKENS = 64
"""Tokens by which the dense cache grows."""

PAGE_TOKENS = 32
"""Tokens on one page of the routed cache."""

INT32_BYTES = 4


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

    def append(self, k_BTHK: Tensor, v_BTHV: Tensor, routed_BT: Tensor, start: int) -> None:
        """Store the tokens with `routed_BT` true; the first token stands at position `start`."""
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
        self.positions_PS[page, within] = (token + start).to(torch.int32)
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


def _more_pages(old: Tensor, pages: int) -> Tensor:
    # Zeros, because padding slots are read (and masked) by the attention: NaN x 0 would spread.
    new = old.new_zeros(pages, *old.shape[1:])
    new[: old.shape[0]] = old
    return new
