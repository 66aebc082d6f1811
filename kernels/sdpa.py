"""Which of torch's attention kernels may run where shapes change from call to call."""

from __future__ import annotations

import contextlib

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ham.kernels.runs import takes_runs

WITHOUT_PLANS = [
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]

# torch's own rule under `torch.vmap` takes no mask that every run shares.
attention = takes_runs()(F.scaled_dot_product_attention)

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
