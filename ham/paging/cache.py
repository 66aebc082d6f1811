"""The ragged cache of routed tokens: one layer, a batch of sequences, pages from a pool."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ham.paging.layout import PAGE_TOKENS, PageLayout
from ham.paging.pool import PagePool


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


@dataclass
class _Run:
    """Neighbouring pages of one sequence: where they lie and where they go when packed."""

    k_NHSK: Tensor
    v_NHSV: Tensor
    positions_NS: Tensor
    row: int
    places: slice


class PagedKVCache:
    """Keys, values and positions of routed tokens only, in pages that sequences own.

    Allocated bytes follow the number of routed tokens of each sequence. It is a decoding memory:
    no gradient passes through it.

    Args:
        batch: Number of sequences.
        heads: Heads H.
        head_dim: Size K of a key, and of a value unless `value_size` says otherwise.
        like: A tensor of the device and dtype wanted.
        value_size: Size V of a value.
        page_tokens: Slots of a page.
        pool: Where pages come from; by default a pool of its own that holds no spare page.

    Attributes:
        page_table_BP: Int64 byte address of each page of each sequence, 0 where it has none.
        counts_B: Int32 number of tokens per sequence.
        counts: The same on the host.

    Raises:
        ValueError: When the pool's pages are others.
    """

    def __init__(
        self,
        batch: int,
        heads: int,
        head_dim: int,
        like: Tensor,
        *,
        value_size: int | None = None,
        page_tokens: int = PAGE_TOKENS,
        pool: PagePool | None = None,
    ):
        layout = PageLayout(heads, head_dim, value_size or head_dim, like.dtype, page_tokens)
        if pool is not None and pool.layout != layout:
            raise ValueError(f"a pool of {pool.layout} has no pages of {layout}")
        self.pool = pool or PagePool(layout, like.device)
        self.pool.add_user(self)
        self.layout = layout
        self.counts = [0] * batch
        self.counts_B = torch.zeros(batch, dtype=torch.int32, device=like.device)
        self._set_table(np.zeros((batch, 0), dtype=np.int64))

    @classmethod
    def from_pages(cls, pool: PagePool, owned: list[list[int]], counts: list[int]) -> PagedKVCache:
        """A cache of sequences with `counts` tokens on pages taken from `pool`."""
        layout = pool.layout
        cache = cls(
            0,
            layout.heads,
            layout.key_size,
            torch.empty(0, dtype=layout.dtype, device=pool.device),
            value_size=layout.value_size,
            page_tokens=layout.page_tokens,
            pool=pool,
        )
        cache._adopt(owned, counts)
        return cache

    @torch.no_grad()
    def append(
        self, k_BTHK: Tensor, v_BTHV: Tensor, routed_BT: Tensor, start: int | Tensor
    ) -> None:
        """Store the tokens with `routed_BT` true.

        Args:
            k_BTHK: Keys.
            v_BTHV: Values.
            routed_BT: Boolean.
            start: Position of the first token, the same for all sequences or `[B]`.

        Raises:
            CachePoolFullError: When the pool's limit is reached; nothing was stored then.
        """
        added = routed_BT.sum(dim=1).tolist()
        if not any(added):
            return
        old_counts = self.counts
        new_counts = [old + n for old, n in zip(old_counts, added, strict=True)]
        self._reserve(new_counts)
        row, token = routed_BT.nonzero(as_tuple=True)
        first = start if isinstance(start, int) else start[row]
        stored = (k_BTHK[row, token], v_BTHV[row, token], (token + first).to(torch.int32))
        self._write(*stored, *self._slots(old_counts, new_counts))
        self.counts = new_counts
        self.counts_B = torch.tensor(new_counts, dtype=torch.int32, device=self.pool.device)

    @torch.no_grad()
    def packed(self) -> PackedKeys:
        """All routed tokens, copied together through the page table."""
        layout, longest = self.layout, max(self.counts, default=0)
        batch, pages = self._table.shape
        tokens = layout.page_tokens
        like = torch.empty(0, dtype=layout.dtype, device=self.pool.device)
        k_BHPSK = like.new_empty(batch, layout.heads, pages, tokens, layout.key_size)
        v_BHPSV = like.new_empty(batch, layout.heads, pages, tokens, layout.value_size)
        positions_BPS = like.new_empty(batch, pages, tokens, dtype=torch.int32)
        for run in self._runs():
            k_BHPSK[run.row, :, run.places] = run.k_NHSK.transpose(0, 1)
            v_BHPSV[run.row, :, run.places] = run.v_NHSV.transpose(0, 1)
            positions_BPS[run.row, run.places] = run.positions_NS
        for row, count in enumerate(self.counts):
            # Padding slots are read (and masked) by the attention: NaN x 0 would spread.
            rest = slice(layout.pages_for(count), None)
            k_BHPSK[row, :, rest] = 0
            v_BHPSV[row, :, rest] = 0
            positions_BPS[row, rest] = 0
        return PackedKeys(
            k_BHPSK.flatten(2, 3)[:, :, :longest].transpose(1, 2),
            v_BHPSV.flatten(2, 3)[:, :, :longest].transpose(1, 2),
            positions_BPS.flatten(1, 2)[:, :longest],
            self.counts_B,
        )

    @torch.no_grad()
    def select(self, index_B: Tensor) -> None:
        """Keep the sequences `index_B`, in that order; pages of the others are freed.

        A sequence named twice is copied. A slab is released when none of its pages is in use.

        Raises:
            CachePoolFullError: When there are no pages for copies; nothing has changed then.
        """
        chosen = index_B.tolist()
        owned = [self.pages_of(row) for row in range(len(self.counts))]
        kept = [owned[row] for row in chosen]
        repeats = [place for place, row in enumerate(chosen) if row in chosen[:place]]
        copies = self.pool.take_each([len(kept[place]) for place in repeats])
        for place, pages in zip(repeats, copies, strict=True):
            self.pool.copy_from(self.pool, kept[place], pages)
            kept[place] = pages
        dropped = set(range(len(owned))) - set(chosen)
        self.pool.give_back([page for row in dropped for page in owned[row]])
        self.pool.trim()
        self._adopt(kept, [self.counts[row] for row in chosen])

    @classmethod
    @torch.no_grad()
    def join(cls, caches: Sequence[PagedKVCache]) -> PagedKVCache:
        """A cache with copies of the sequences of all, in order, on pages of a pool of its own.

        Raises:
            ValueError: When the pages of the caches differ.
        """
        layouts = {cache.layout for cache in caches}
        if len(layouts) > 1:
            raise ValueError(f"caches with different pages cannot be joined: {layouts}")
        old_pool = caches[0].pool
        layout = old_pool.layout
        pool = PagePool(layout, old_pool.device, limit_pages=old_pool.limit_pages)
        owned: list[list[int]] = []
        for cache in caches:
            for row, count in enumerate(cache.counts):
                owned.append(pool.take(layout.pages_for(count)))
                pool.copy_from(cache.pool, cache.pages_of(row), owned[-1])
        return cls.from_pages(pool, owned, [count for cache in caches for count in cache.counts])

    def release(self) -> tuple[list[list[int]], list[int]]:
        """Pages and counts of every sequence, which the caller owns from now on."""
        owned = [self.pages_of(row) for row in range(len(self.counts))]
        counts = self.counts
        self._adopt([], [])
        self.pool.remove_user(self)
        return owned, counts

    def pages_of(self, row: int) -> list[int]:
        """Addresses of the pages of a sequence, in order."""
        return self._table[row, : self.layout.pages_for(self.counts[row])].tolist()

    def tensors(self) -> dict[str, list[Tensor]]:
        """Views of everything held, by kind; they cover every allocated byte once.

        `kv` and `positions` are whole pages, unused slots and rounding included. `free_pages` are
        those of the pool that no sequence owns, listed by the oldest user of the pool only.
        """
        owned = [page for row in range(len(self.counts)) for page in self.pages_of(row)]
        return {
            **self.pool.page_tensors(owned),
            "page_table": [self.page_table_BP, self.counts_B],
            **self.pool.free_tensors(self),
        }

    def _adopt(self, owned: list[list[int]], counts: list[int]) -> None:
        """Make `owned` the pages of the sequences, which hold `counts` tokens."""
        table = np.zeros((len(owned), max(map(len, owned), default=0)), dtype=np.int64)
        for row, pages in enumerate(owned):
            table[row, : len(pages)] = pages
        self.counts = counts
        self.counts_B = torch.tensor(counts, dtype=torch.int32, device=self.pool.device)
        self._set_table(table)

    def _set_table(self, table: np.ndarray) -> None:
        self._table = table
        self.page_table_BP = torch.tensor(table, device=self.pool.device)
        self._packing: list[_Run] | None = None

    def _reserve(self, new_counts: Sequence[int]) -> None:
        """Give every sequence the pages for `new_counts` tokens."""
        have = [self.layout.pages_for(count) for count in self.counts]
        need = [self.layout.pages_for(count) for count in new_counts]
        if need == have:
            return
        new = self.pool.take_each([more - less for more, less in zip(need, have, strict=True)])
        table = np.zeros((len(need), max(need)), dtype=np.int64)
        table[:, : self._table.shape[1]] = self._table
        for row, pages in enumerate(new):
            table[row, have[row] : need[row]] = pages
        self._set_table(table)

    def _slots(self, old: Sequence[int], new: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Page and slot on it of each new token, sequence after sequence."""
        slots = np.concatenate([np.arange(a, b) for a, b in zip(old, new, strict=True)])
        rows = np.repeat(np.arange(len(old)), np.subtract(new, old))
        tokens = self.layout.page_tokens
        return self._table[rows, slots // tokens], slots % tokens

    def _write(
        self,
        k_NHK: Tensor,
        v_NHV: Tensor,
        positions_N: Tensor,
        pages: np.ndarray,
        within: np.ndarray,
    ) -> None:
        parts = list(self.pool.locate(pages))
        indices = [(part.indices, within[part.places], part.places) for part in parts]
        # One upload for all slabs.
        index_3N = torch.from_numpy(np.concatenate(indices, axis=1)).to(self.pool.device)
        sizes = [len(part.places) for part in parts]
        for part, (page, slot, chosen) in zip(parts, index_3N.split(sizes, 1), strict=True):
            part.k_NHSK[page, :, slot] = k_NHK[chosen].to(part.k_NHSK.dtype)
            part.v_NHSV[page, :, slot] = v_NHV[chosen].to(part.v_NHSV.dtype)
            part.positions_NS[page, slot] = positions_N[chosen]

    def _runs(self) -> list[_Run]:
        if self._packing is None:
            rows, places = np.nonzero(self._table)
            self._packing = [
                _Run(
                    self.layout.keys(bytes_NX),
                    self.layout.values(bytes_NX),
                    self.layout.positions(bytes_NX),
                    int(rows[first]),
                    slice(int(places[first]), int(places[first]) + len(bytes_NX)),
                )
                for first, bytes_NX in self.pool.runs(self._table[rows, places], rows)
            ]
        return self._packing
