"""Where keys, values and positions stand on a page of the routed cache.

A page holds `page_tokens` tokens of one sequence and one layer:

    keys [H, page_tokens, K], values [H, page_tokens, V], positions [page_tokens] int32

Keys of one head lie side by side, so a program that attends with one head reads one run of bytes.
A cache per head has pages of one head. Every run starts at a multiple of 16 bytes (widest load of
a thread) if K and V times the element size are multiples of 16.
"""

from __future__ import annotations

POSITION_BYTES = 4
PAGE_ALIGNMENT = 256
"""Pages start at multiples of this many bytes: a page's first cache line is its own."""


def key_offset(page_tokens: int, head: int, slot: int, key_size: int, element_size: int) -> int:
    """Byte at which the key of one head in one slot starts."""
    return (head * page_tokens + slot) * key_size * element_size


def value_offset(
    page_tokens: int,
    heads: int,
    head: int,
    slot: int,
    key_size: int,
    value_size: int,
    element_size: int,
) -> int:
    """Byte at which the value of one head in one slot starts."""
    keys = heads * page_tokens * key_size
    return (keys + (head * page_tokens + slot) * value_size) * element_size


def position_offset(
    page_tokens: int, heads: int, key_size: int, value_size: int, element_size: int
) -> int:
    """Byte at which the positions start, a multiple of 4."""
    end = heads * page_tokens * (key_size + value_size) * element_size
    return _rounded_up(end, POSITION_BYTES)


def page_bytes(
    page_tokens: int, heads: int, key_size: int, value_size: int, element_size: int
) -> int:
    """Bytes from one page to the next."""
    start = position_offset(page_tokens, heads, key_size, value_size, element_size)
    return _rounded_up(start + page_tokens * POSITION_BYTES, PAGE_ALIGNMENT)


def _rounded_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
