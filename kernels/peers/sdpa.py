"""torch's fused dense causal attention: the attention that routing replaces.

It computes what routed attention computes only where every token is routed, and says so otherwise.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ham.kernels.peers.packages import given, on_cuda_with, refuse_others, tensor
from ham.kernels.registry import Provider


def dense_attention(
    q_BTHK: Tensor,
    k_BTGK: Tensor,
    v_BTGV: Tensor,
    routed_BT: Tensor,
    *,
    backend: SDPBackend,
    scale: float | None = None,
    **unused: Any,
) -> Tensor:
    """Causal attention over all keys by one backend of torch."""
    # With every token routed a window adds nothing.
    refuse_others({name: value for name, value in unused.items() if name != "window"})
    q_BHTK, k_BGTK, v_BGTV = (x.transpose(1, 2) for x in (q_BTHK, k_BTGK, v_BTGV))
    with sdpa_kernel(backend):
        o_BHTV = F.scaled_dot_product_attention(
            q_BHTK,
            k_BGTK,
            v_BGTV,
            is_causal=True,
            scale=scale,
            enable_gqa=q_BHTK.shape[1] != k_BGTK.shape[1],
        )
    return o_BHTV.transpose(1, 2)


def limits(arguments: Mapping[str, Any]) -> str | None:
    """Dense attention over all tokens in half precision, and nothing else."""
    q_BTHK = tensor(arguments, "q")
    if q_BTHK.dtype not in (torch.bfloat16, torch.float16):
        return f"takes bfloat16 or float16, not {q_BTHK.dtype}"
    extra = given(arguments, "sink_HK", "router_score_BT")
    if extra is not None:
        return f"has no {extra.rpartition('_')[0]}"
    if not bool(tensor(arguments, "routed").all()):
        return "dense attention over all tokens is another function where some are not routed"
    return None


def _torch_version() -> str:
    return torch.__version__


ROUTED_ATTENTION = tuple(
    Provider(
        name,
        functools.partial(dense_attention, backend=backend),
        on_cuda_with(),
        kind="peer",
        limits=limits,
        version=_torch_version,
    )
    for name, backend in (
        ("sdpa_cudnn", SDPBackend.CUDNN_ATTENTION),
        ("sdpa_flash", SDPBackend.FLASH_ATTENTION),
    )
)
