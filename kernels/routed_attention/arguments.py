"""What goes into attention over routed tokens."""

from __future__ import annotations

import torch
from torch import Tensor


def check_arguments(
    q_BTHK: Tensor,
    k_BTGK: Tensor,
    v_BTGV: Tensor,
    routed_BT: Tensor,
    window: int,
    sink_HK: Tensor | None,
    router_score_BT: Tensor | None,
) -> None:
    """Raise `ValueError` when shapes or dtypes do not fit together; names what was received."""
    if q_BTHK.ndim != 4 or q_BTHK.shape[1] < 1:
        raise ValueError(f"q must be [B, T, H, K] with T >= 1, not {tuple(q_BTHK.shape)}")
    if k_BTGK.ndim != 4:
        raise ValueError(f"k must be [B, T, G, K], not {tuple(k_BTGK.shape)}")
    batch, time, heads, key_size = q_BTHK.shape
    groups = k_BTGK.shape[2]
    expected: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        "k": (k_BTGK, (batch, time, groups, key_size)),
        "v": (v_BTGV, (batch, time, groups, v_BTGV.shape[-1])),
        "routed": (routed_BT, (batch, time)),
        "sink": (sink_HK, (heads, key_size)),
        "router_score": (router_score_BT, (batch, time)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must be {shape} to fit q, not {tuple(tensor.shape)}")
    if groups < 1 or heads % groups:
        raise ValueError(f"{heads} query heads cannot share {groups} key heads evenly")
    if routed_BT.dtype != torch.bool:
        raise ValueError(f"routed must be boolean, not {routed_BT.dtype}")
    if window < 0:
        raise ValueError(f"window must be at least 0, not {window}")
