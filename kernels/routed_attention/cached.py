"""Attention of new queries over a cache of packed keys, for prefill in pieces and decoding."""

from __future__ import annotations

import torch
from torch import Tensor

from ham.kernels.routed_attention.packed import masked_attention


def routed_attention_cached(
    q_BTHK: Tensor,
    k_BNHK: Tensor,
    v_BNHV: Tensor,
    key_positions_BN: Tensor,
    key_counts_B: Tensor,
    query_positions_BT: Tensor,
    *,
    scale: float | None = None,
) -> Tensor:
    """Attend to the first `key_counts_B` slots of a cache, as far as they are not in the future.

    Args:
        q_BTHK: Queries.
        k_BNHK: Keys of the cache. Slots at or beyond the count may hold anything finite of the
            size of a key (zeros, stale keys); they get no weight. Pass only the slots in use:
            the cost is that of N slots.
        v_BNHV: Values of the cache; unused slots finite.
        key_positions_BN: Int64; position of each cached token in its sequence.
        key_counts_B: Int64; slots in use.
        query_positions_BT: Int64; position of each query in its sequence.
        scale: Multiplies the scores. Default: K ** -0.5.

    Returns:
        `o_BTHV` in the dtype of the values; exactly 0 where no key is visible.
    """
    batch, time, heads, key_size = q_BTHK.shape
    slots = k_BNHK.shape[1]
    if slots == 0:
        return v_BNHV.new_zeros(batch, time, heads, v_BNHV.shape[-1])
    used_BN = torch.arange(slots, device=q_BTHK.device) < key_counts_B.unsqueeze(-1)
    past_BTN = key_positions_BN.unsqueeze(1) <= query_positions_BT.unsqueeze(-1)
    o_BHTV = masked_attention(
        q_BTHK.transpose(1, 2),
        k_BNHK.transpose(1, 2),
        v_BNHV.transpose(1, 2),
        past_BTN & used_BN.unsqueeze(1),
        key_size**-0.5 if scale is None else scale,
    )
    return o_BHTV.transpose(1, 2).to(v_BNHV.dtype)
