"""What a page of the routed cache looks like, and what a sequence's pages cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ham.kernels.decode.layout import key_offset, page_bytes, position_offset, value_offset

PAGE_TOKENS = 32
"""Tokens on one page of the routed cache."""

INT32_BYTES = 4
ADDRESS_BYTES = 8


class PagedBytes(NamedTuple):
    """Bytes of one sequence's share of a paged cache.

    Attributes:
        kv: Keys and values of the routed tokens, without unused slots.
        positions: Their positions.
        page_table: Page addresses and the count.
        allocated: Whole pages, table and count.
    """

    kv: int
    positions: int
    page_table: int
    allocated: int


def paged_bytes(
    routed: int,
    heads: int,
    key_size: int,
    value_size: int,
    element_size: int,
    page_tokens: int = PAGE_TOKENS,
) -> PagedBytes:
    """Bytes that one sequence with `routed` tokens takes in a cache that holds it alone."""
    pages = -(-routed // page_tokens)
    table = pages * ADDRESS_BYTES + INT32_BYTES
    size = page_bytes(page_tokens, heads, key_size, value_size, element_size)
    return PagedBytes(
        kv=routed * heads * (key_size + value_size) * element_size,
        positions=routed * INT32_BYTES,
        page_table=table,
        allocated=pages * size + table,
    )


@dataclass(frozen=True)
class PageLayout:
    """Sizes of a page: keys [H, S, K], then values [H, S, V], then int32 positions [S].

    Attributes:
        heads: Heads H on the page.
        key_size: K.
        value_size: V.
        dtype: Of keys and values.
        page_tokens: Slots S, one token each.
    """

    heads: int
    key_size: int
    value_size: int
    dtype: torch.dtype
    page_tokens: int = PAGE_TOKENS

    @property
    def page_bytes(self) -> int:
        """Bytes from one page to the next, a multiple of 256."""
        return page_bytes(*self._sizes)

    def pages_for(self, tokens: int) -> int:
        """Pages that hold so many tokens."""
        return -(-tokens // self.page_tokens)

    def keys(self, pages_NX: Tensor) -> Tensor:
        """View `[N, H, S, K]` of the keys of N pages given as rows of bytes."""
        return self._heads_view(pages_NX, key_offset(*self._sizes), self.key_size)

    def values(self, pages_NX: Tensor) -> Tensor:
        """View `[N, H, S, V]` of the values."""
        return self._heads_view(pages_NX, value_offset(*self._sizes), self.value_size)

    def positions(self, pages_NX: Tensor) -> Tensor:
        """View `[N, S]` of the int32 positions."""
        first = position_offset(*self._sizes)
        return pages_NX[:, first : first + self.page_tokens * INT32_BYTES].view(torch.int32)

    def positions_and_rounding(self, pages_NX: Tensor) -> Tensor:
        """View of all bytes behind the values: positions and what rounds up to whole pages."""
        return pages_NX[:, position_offset(*self._sizes) :]

    @property
    def _sizes(self) -> tuple[int, int, int, int, int]:
        return (
            self.page_tokens,
            self.heads,
            self.key_size,
            self.value_size,
            self.dtype.itemsize,
        )

    def _heads_view(self, pages_NX: Tensor, first: int, size: int) -> Tensor:
        length = self.heads * self.page_tokens * size * self.dtype.itemsize
        part_NX = pages_NX[:, first : first + length].view(self.dtype)
        return part_NX.unflatten(1, (self.heads, self.page_tokens, size))
