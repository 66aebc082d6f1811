"""Attention over routed tokens as a masked softmax over all T × T pairs: the definition.

o_t = sum over j <= t with routed_j of softmax_j(scale q_t . k_j) v_j,   0 where there is no j
"""

from __future__ import annotations

import torch
from torch import Tensor

from ham.kernels.chunks import compute_dtype, full_precision


@full_precision
def reference(
    q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, routed_BT: Tensor, *, scale: float
) -> Tensor:
    """Masked softmax in float32, or float64 for float64 inputs; the result in the dtype of v."""
    dtype = compute_dtype(q_BTHK, k_BTHK, v_BTHV)
    q_BHTK, k_BHTK, v_BHTV = (x.to(dtype).transpose(1, 2) for x in (q_BTHK, k_BTHK, v_BTHV))
    time = q_BTHK.shape[1]
    causal_TT = torch.ones(time, time, dtype=torch.bool, device=q_BTHK.device).tril()
    visible_B1TT = (causal_TT & routed_BT[:, None, :])[:, None]
    score_BHTT = scale * (q_BHTK @ k_BHTK.mT)
    # A row without any key would be a softmax over nothing but -inf, which is NaN.
    empty_B1T1 = ~visible_B1TT.any(-1, keepdim=True)
    score_BHTT = score_BHTT.masked_fill(~visible_B1TT, -torch.inf).masked_fill(empty_B1T1, 0.0)
    weight_BHTT = score_BHTT.softmax(-1).masked_fill(~visible_B1TT, 0.0)
    return (weight_BHTT @ v_BHTV).transpose(1, 2).to(v_BTHV.dtype)
