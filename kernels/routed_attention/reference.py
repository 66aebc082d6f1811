"""Attention over routed tokens as a masked softmax over all T × T pairs: the definition.

o_t = sum over visible j of softmax_j(scale q_t . k_j) v_j,   0 where there is no j

j <= t is visible if it is routed or among the `window` most recent tokens, t included. A null key
takes part in the softmax with the value 0. The routing score reaches the values that are read as
routed, outside the window, through a factor of 1: v_j (1 + s_j - stop(s_j)).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ham.kernels.chunks import compute_dtype, full_precision


def _per_query_head(x_BTGX: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    return x_BTGX.to(dtype).transpose(1, 2).repeat_interleave(heads // x_BTGX.shape[2], 1)


@full_precision
def reference(
    q_BTHK: Tensor,
    k_BTGK: Tensor,
    v_BTGV: Tensor,
    routed_BT: Tensor,
    *,
    window: int,
    sink_HK: Tensor | None,
    router_score_BT: Tensor | None,
    scale: float,
) -> Tensor:
    """Masked softmax in float32, or float64 for float64 inputs; the result in the dtype of v."""
    dtype = compute_dtype(q_BTHK, k_BTGK, v_BTGV)
    heads, time = q_BTHK.shape[2], q_BTHK.shape[1]
    q_BHTK = q_BTHK.to(dtype).transpose(1, 2)
    k_BHTK, v_BHTV = (_per_query_head(x, heads, dtype) for x in (k_BTGK, v_BTGV))
    age_TT = torch.arange(time, device=q_BTHK.device).unsqueeze(-1) - torch.arange(
        time, device=q_BTHK.device
    )
    recent_TT = (age_TT >= 0) & (age_TT < window)
    as_routed_B1TT = ((age_TT >= window) & routed_BT[:, None, :])[:, None]
    visible_B1TT = as_routed_B1TT | recent_TT
    score_BHTT = scale * (q_BHTK @ k_BHTK.mT)
    score_BHTT = score_BHTT.masked_fill(~visible_B1TT, -torch.inf)
    if sink_HK is not None:
        sink_BHT1 = scale * (q_BHTK @ sink_HK.to(dtype).unsqueeze(-1))
        weight_BHTT = torch.cat([score_BHTT, sink_BHT1], -1).softmax(-1)[..., :-1]
    else:
        # A row without any key would be a softmax over nothing but -inf, which is NaN.
        empty_B1T1 = ~visible_B1TT.any(-1, keepdim=True)
        weight_BHTT = score_BHTT.masked_fill(empty_B1T1, 0.0).softmax(-1)
        weight_BHTT = weight_BHTT.masked_fill(~visible_B1TT, 0.0)
    o_BHTV = weight_BHTT @ v_BHTV
    if router_score_BT is not None:
        path_BT = router_score_BT.to(dtype)
        path_BHTV = v_BHTV * (path_BT - path_BT.detach())[:, None, :, None]
        o_BHTV = o_BHTV + weight_BHTT.masked_fill(~as_routed_B1TT, 0.0) @ path_BHTV
    return o_BHTV.transpose(1, 2).to(v_BTGV.dtype)
