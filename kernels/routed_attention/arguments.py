"""What goes into attention over routed tokens."""

from __future__ import annotations

import torch
from torch import Tensor


def check_arguments(q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, routed_BT: Tensor) -> None:
    """Raise `ValueError` when shapes or dtypes do not fit together; names what was received."""
    if q_BTHK.ndim != 4 or q_BTHK.shape[1] < 1:
        raise ValueError(f"q must be [B, T, H, K] with T >= 1, not {tuple(q_BTHK.shape)}")
    expected = {
        "k": (k_BTHK, tuple(q_BTHK.shape)),
        "v": (v_BTHV, (*q_BTHK.shape[:3], v_BTHV.shape[-1])),
        "routed": (routed_BT, tuple(q_BTHK.shape[:2])),
    }
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must be {shape} to fit q, not {tuple(tensor.shape)}")
    if routed_BT.dtype != torch.bool:
        raise ValueError(f"routed must be boolean, not {routed_BT.dtype}")
