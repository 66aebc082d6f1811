"""torch's FlexAttention, compiled for every shape: by itself, or with the code that calls it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

BLOCK = 128
"""Queries and keys of a block of a mask."""


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    # One kernel per shape, as FlexAttention is fastest with sizes known when it is compiled.
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


def _kernel() -> Callable[..., Tensor]:
    if torch.compiler.is_compiling():
        from torch.nn.attention.flex_attention import flex_attention

        return flex_attention
    return _compiled()


def attend(
    q_BTHK: Tensor,
    k_BNGK: Tensor,
    v_BNGV: Tensor,
    mask: Any,
    scale: float | None = None,
    kernel: Callable[..., Tensor] | None = None,
) -> Tensor:
    """FlexAttention under a block mask, `o_BTHV`.

    Args:
        q_BTHK, k_BNGK, v_BNGV: Queries, keys and values of one dtype; H is a multiple of G.
        mask: A `torch.nn.attention.flex_attention.BlockMask` of T × N.
        scale: Of the scores; 1 / sqrt(K) when None.
        kernel: Replaces the compiled FlexAttention.
    """
    q_BHTK, k_BGNK, v_BGNV = (x.transpose(1, 2) for x in (q_BTHK, k_BNGK, v_BNGV))
    o_BHTV = (kernel or _kernel())(
        q_BHTK,
        k_BGNK,
        v_BGNV,
        block_mask=mask,
        scale=scale,
        enable_gqa=q_BHTK.shape[1] != k_BGNK.shape[1],
    )
    return o_BHTV.transpose(1, 2)
