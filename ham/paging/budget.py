"""A limit on the bytes of the routed cache, and what is said when memory for it runs out.

All pools of a generation share one budget, so it bounds the layers and the sequences together.
Pools are given to memories after these were made, because mixers make their own.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

import torch

from ham.errors import CachePoolFullError, ConfigError
from ham.paging.cache import PagedKVCache
from ham.paging.layout import PageLayout
from ham.paging.pool import PagePool


class CacheBudget:
    """Bytes that the pages of all pools together may take.

    Args:
        limit_bytes: At most so many; None for what the device has.

    Raises:
        ConfigError: For a limit below one byte.
    """

    def __init__(self, limit_bytes: int | None = None):
        if limit_bytes is not None and limit_bytes < 1:
            raise ConfigError(f"cache_bytes {limit_bytes}; legal: an integer >= 1, or none")
        self.limit_bytes = limit_bytes
        self._pools: weakref.WeakSet[BudgetedPool] = weakref.WeakSet()

    @property
    def held_bytes(self) -> int:
        """Bytes of all pages, taken and free."""
        return sum(pool.bytes_allocated for pool in self._pools)

    @property
    def room_bytes(self) -> int | None:
        """Bytes that pages may still get; None without a limit."""
        return None if self.limit_bytes is None else max(0, self.limit_bytes - self.held_bytes)

    def cover(self, memory: Any) -> None:
        """Let the budget bound a decoding memory, which may hold pages already.

        Raises:
            ConfigError: If there is a limit and the memory has no pages that it could bound.
            CachePoolFullError: If it holds more than the limit.
        """
        caches = _paged_caches(memory)
        if not caches and self.limit_bytes is not None:
            raise ConfigError(
                "cache_bytes bounds the paged cache of routed tokens, and this model has none; "
                "legal: a HAM model with budget 'threshold'"
            )
        for cache in caches:
            if not (isinstance(cache.pool, BudgetedPool) and cache.pool.budget is self):
                BudgetedPool(cache.layout, cache.pool.device, self).absorb(cache.pool)
        self.check(0, 0)

    def check(self, pages: int, page_bytes: int) -> None:
        """Raise `CachePoolFullError` if so many more pages exceed the limit."""
        if self.limit_bytes is None or self.held_bytes + pages * page_bytes <= self.limit_bytes:
            return
        raise CachePoolFullError(
            f"the KV cache needs {pages} more pages, {pages * page_bytes:,} bytes; it holds "
            f"{self.held_bytes:,} of at most {self.limit_bytes:,} bytes: end some sequences, "
            "read less text, lower the batch size, or raise the limit (cache_bytes, --cache-mib)"
        )

    def register(self, pool: BudgetedPool) -> None:
        """Count the pages of a pool as long as it lives."""
        self._pools.add(pool)


class BudgetedPool(PagePool):
    """A pool that stays within a budget it may share with others."""

    def __init__(self, layout: PageLayout, device: torch.device, budget: CacheBudget):
        super().__init__(layout, device)
        self.budget = budget
        budget.register(self)

    def _check_limit(self, count: int) -> None:
        if count > self.pages_free:
            self.budget.check(count - self.pages_free, self.layout.page_bytes)

    def _grow(self, shortfall: int) -> None:
        """New pages: with the spare ones of a slab if there is room, else only what is needed."""
        page_bytes, spare = self.layout.page_bytes, self.slab_pages
        room = self.budget.room_bytes
        try:
            if room is not None:
                self.slab_pages = min(spare, room // page_bytes)
            with contextlib.suppress(torch.OutOfMemoryError):
                super()._grow(shortfall)
                return
            self.slab_pages = 0
            with told_when_out_of_memory(shortfall * page_bytes, self.device):
                super()._grow(shortfall)
        finally:
            self.slab_pages = spare


@contextlib.contextmanager
def told_when_out_of_memory(asked_bytes: int, device: torch.device) -> Iterator[None]:
    """Turn the device's refusal to allocate pages into an error that says what to do.

    Raises:
        CachePoolFullError: In place of `torch.OutOfMemoryError`.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise CachePoolFullError(
            f"the KV cache needs {asked_bytes:,} more bytes and {device} has "
            f"{_free_words(device)}: end some sequences, read less text or lower the batch size"
        ) from error


def _free_words(device: torch.device) -> str:
    if device.type != "cuda":
        return "too few free"
    free, total = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return f"{free:,} of {total:,} bytes free and {unused:,} reserved in pieces"


def _paged_caches(memory: Any) -> list[PagedKVCache]:
    """The caches of routed tokens of a memory, one for each layer that has one."""
    found = (getattr(getattr(layer, "cache", None), "paged", None) for layer in memory.layers)
    return [cache for cache in found if isinstance(cache, PagedKVCache)]
