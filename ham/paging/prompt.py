"""Caches filled from whole prompts of all layers at once, for a prefill that a CUDA graph holds.

How many pages a prompt needs is known only when it has been read, and then the host must allocate
them. So a prefill is cut in two. The graph reads the prompt and leaves keys, values and decisions
of every token where it computed them (`RoutedTokens`, `index_tokens`). Then the host reads the
counts, once for all layers, and one launch moves what was routed into pages (`store_tokens`).

Letters as in `ham.model.mixer`; R rows of a layer's cache, N rows of all layers, X pages.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ham.kernels.routed_attention.packed import pack_positions
from ham.kernels.triton_target import triton_available
from ham.paging.cache import PagedKVCache
from ham.paging.pool import PagePool

ALIGNMENT = 16
"""Bytes at which keys and values must begin to be copied by wide loads."""


class RoutedTokens:
    """Stands in for an empty `PagedKVCache` while a prompt is read, and remembers what to store.

    Attributes:
        cache: The empty cache.
        k_RTHK, v_RTHV, routed_RT: What `append` was given; contiguous, in the dtype of the cache.
    """

    def __init__(self, cache: PagedKVCache):
        self.cache = cache
        self.k_RTHK: Tensor | None = None
        self.v_RTHV: Tensor | None = None
        self.routed_RT: Tensor | None = None

    def append(self, k_RTHK: Tensor, v_RTHV: Tensor, routed_RT: Tensor, start: int) -> None:
        """Remember a whole prompt, which begins at position 0; to be called once.

        Raises:
            ValueError: For another `start`.
        """
        if start != 0:
            raise ValueError(f"a prompt is read from position 0, not {start}")
        dtype = self.cache.layout.dtype
        self.k_RTHK = k_RTHK.to(dtype).contiguous()
        self.v_RTHV = v_RTHV.to(dtype).contiguous()
        self.routed_RT = routed_RT


class TokenIndex(NamedTuple):
    """Where the routed tokens of all layers are.

    Attributes:
        positions_NT: Int64; positions of each row's routed tokens in increasing order, then T.
        counts_N: Int64; how many those are.
    """

    positions_NT: Tensor
    counts_N: Tensor


def index_tokens(prompts: Sequence[RoutedTokens]) -> TokenIndex:
    """The index of what the layers `prompts`, all of R rows and T tokens, are to store.

    Nothing here waits for the device.
    """
    routed_NT = torch.cat([prompt.routed_RT for prompt in prompts])
    counts_NT = routed_NT.cumsum(1)
    positions_NT = pack_positions(routed_NT, counts_NT)
    return TokenIndex(positions_NT.contiguous(), counts_NT[:, -1].contiguous())


@torch.no_grad()
def store_tokens(prompts: Sequence[RoutedTokens], index: TokenIndex) -> list[PagedKVCache]:
    """Caches with the routed tokens, one a layer, on pages of one new pool.

    Waits for the device once, to read the counts.
    """
    counts_LR = np.array(index.counts_N.tolist(), dtype=np.int64).reshape(len(prompts), -1)
    layout, device = prompts[0].cache.layout, index.counts_N.device
    pool = PagePool(layout, device)
    if not triton_available(device):
        return [_appended(prompt, pool) for prompt in prompts]
    pages_LR = -(-counts_LR // layout.page_tokens)
    pages_X = np.array(pool.take(int(pages_LR.sum())), dtype=np.int64)
    caches = _Upload(counts_LR, pages_LR, pages_X, prompts, device)
    caches.fill(prompts, index)
    return caches.make(pool)


def _appended(prompt: RoutedTokens, pool: PagePool) -> PagedKVCache:
    """The same for one layer in plain torch."""
    layout = prompt.cache.layout
    cache = PagedKVCache(
        len(prompt.cache.counts),
        layout.heads,
        layout.key_size,
        prompt.k_RTHK,
        value_size=layout.value_size,
        page_tokens=layout.page_tokens,
        pool=pool,
    )
    cache.append(prompt.k_RTHK, prompt.v_RTHV, prompt.routed_RT, 0)
    return cache


class _Upload:
    """All numbers that the device needs of the new caches, sent in one copy.

    Attributes:
        tables: Page table of each layer, on the host.
        tables_on_device, counts_LR, pages_3X, sources_2L: What was sent.
    """

    def __init__(
        self,
        counts_LR: np.ndarray,
        pages_LR: np.ndarray,
        pages_X: np.ndarray,
        prompts: Sequence[RoutedTokens],
        device: torch.device,
    ):
        self.counts = counts_LR.tolist()
        self.tables = _tables(pages_LR, pages_X)
        row_X = np.repeat(np.arange(pages_LR.size), pages_LR.ravel())
        first_N = np.cumsum(pages_LR) - pages_LR.ravel()
        nth_X = np.arange(len(pages_X)) - first_N[row_X]
        sources = [prompt.k_RTHK.data_ptr() for prompt in prompts]
        sources += [prompt.v_RTHV.data_ptr() for prompt in prompts]
        self.aligned = all(source % ALIGNMENT == 0 for source in sources)
        parts = [*self.tables, counts_LR, np.stack((pages_X, row_X, nth_X)), np.array(sources)]
        *self.tables_on_device, counts, self.pages_3X, sources_2L = _sent(parts, device)
        self.counts_LR = counts.to(torch.int32)
        self.sources_2L = sources_2L.view(2, -1)

    def fill(self, prompts: Sequence[RoutedTokens], index: TokenIndex) -> None:
        """Move the tokens into the pages."""
        from ham.kernels.decode.prompt import PromptTokens, fill_pages

        layout = prompts[0].cache.layout
        rows, time = prompts[0].routed_RT.shape
        tokens = PromptTokens(
            rows,
            time,
            layout.heads,
            layout.key_size,
            layout.value_size,
            layout.dtype,
            self.sources_2L,
            self.aligned,
            *index,
        )
        fill_pages(tokens, self.pages_3X, layout.page_tokens)

    def make(self, pool: PagePool) -> list[PagedKVCache]:
        """The caches."""
        parts = zip(self.tables, self.tables_on_device, self.counts, self.counts_LR, strict=True)
        return [_PromptCache(pool, *part) for part in parts]


class _PromptCache(PagedKVCache):
    """A cache on pages taken from `pool`, whose table and counts are on the device already."""

    def __init__(
        self,
        pool: PagePool,
        table_BP: np.ndarray,
        page_table_BP: Tensor,
        counts: list[int],
        counts_B: Tensor,
    ):
        self.pool, self.layout = pool, pool.layout
        pool.add_user(self)
        self._table, self.page_table_BP = table_BP, page_table_BP
        self.counts, self.counts_B = counts, counts_B
        self._packing = None


def _tables(pages_LR: np.ndarray, pages_X: np.ndarray) -> list[np.ndarray]:
    """Page table of each layer, as wide as its longest row; `pages_X` row after row."""
    tables, first = [], 0
    for pages_R in pages_LR:
        used_RP = np.arange(pages_R.max(initial=0)) < pages_R[:, None]
        table_RP = np.zeros(used_RP.shape, dtype=np.int64)
        table_RP[used_RP] = pages_X[first : first + pages_R.sum()]
        first += pages_R.sum()
        tables.append(table_RP)
    return tables


def _sent(arrays: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
    """The arrays (int64) on the device, views of one tensor."""
    flat = torch.from_numpy(np.concatenate([array.ravel() for array in arrays]))
    if device.type == "cuda":
        # From pinned memory, so that the host does not wait.
        flat = flat.pin_memory().to(device, non_blocking=True)
    parts = flat.split([array.size for array in arrays])
    return [part.view(array.shape) for part, array in zip(parts, arrays, strict=True)]
