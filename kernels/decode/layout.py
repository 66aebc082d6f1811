"""Where keys, values and positions stand on a page of the routed cache.

Keys [H, PAGE, K], then values [H, PAGE, V], then int32 positions [PAGE]; a page is rounded up to
`PAGE_ALIGNMENT` bytes.
"""

from __future__ import annotations

PAGE_ALIGNMENT = 256


def key_offset(
    page_tokens: int, heads: int, key_size: int, value_size: int, element_size: int
) -> int:
    """First byte of the keys."""
    return 0


def value_offset(
    page_tokens: int, heads: int, key_size: int, value_size: int, element_size: int
) -> int:
    """First byte of the values."""
    return page_tokens * heads * key_size * element_size


def position_offset(
    page_tokens: int, heads: int, key_size: int, value_size: int, element_size: int
) -> int:
    """First byte of the positions."""
    return page_tokens * heads * (key_size + value_size) * element_size


def page_bytes(
    page_tokens: int, heads: int, key_size: int, value_size: int, element_size: int
) -> int:
    """Bytes of a page."""
    used = position_offset(page_tokens, heads, key_size, value_size, element_size) + 4 * page_tokens
    return -(-used // PAGE_ALIGNMENT) * PAGE_ALIGNMENT
