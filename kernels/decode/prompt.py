"""Launch that moves the routed tokens of prompts into pages; it never waits for the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from ham.errors import ConfigError
from ham.kernels.decode.arguments import ACTIVATIONS, check
from ham.kernels.decode.launch import ELEMENTS
from ham.kernels.decode.layout import position_offset, value_offset
from ham.kernels.decode.triton_prompt import fill_kernel
from ham.kernels.triton_launch import launch

WARPS = 4


@dataclass(frozen=True)
class PromptTokens:
    """The routed tokens of L layers with R cache rows each; row n belongs to layer n // R.

    Attributes:
        rows: R.
        time: Tokens T of every row.
        heads, key_size, value_size: H, K, V.
        dtype: Of keys and values.
        sources_2L: Int64; addresses of each layer's contiguous keys `[R, T, H, K]`, then of its
            values `[R, T, H, V]`.
        aligned: Whether all of them are multiples of 16.
        positions_NT: Int64; positions of each row's routed tokens in increasing order.
        counts_N: Int64; how many those are.
    """

    rows: int
    time: int
    heads: int
    key_size: int
    value_size: int
    dtype: torch.dtype
    sources_2L: Tensor
    aligned: bool
    positions_NT: Tensor
    counts_N: Tensor


def fill_pages(tokens: PromptTokens, pages_3X: Tensor, page_tokens: int) -> None:
    """Copy routed tokens with their positions to pages; other slots are left alone.

    Args:
        tokens: What to copy.
        pages_3X: Int64; address of each page, its row n, and which of that row's pages it is.
        page_tokens: Slots of a page, a power of two from 8 on.

    Raises:
        ConfigError: For tensors that do not fit together.
    """
    _check(tokens, pages_3X)
    pages = pages_3X.shape[1]
    if pages == 0:
        return
    sizes = (page_tokens, tokens.heads, tokens.key_size, tokens.value_size, tokens.dtype.itemsize)
    launch(
        fill_kernel,
        (pages, tokens.heads),
        *pages_3X.unbind(),
        *tokens.sources_2L.unbind(),
        tokens.positions_NT,
        tokens.counts_N,
        tokens.rows,
        tokens.time,
        H=tokens.heads,
        K=tokens.key_size,
        V=tokens.value_size,
        BK=triton.next_power_of_2(tokens.key_size),
        BV=triton.next_power_of_2(tokens.value_size),
        PAGE=page_tokens,
        VALUE_OFFSET=value_offset(*sizes),
        POSITION_OFFSET=position_offset(*sizes),
        ELEMENT=ELEMENTS[tokens.dtype],
        ALIGNED=tokens.aligned,
        num_warps=WARPS,
    )


def _check(tokens: PromptTokens, pages_3X: Tensor) -> None:
    if tokens.dtype not in ACTIVATIONS:
        legal = ", ".join(map(str, ACTIVATIONS))
        raise ConfigError(f"keys have dtype {tokens.dtype}; legal: {legal}")
    layers = tokens.sources_2L.shape[1]
    total = layers * tokens.rows
    check("pages_3X", pages_3X, (3, pages_3X.shape[1]), torch.int64)
    check("sources_2L", tokens.sources_2L, (2, layers), torch.int64)
    check("positions_NT", tokens.positions_NT, (total, tokens.time), torch.int64)
    check("counts_N", tokens.counts_N, (total,), torch.int64)
