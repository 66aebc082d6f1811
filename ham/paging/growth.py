"""Page tables that grow between the replays of a CUDA graph, without waiting for the device.

A captured decode step reads page addresses and counts from tensors that never move, and appends at
most one token per sequence and layer. The host learns the counts late, so it assumes that every
step since the last known count added a token, and provides pages for that. What it assumed in
excess is used later, or bounded: it never gets further ahead than a few unread copies.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ham.errors import CachePoolFullError
from ham.paging.cache import PagedKVCache
from ham.paging.counts import CountCopier, CountCopy, count_copier
from ham.paging.layout import PageLayout
from ham.paging.pool import SLAB_BYTES, PagePool

SPARE_TOKENS = 8
"""Tokens beyond the present ones that a refill provides for: tables change at most this often."""

COPY_EVERY = 4
"""Steps from one copy of the counters to the next."""

COPIES_IN_FLIGHT = 2
"""Unread copies at which the host waits for the oldest."""


@dataclass
class _Sent:
    """A copy of the counters as they stand after `steps` steps and `event` changes."""

    steps: int
    event: int
    copy: CountCopy


class GrowthManager:
    """Pages of all layers of a batch that decodes under a CUDA graph.

    Rows are places in the batch of the graph; a row without a sequence is idle. Call `before_step`
    before and `after_step` after enqueueing each step; `free`, `select`, `place` and `to_caches`
    between steps. All work on the device goes to the current stream, which must be that of the
    steps.

    A step may write to slot `counts_LB` of each row, routed or not, and may then add one to the
    count. Idle rows, and entries of the table beyond a sequence's pages, point to a scratch page:
    a step may treat idle rows like others, and what it writes there is never read as a token.

    Args:
        layout: What a page looks like, the same in all layers.
        layers: Number of layers L.
        batch: Number of rows B.
        max_positions: Longest sequence; fixes the width of the page table.
        device: Where pages and tables are.
        spare: Tokens that a refill provides for, at least 1.
        pool: Where pages come from; by default a new pool.
        copier: Starts copies of the counters; by default the one for the device.

    Attributes:
        page_table_LBP: Int64 byte addresses; the same tensor for the manager's whole life.
        counts_LB: Int32 tokens per layer and row; likewise.
        scratch_page: Address of the scratch page.

    Raises:
        ValueError: When `spare` is less than 1.
    """

    def __init__(
        self,
        layout: PageLayout,
        layers: int,
        batch: int,
        max_positions: int,
        device: torch.device,
        *,
        spare: int = SPARE_TOKENS,
        pool: PagePool | None = None,
        copier: CountCopier | None = None,
    ):
        if spare < 1:
            raise ValueError(f"spare must be at least 1 token, not {spare}")
        self.layout = layout
        self.pool = pool or PagePool(layout, device)
        self.pool.slab_pages = max(1, SLAB_BYTES // layout.page_bytes)
        self.pool.add_user(self)
        self.spare = spare
        width = layout.pages_for(max_positions)
        self._most_tokens = width * layout.page_tokens
        # The tables outlive the inference mode they may have been made in.
        with torch.inference_mode(False):
            self._scratch_1X = torch.zeros(1, layout.page_bytes, dtype=torch.uint8, device=device)
            self.scratch_page = self._scratch_1X.data_ptr()
            self.counts_LB = torch.zeros(layers, batch, dtype=torch.int32, device=device)
            self.page_table_LBP = torch.full(
                (layers, batch, width), self.scratch_page, device=device
            )
        self._table = np.full((layers, batch, width), self.scratch_page, dtype=np.int64)
        self._pages = np.zeros((layers, batch), dtype=np.int64)
        self._known = np.zeros((layers, batch), dtype=np.int64)
        self._known_at = np.zeros(batch, dtype=np.int64)
        self._active = np.zeros(batch, dtype=bool)
        self._steps = 0
        # A copy says nothing of rows that changed after it was started: both are numbered.
        self._events = 0
        self._changed = np.zeros(batch, dtype=np.int64)
        self._copies: deque[_Sent] = deque()
        self._copier = copier or count_copier(self.counts_LB, COPIES_IN_FLIGHT)

    @classmethod
    def from_caches(
        cls,
        caches: Sequence[PagedKVCache],
        max_positions: int,
        spare: int = SPARE_TOKENS,
        batch: int | None = None,
    ) -> GrowthManager:
        """A manager with the sequences of `caches`, one cache a layer, which are left empty.

        `batch` may be larger than that of the caches; the rows behind are idle.
        """
        first = caches[0]
        sequences = len(first.counts)
        manager = cls(
            first.layout,
            len(caches),
            batch or sequences,
            max_positions,
            first.pool.device,
            spare=spare,
            pool=first.pool,
        )
        manager.place(range(sequences), caches)
        return manager

    def before_step(self) -> None:
        """Make sure that the next step finds a slot in every layer of every sequence.

        Raises:
            CachePoolFullError: When the pool's limit is reached. Nothing has changed then: free
                some rows and call again.
        """
        self._read_copies()
        if (self._missing_pages(1) > 0).any():
            self._refill()
        idle = not self._active.all()
        if idle and self._steps % self.layout.page_tokens == 0:
            # Steps go on counting in idle rows; attention over scratch pages should stay short.
            self.counts_LB.mul_(self._to_device(self._active).to(torch.int32))

    def after_step(self) -> None:
        """Note that a step was enqueued; every few steps start a copy of the counters."""
        self._steps += 1
        if self._steps % COPY_EVERY:
            return
        if len(self._copies) == COPIES_IN_FLIGHT:
            self._read(self._copies.popleft())
        self._copies.append(self._send())

    def counts(self) -> np.ndarray:
        """Exact int64 counts `[L, B]`, 0 in idle rows; waits for the steps enqueued so far."""
        self._copies.clear()
        self._read(self._send())
        return self._known.copy()

    def free(self, *rows: int) -> None:
        """End the sequences in `rows`; their pages serve others and the rows are idle."""
        self._give_back(rows)
        for row in rows:
            self._set_row(row)
            self.page_table_LBP[:, row] = self.scratch_page
            self.counts_LB[:, row] = 0

    def select(self, rows: Sequence[int]) -> None:
        """Move the sequences `rows` to rows 0, 1, ...; others are freed, rows behind are idle.

        A sequence named twice is copied. Waits for the steps enqueued so far.

        Raises:
            ValueError: For more rows than the batch has, or an idle one.
            CachePoolFullError: When there are no pages for copies; nothing has changed then.
        """
        if len(rows) > len(self._active) or not all(self._active[row] for row in rows):
            raise ValueError(
                f"rows {list(rows)} selected; active are {np.flatnonzero(self._active).tolist()} "
                f"of {len(self._active)}"
            )
        counts = self.counts()
        owned = self._selected_pages(rows)
        self._give_back(set(np.flatnonzero(self._active).tolist()) - set(rows))
        width = self._pages.max()
        for row in range(len(self._active)):
            self._set_row(row)
        for place, row in enumerate(rows):
            self._set_row(place, owned[place], counts[:, row])
        self._upload_tables(max(width, self._pages.max()))
        self.counts_LB.copy_(self._to_device(self._known.astype(np.int32)))

    def place(self, rows: Sequence[int], caches: Sequence[PagedKVCache]) -> None:
        """Put the sequences of `caches`, one cache a layer, into idle rows.

        The caches give up their pages, without a copy, and are left empty.

        Raises:
            ValueError: When a row is not idle, or numbers of layers or sequences differ.
        """
        batches = [len(cache.counts) for cache in caches]
        if batches != [len(rows)] * len(self._known):
            raise ValueError(
                f"caches of {batches} sequences for {len(rows)} rows and {len(self._known)} layers"
            )
        if self._active[list(rows)].any():
            raise ValueError(f"rows {list(rows)} are not all idle")
        longest = max((count for cache in caches for count in cache.counts), default=0)
        if longest > self._most_tokens:
            raise ValueError(f"{longest} tokens in a row with a table for {self._most_tokens}")
        for cache in caches:
            self.pool.absorb(cache.pool)
        released = [cache.release() for cache in caches]
        for place, row in enumerate(rows):
            owned = [pages[place] for pages, _ in released]
            self._set_row(row, owned, np.array([counts[place] for _, counts in released]))
        self._upload_tables(self._pages.max())
        index_R = self._to_device(np.array(rows, dtype=np.int64))
        counts_LR = self._to_device(self._known[:, list(rows)].astype(np.int32))
        self.counts_LB.index_copy_(1, index_R, counts_LR)

    def to_caches(self) -> list[PagedKVCache]:
        """Caches of all rows, one a layer, that share the pool; afterwards all rows are idle.

        Waits for the steps enqueued so far. Idle rows become empty sequences.
        """
        counts = self.counts()
        caches = []
        for layer in self._layers():
            owned = [self._owned(layer, row) for row in range(len(self._active))]
            used = [self.layout.pages_for(count) for count in counts[layer].tolist()]
            for pages, needed in zip(owned, used, strict=True):
                self.pool.give_back(pages[needed:])
            kept = [pages[:needed] for pages, needed in zip(owned, used, strict=True)]
            caches.append(PagedKVCache.from_pages(self.pool, kept, counts[layer].tolist()))
        self.pool.trim()
        for row in range(len(self._active)):
            self._set_row(row)
        self.page_table_LBP.fill_(self.scratch_page)
        self.counts_LB.zero_()
        return caches

    def tensors(self) -> dict[str, list[Tensor]]:
        """Views of everything held, by kind, as `PagedKVCache.tensors`; all layers together."""
        owned = [
            page
            for layer in self._layers()
            for row in range(len(self._active))
            for page in self._owned(layer, row)
        ]
        free = self.pool.free_tensors(self).get("free_pages", [])
        return {
            **self.pool.page_tensors(owned),
            "page_table": [self.page_table_LBP, self.counts_LB],
            "free_pages": [*free, self._scratch_1X],
        }

    def _missing_pages(self, tokens: int) -> np.ndarray:
        """Pages each layer of each row lacks for `tokens` more than it can hold by now."""
        bound = self._known + (self._steps - self._known_at)
        wanted = np.minimum(bound + tokens, self._most_tokens) * self._active
        return np.maximum(-(-wanted // self.layout.page_tokens) - self._pages, 0)

    def _refill(self) -> None:
        missing = self._missing_pages(self.spare)
        try:
            pages = self.pool.take(int(missing.sum()))
        except CachePoolFullError:
            # The device may hold less than the host has to assume: ask it, and spare nothing.
            self.counts()
            missing = self._missing_pages(1)
            pages = self.pool.take(int(missing.sum()))
        if pages:
            self._enter(missing, pages)

    def _enter(self, missing: np.ndarray, pages: list[int]) -> None:
        """Add `pages` to the tables: as many to each layer and row as `missing` says."""
        layers, rows = np.nonzero(missing)
        counts = missing[layers, rows]
        layers, rows = np.repeat(layers, counts), np.repeat(rows, counts)
        ends = np.cumsum(counts)
        nth = np.arange(len(pages)) - np.repeat(ends - counts, counts)
        places = self._pages[layers, rows] + nth
        self._table[layers, rows, places] = pages
        self._pages += missing
        flat = np.ravel_multi_index((layers, rows, places), self._table.shape)
        index_and_page_2N = self._to_device(np.array([flat, pages], dtype=np.int64))
        self.page_table_LBP.view(-1).scatter_(0, index_and_page_2N[0], index_and_page_2N[1])

    def _send(self) -> _Sent:
        self._events += 1
        return _Sent(self._steps, self._events, self._copier(self.counts_LB))

    def _read_copies(self) -> None:
        while self._copies and self._copies[0].copy.ready():
            self._read(self._copies.popleft())

    def _read(self, sent: _Sent) -> None:
        rows = self._active & (self._changed < sent.event)
        self._known[:, rows] = sent.copy.values()[:, rows]
        self._known_at[rows] = sent.steps

    def _selected_pages(self, rows: Sequence[int]) -> list[list[list[int]]]:
        """Pages by new row and layer, with copies for rows named before."""
        repeats = [place for place, row in enumerate(rows) if row in rows[:place]]
        new = iter(self.pool.take(int(self._pages[:, [rows[place] for place in repeats]].sum())))
        owned = [[self._owned(layer, row) for layer in self._layers()] for row in rows]
        for place in repeats:
            copies = [[next(new) for _ in pages] for pages in owned[place]]
            for sources, targets in zip(owned[place], copies, strict=True):
                self.pool.copy_from(self.pool, sources, targets)
            owned[place] = copies
        return owned

    def _set_row(
        self, row: int, owned: list[list[int]] | None = None, known: np.ndarray | int = 0
    ) -> None:
        """Give `row` a sequence with these pages and counts by layer; without, make it idle."""
        self._table[:, row] = self.scratch_page
        self._pages[:, row] = 0
        for layer, pages in enumerate(owned or ()):
            self._table[layer, row, : len(pages)] = pages
            self._pages[layer, row] = len(pages)
        self._known[:, row] = known
        self._known_at[row] = self._steps
        self._active[row] = owned is not None
        self._events += 1
        self._changed[row] = self._events

    def _give_back(self, rows: Iterable[int]) -> None:
        """Free the pages of `rows`, whose tables still name them."""
        owned = [self._owned(layer, row) for row in rows for layer in self._layers()]
        self.pool.give_back([page for pages in owned for page in pages])
        self.pool.trim()

    def _upload_tables(self, width: int) -> None:
        """Renew the first `width` entries of every row of the device's tables."""
        self.page_table_LBP[:, :, :width] = self._to_device(self._table[:, :, :width])

    def _owned(self, layer: int, row: int) -> list[int]:
        return self._table[layer, row, : self._pages[layer, row]].tolist()

    def _layers(self) -> range:
        return range(len(self._known))

    def _to_device(self, array: np.ndarray) -> Tensor:
        """A copy on the device; from pinned memory, so that the host does not wait."""
        staged = torch.tensor(array)
        if self.pool.device.type != "cuda":
            return staged
        return staged.pin_memory().to(self.pool.device, non_blocking=True)
