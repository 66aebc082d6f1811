"""Which of torch's attention kernels may run where shapes change from call to call."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ham.kernels.runs import differs_between_runs, takes_runs

WITHOUT_PLANS = [
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]

BACKENDS = {
    "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa_flash": SDPBackend.FLASH_ATTENTION,
    "sdpa_efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa_math": SDPBackend.MATH,
}


def fastest_first(device: torch.device) -> contextlib.AbstractContextManager:
    """Let torch's attention of whole sequences try cuDNN before its other kernels on a GPU.

    On one H100 cuDNN takes 7.4 ms and FlashAttention, which torch prefers, 13.5 ms forward at one
    sequence of 32,768 tokens and 16 heads of 128.
    """
    if device.type != "cuda":
        return contextlib.nullcontext()
    return sdpa_kernel(list(BACKENDS.values()), set_priority=True)


def for_varying_shapes(device: torch.device) -> contextlib.AbstractContextManager:
    """Keep cuDNN away from attention whose number of keys is new in almost every call.

    cuDNN builds an execution plan per shape. With routed keys that is one per layer, query block
    and step: on one H100 (torch 2.11) a training step of a 6-layer HAM on 65,536 tokens took 6 s
    with cuDNN and takes 0.2 s without. Full-length causal attention keeps its shape and keeps it.
    """
    if device.type != "cuda":
        return contextlib.nullcontext()
    return sdpa_kernel(WITHOUT_PLANS)


_of_rows = takes_runs()(F.scaled_dot_product_attention)


def attention(
    q_BHTK: Tensor,
    k_BGNK: Tensor,
    v_BGNV: Tensor,
    attn_mask: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """`F.scaled_dot_product_attention`, also under `torch.vmap` over runs.

    torch's own rule lacks masks that all runs share.
    """
    if attn_mask is not None and differs_between_runs(q_BHTK, k_BGNK, v_BGNV):
        # A mask for each sequence, because runs become further sequences.
        shape = (1,) * (4 - attn_mask.ndim) + attn_mask.shape
        attn_mask = attn_mask.expand(q_BHTK.shape[0], *shape[1:])
    return _of_rows(q_BHTK, k_BGNK, v_BGNV, attn_mask, **options)
