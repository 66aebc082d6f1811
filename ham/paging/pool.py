"""A pool of pages of equal size that never move.

Pages come in slabs. A page is known by its byte address, which is also what kernels read from a
page table; so pages of several pools can be merged without renumbering.
"""

from __future__ import annotations

import weakref
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from ham.errors import CachePoolFullError
from ham.paging.layout import PageLayout

SLAB_BYTES = 32 * 2**20
"""Largest slab of a pool that grows under a CUDA graph. Big enough that rounding up to CUDA's 2 MiB
segments does not matter, and it is reached only when 64 times as much is in use."""

SLAB_SHARE = 64
"""A slab is at most this part of the pool so far: slack stays below 1 / 64."""


@dataclass
class _Slab:
    """Bytes of some pages, one row a page, with typed views, and which of them are free."""

    bytes_NX: Tensor
    k_NHSK: Tensor
    v_NHSV: Tensor
    positions_NS: Tensor
    free: list[int]


@dataclass
class SlabPages:
    """Some pages of one slab.

    Attributes:
        k_NHSK, v_NHSV, positions_NS: Views of the whole slab.
        indices: Index of each page in the slab, int64.
        places: Where in the caller's array of pages each of them stands, int64.
    """

    k_NHSK: Tensor
    v_NHSV: Tensor
    positions_NS: Tensor
    indices: np.ndarray
    places: np.ndarray


class PagePool:
    """Pages for the caches of one or more layers.

    Args:
        layout: What a page looks like.
        device: Where the pages are.
        slab_pages: Most pages that the pool allocates beyond what was asked for; with 1 it
            allocates exactly what is asked for, and frees pages only in the groups it got them in.
        limit_pages: Most pages the pool may hold, or None.
    """

    def __init__(
        self,
        layout: PageLayout,
        device: torch.device,
        slab_pages: int = 1,
        limit_pages: int | None = None,
    ):
        self.layout = layout
        self.device = device
        self.slab_pages = slab_pages
        self.limit_pages = limit_pages
        self._slabs: dict[int, _Slab] = {}
        self._bases: list[int] = []
        self._taken: set[int] = set()
        self._total = 0
        self._users: list[weakref.ref] = []

    @property
    def pages_total(self) -> int:
        """Pages allocated."""
        return self._total

    @property
    def pages_taken(self) -> int:
        """Pages that somebody owns."""
        return len(self._taken)

    @property
    def pages_free(self) -> int:
        """Pages allocated that nobody owns."""
        return self._total - len(self._taken)

    @property
    def bytes_allocated(self) -> int:
        """Bytes of all slabs."""
        return self._total * self.layout.page_bytes

    def take(self, count: int) -> list[int]:
        """Addresses of `count` pages that now belong to the caller; all or nothing.

        Pages of a new slab are zero, others hold what their last owner left.

        Raises:
            CachePoolFullError: When the limit does not allow so many.
        """
        self._check_limit(count)
        if count > self.pages_free:
            self._grow(count - self.pages_free)
        pages: list[int] = []
        # The newest slab first: pages of one request then lie side by side.
        for base in reversed(self._slabs):
            free = self._slabs[base].free
            while free and len(pages) < count:
                pages.append(free.pop())
            if len(pages) == count:
                break
        self._taken.update(pages)
        return pages

    def take_each(self, counts: Sequence[int]) -> list[list[int]]:
        """As `take` for each of `counts`, all or nothing.

        New pages of different entries come in different slabs and can be released apart.

        Raises:
            CachePoolFullError: When the limit does not allow so many in all.
        """
        self._check_limit(sum(counts))
        return [self.take(count) for count in counts]

    def give_back(self, pages: Sequence[int]) -> None:
        """End the ownership of `pages`.

        Raises:
            ValueError: For a page that is not taken, or named twice; a defect of the caller.
        """
        given = set(pages)
        if len(given) != len(pages) or not given <= self._taken:
            raise ValueError(f"{len(pages)} pages given back, of which not all are taken")
        self._taken -= given
        for page in reversed(pages):
            self._slabs[self._base_of(page)].free.append(page)

    def trim(self) -> int:
        """Release slabs without a taken page; returns the bytes released."""
        empty = [base for base, slab in self._slabs.items() if len(slab.free) == len(slab.bytes_NX)]
        pages = sum(len(self._slabs.pop(base).free) for base in empty)
        self._bases = sorted(self._slabs)
        self._total -= pages
        return pages * self.layout.page_bytes

    def absorb(self, other: PagePool) -> None:
        """Take over all pages of `other`, taken and free, and its users; nothing is copied.

        Raises:
            ValueError: When the pools' pages differ.
        """
        if other is self:
            return
        if (other.layout, other.device) != (self.layout, self.device):
            raise ValueError(
                f"pages of {other.layout} on {other.device} cannot join a pool of "
                f"{self.layout} on {self.device}"
            )
        self._slabs |= other._slabs
        self._bases = sorted(self._slabs)
        self._taken |= other._taken
        self._total += other._total
        for user in other.users():
            user.pool = self
            self.add_user(user)
        other._slabs, other._bases, other._taken, other._total = {}, [], set(), 0
        other._users = []

    def add_user(self, user: object) -> None:
        """Remember an object whose `pool` is this one, without keeping it alive."""
        self._users.append(weakref.ref(user))

    def remove_user(self, user: object) -> None:
        """Forget a user that has given up its pages."""
        self._users = [ref for ref in self._users if ref() is not user]

    def users(self) -> list:
        """The users that are still alive, oldest first."""
        alive = [(ref, user) for ref in self._users if (user := ref()) is not None]
        self._users = [ref for ref, _ in alive]
        return [user for _, user in alive]

    def locate(self, pages: np.ndarray) -> Iterator[SlabPages]:
        """Group page addresses (int64) by slab, for reading and writing pages with torch."""
        bases = np.array(self._bases, dtype=np.int64)
        slab_of_page = np.searchsorted(bases, pages, side="right") - 1
        for number in np.unique(slab_of_page):
            places = np.flatnonzero(slab_of_page == number)
            slab = self._slabs[self._bases[number]]
            indices = (pages[places] - bases[number]) // self.layout.page_bytes
            yield SlabPages(slab.k_NHSK, slab.v_NHSV, slab.positions_NS, indices, places)

    def copy_from(self, other: PagePool, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy pages of `other`, which may be this pool, to as many pages of this one."""
        from_X = np.array(sources, dtype=np.int64)
        to_X = np.array(targets, dtype=np.int64)
        for first, target_NX in self.runs(to_X, np.zeros_like(to_X)):
            run_X = from_X[first : first + len(target_NX)]
            for inner, source_NX in other.runs(run_X, np.zeros_like(run_X)):
                target_NX[inner : inner + len(source_NX)].copy_(source_NX)

    def runs(self, pages: np.ndarray, groups: np.ndarray) -> Iterator[tuple[int, Tensor]]:
        """Stretches of `pages` (int64 addresses) that lie side by side in order.

        Args:
            pages: Addresses.
            groups: Of the same length; a stretch does not go over a change of it.

        Yields:
            Index of a stretch's first page in `pages`, and its bytes `[N, page bytes]`, a view.
        """
        if not len(pages):
            return
        size = self.layout.page_bytes
        bases = np.array(self._bases, dtype=np.int64)
        slabs = np.searchsorted(bases, pages, side="right") - 1
        broken = (np.diff(pages) != size) | (np.diff(slabs) != 0) | (np.diff(groups) != 0)
        edges = [0, *(np.flatnonzero(broken) + 1).tolist(), len(pages)]
        for first, end in pairwise(edges):
            base = self._bases[slabs[first]]
            row = (int(pages[first]) - base) // size
            yield first, self._slabs[base].bytes_NX[row : row + end - first]

    def views(self, pages: Iterable[int]) -> list[Tensor]:
        """The bytes of `pages` in as few views `[N, page bytes]` as can be."""
        ordered = np.array(sorted(pages), dtype=np.int64)
        return [view for _, view in self.runs(ordered, np.zeros_like(ordered))]

    def page_tensors(self, pages: Iterable[int]) -> dict[str, list[Tensor]]:
        """Views of `pages` by kind: `kv`, and `positions` with what rounds up to whole pages."""
        runs, layout = self.views(pages), self.layout
        return {
            "kv": [part(run) for run in runs for part in (layout.keys, layout.values)],
            "positions": [layout.positions_and_rounding(run) for run in runs],
        }

    def free_tensors(self, user: object) -> dict[str, list[Tensor]]:
        """Views of the pages that nobody owns, as kind `free_pages` if there are any.

        Several users that list what they hold may share a pool; only the oldest gets these.
        """
        if not self.pages_free or self.users()[0] is not user:
            return {}
        free = (page for slab in self._slabs.values() for page in slab.free)
        return {"free_pages": self.views(free)}

    def _base_of(self, page: int) -> int:
        return self._bases[bisect_right(self._bases, page) - 1]

    def _check_limit(self, count: int) -> None:
        if (
            self.limit_pages is not None
            and count > self.pages_free + self.limit_pages - self._total
        ):
            raise CachePoolFullError(
                f"the KV cache needs {count} more pages of {self.layout.page_bytes} bytes; "
                f"{self.pages_free} are free and {self._total} of at most {self.limit_pages} are "
                "allocated: end some sequences, read less text, or raise the limit"
            )

    def _grow(self, shortfall: int) -> None:
        size = max(shortfall, min(self.slab_pages, self._total // SLAB_SHARE))
        if self.limit_pages is not None:
            size = min(size, self.limit_pages - self._total)
        # A pool outlives the inference mode it may have been made in.
        with torch.inference_mode(False):
            # Zeros, because padding slots are read (and masked): NaN x 0 would spread.
            bytes_NX = torch.zeros(
                size, self.layout.page_bytes, dtype=torch.uint8, device=self.device
            )
            base = bytes_NX.data_ptr()
            step = self.layout.page_bytes
            self._slabs[base] = _Slab(
                bytes_NX,
                self.layout.keys(bytes_NX),
                self.layout.values(bytes_NX),
                self.layout.positions(bytes_NX),
                free=list(range(base + (size - 1) * step, base - 1, -step)),
            )
        self._bases = sorted(self._slabs)
        self._total += size
