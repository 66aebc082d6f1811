"""Kernel that moves the routed tokens of prompts into pages, all layers in one launch.

Letters of the kernel: R rows of a layer's cache, T time, H heads, K and V head sizes; `p_x` a
pointer, `i_x` a program index, `o_x` offsets, `b_x` a block in registers.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def copy_tokens(
    p_from,
    p_to,
    b_token,
    mask,
    i_h,
    H: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    PAGE: tl.constexpr,
):
    """One head's keys or values of the tokens of a page; slots outside of `mask` are left alone."""
    o_d = tl.arange(0, BD)[None, :]
    mask = mask[:, None] & (o_d < D)
    b_x = tl.load(p_from + (b_token * H + i_h)[:, None] * D + o_d, mask=mask)
    o_s = tl.arange(0, PAGE)[:, None]
    tl.store(p_to + (i_h * PAGE + o_s) * D + o_d, b_x, mask=mask)


@triton.jit
def typed(address, ELEMENT: tl.constexpr, ALIGNED: tl.constexpr):
    """An address in bytes as a pointer."""
    pointer = address.to(tl.pointer_type(ELEMENT))
    if ALIGNED:
        # Said of the pointer: what is known of the number is forgotten when it becomes one.
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit(
    do_not_specialize=["R", "T"],
    # Read number by number, and parts of one upload: their alignment varies and does not matter.
    do_not_specialize_on_alignment=["p_pages", "p_rows", "p_nth", "p_keys", "p_values"],
)
def fill_kernel(
    p_pages,
    p_rows,
    p_nth,
    p_keys,
    p_values,
    p_positions,
    p_counts,
    R,
    T,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    PAGE: tl.constexpr,
    VALUE_OFFSET: tl.constexpr,
    POSITION_OFFSET: tl.constexpr,
    ELEMENT: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """One head of one page; the first head writes the positions too."""
    i_x, i_h = tl.program_id(0), tl.program_id(1)
    page = tl.load(p_pages + i_x)
    row = tl.load(p_rows + i_x)
    o_s = tl.arange(0, PAGE)
    o_n = tl.load(p_nth + i_x) * PAGE + o_s
    mask = o_n < tl.load(p_counts + row)
    b_position = tl.load(p_positions + row * T + o_n, mask=mask, other=0)
    # Keys and values lie layer by layer, the rest row by row through all layers.
    b_token = (row % R) * T + b_position
    p_k = typed(tl.load(p_keys + row // R), ELEMENT, ALIGNED)
    p_v = typed(tl.load(p_values + row // R), ELEMENT, ALIGNED)
    copy_tokens(p_k, typed(page, ELEMENT, True), b_token, mask, i_h, H, K, BK, PAGE)
    p_values_of_page = typed(page + VALUE_OFFSET, ELEMENT, True)
    copy_tokens(p_v, p_values_of_page, b_token, mask, i_h, H, V, BV, PAGE)
    if i_h == 0:
        p_page_positions = typed(page + POSITION_OFFSET, tl.int32, True)
        tl.store(p_page_positions + o_s, b_position.to(tl.int32), mask=mask)
