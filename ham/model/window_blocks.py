"""Windowed attention by FlexAttention, which reads the visible blocks of keys and no others.

A query at position t sees position j <= t if j > t - window or j < sinks. Tokens are cut into R
blocks of `BLOCK`; a mask lists the blocks that a block sees in part, on which the kernel applies
that rule, and those that it sees in full, on which it need not. Both are intervals of blocks, so
the lists follow without looking at T × T pairs. Letters as in `ham.model.mixer`.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ham.kernels import flex
from ham.kernels.flex import BLOCK

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

PROVIDER = "flex"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HEAD_SIZES = range(16, 129)
"""FlexAttention refuses smaller heads and float64 on a GPU."""

MASKS = 64
"""Masks kept, one for each length, window and device."""

SHAPES = 256
"""Kernels kept, one for each shape; torch itself raises an error after 8."""


def runs_on(device: torch.device, head_size: int) -> bool:
    """Whether FlexAttention can take long sequences on `device` with heads of this size."""
    return device.type == "cuda" and head_size in HEAD_SIZES


def takes(q_BTHK: Tensor, window: int) -> bool:
    """Whether FlexAttention is to do these queries; their keys and values are alike.

    It builds a kernel for every length, which takes seconds. That pays where the length comes
    again: in training, and at lengths of whole blocks, which contexts have and prompts seldom do.
    """
    length, head_size = q_BTHK.shape[1], q_BTHK.shape[3]
    return (
        runs_on(q_BTHK.device, head_size)
        and q_BTHK.dtype in DTYPES
        and length > window
        and length >= BLOCK
        and (length % BLOCK == 0 or torch.is_grad_enabled())
    )


def attend(q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, window: int, sinks: int = 0) -> Tensor:
    """Attention within a sequence, of queries that `takes` admits and in their dtype; `o_BTHV`."""
    mask = window_mask(q_BTHK.shape[1], window, sinks, q_BTHK.device)
    inputs = q_BTHK, k_BTHK.to(q_BTHK.dtype), v_BTHV.to(q_BTHK.dtype)
    if torch.compiler.is_compiling():
        return flex.attend(*inputs, mask)
    with torch._dynamo.config.patch(recompile_limit=SHAPES):
        return flex.attend(*inputs, mask)


def window_mask(length: int, window: int, sinks: int, device: torch.device) -> BlockMask:
    """The mask of a sequence of `length` tokens, the same for every sequence and head.

    Made once for each set of arguments. Within compiled code it is made in place, as a compiler
    reads through a cache; there it is a few fused operations on R × R numbers.
    """
    make = _block_mask if torch.compiler.is_compiling() else _kept_mask
    return make(length, window, sinks, device)


@functools.lru_cache(maxsize=MASKS)
def _kept_mask(length: int, window: int, sinks: int, device: torch.device) -> BlockMask:
    # A mask that prefill made must serve training too, which saves its tensors for backward.
    with torch.inference_mode(False):
        mask = _block_mask(length, window, sinks, device)
    if device.type == "cuda":
        # Whoever asks next may be on another stream.
        torch.cuda.current_stream(device).synchronize()
    return mask


def _block_mask(length: int, window: int, sinks: int, device: torch.device) -> BlockMask:
    from torch.nn.attention.flex_attention import BlockMask

    def visible(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return (kv <= q) & ((kv > q - window) | (kv < sinks))

    return BlockMask(
        seq_lengths=(length, length),
        **block_lists(length, window, sinks, device),
        BLOCK_SIZE=(BLOCK, BLOCK),
        mask_mod=visible,
    )


def block_lists(length: int, window: int, sinks: int, device: torch.device) -> dict[str, Tensor]:
    """Blocks of keys by block of queries, and blocks of queries by block of keys for a backward.

    Block c of keys is seen by block r >= c of queries if r - c <= `near` or it holds a sink; in
    full if c < r, r is a whole block, and r - c < `within` or c holds nothing but sinks.

    Returns:
        The arguments of `BlockMask`, int32: numbers `[1, 1, R]`, indices `[1, 1, R, R]`.
    """
    blocks, whole = -(-length // BLOCK), length // BLOCK
    near, within = (window + BLOCK - 2) // BLOCK, window // BLOCK
    some_sinks, all_sinks = -(-sinks // BLOCK), sinks // BLOCK
    row_R = torch.arange(blocks, device=device, dtype=torch.int32)
    next_R = row_R + 1
    # By block of queries: the first of the seen and of the full blocks before its own.
    seen_R = (row_R - near).clamp(min=0)
    full_R = torch.minimum((next_R - within).clamp(min=0), row_R)
    full_R = torch.where(row_R < whole, full_R, row_R)
    full_sinks_R = full_R.clamp(max=all_sinks).masked_fill(row_R >= whole, 0)
    # By block of keys: behind the last block that sees it, and behind the last that does in full.
    seen_until_R = (next_R + near).clamp(max=blocks).masked_fill(row_R < some_sinks, blocks)
    full_until_R = (row_R + within).clamp(max=whole).masked_fill(row_R < all_sinks, whole)
    lists = {
        "kv": (
            (full_sinks_R, seen_R.clamp(max=some_sinks)),
            (torch.maximum(seen_R, full_sinks_R), full_R),
            (row_R, next_R),
        ),
        "full_kv": ((torch.zeros_like(row_R), full_sinks_R), (full_R, row_R)),
        "q": ((row_R, next_R), (torch.maximum(next_R, full_until_R), seen_until_R)),
        "full_q": ((next_R, full_until_R),),
    }
    named = {}
    for name, intervals in lists.items():
        named[f"{name}_num_blocks"], named[f"{name}_indices"] = _one_after_another(intervals)
    return named


def _one_after_another(intervals: tuple[tuple[Tensor, Tensor], ...]) -> tuple[Tensor, Tensor]:
    """How many blocks disjoint intervals `(start_R, end_R)` have, and these blocks side by side.

    An interval that ends before it starts is empty. Places beyond the number hold any block.
    """
    first_R = intervals[0][0]
    blocks, number_R1 = first_R.shape[0], torch.zeros_like(first_R)[:, None]
    order_R = torch.arange(blocks, device=first_R.device, dtype=torch.int32)
    block_RR = torch.zeros_like(number_R1)
    for start_R, end_R in intervals:
        place_RR = order_R - number_R1
        block_RR = torch.where(place_RR >= 0, start_R[:, None] + place_RR, block_RR)
        number_R1 = number_R1 + (end_R - start_R).clamp(min=0)[:, None]
    return number_R1[None, None, :, 0], block_RR.clamp(max=blocks - 1)[None, None]
