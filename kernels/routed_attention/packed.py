"""Attention over routed tokens, packed: the routed keys of each sequence are moved together.

Masking in place saves nothing, because unstructured routing leaves almost no block of keys empty;
packing makes the cost proportional to the number of routed tokens (rounded up to the longest
sequence of the batch). Packed positions increase, so the queries of a block need a prefix of the
packed keys only: queries go through in blocks, which skips the part above the diagonal.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ham.kernels.sdpa import for_varying_shapes

# 128, 256 and 512 differ by less than 10 % on two CPU cores at T = 512 and 1024; one block of all
# queries is up to 15 % slower than 256.
QUERY_BLOCK = 256


def pack_positions(routed_BT: Tensor, counts_BT: Tensor) -> Tensor:
    """Positions of the routed tokens in increasing order, int64 `[B, T]`, filled up with T.

    Args:
        routed_BT: Boolean.
        counts_BT: Inclusive cumulative count of routed tokens.
    """
    batch, time = routed_BT.shape
    # Unrouted tokens all go to slot T, which is cut off.
    slot_BT = torch.where(routed_BT, counts_BT - 1, time)
    position_BT = torch.arange(time, device=routed_BT.device).expand(batch, time)
    packed = torch.full((batch, time + 1), time, device=routed_BT.device)
    return packed.scatter_(1, slot_BT, position_BT)[:, :time]


def _gather(x_BTHX: Tensor, index_BN: Tensor) -> Tensor:
    index_BNHX = index_BN[:, :, None, None].expand(-1, -1, *x_BTHX.shape[2:])
    return x_BTHX.gather(1, index_BNHX).transpose(1, 2)


def masked_attention(
    q_BHTK: Tensor, k_BHNK: Tensor, v_BHNV: Tensor, visible_BTN: Tensor, scale: float
) -> Tensor:
    """SDPA under a boolean mask; a query that sees no key gets exactly 0 and passes no gradient.

    Such a query looks at key 0 instead and its output is replaced: whatever a backend does with
    a fully masked row, no NaN can arise.
    """
    empty_BT1 = ~visible_BTN.any(-1, keepdim=True)
    first_N = torch.arange(visible_BTN.shape[-1], device=visible_BTN.device) == 0
    mask_B1TN = (visible_BTN | (empty_BT1 & first_N)).unsqueeze(1)
    with for_varying_shapes(q_BHTK.device):
        o_BHTV = F.scaled_dot_product_attention(q_BHTK, k_BHNK, v_BHNV, mask_B1TN, scale=scale)
    return o_BHTV.masked_fill(empty_BT1.unsqueeze(1), 0.0)


def _join(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def packed(
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
    """Pack, then attend with torch's SDPA; plain causal SDPA where every token is routed.

    A block of queries attends to its prefix of the packed keys, to the stretch of tokens that its
    windows cover, and to the null key, side by side under one mask.
    """
    batch, time, heads, _ = q_BTHK.shape
    counts_BT = routed_BT.cumsum(1)
    ends = [*range(QUERY_BLOCK, time, QUERY_BLOCK), time]
    # A block's last query sees the routed tokens up to `window` before it; the rest are recent.
    counted = [max(end - 1 - window, 0) for end in ends]
    longest_X = counts_BT[:, counted].amax(0)
    fewest, *extents = torch.cat([counts_BT[:, -1].amin(keepdim=True), longest_X]).tolist()
    q_BHTK = q_BTHK.transpose(1, 2)
    shared = heads // k_BTGK.shape[2]
    if shared > 1:
        k_BTGK, v_BTGV = (x.repeat_interleave(shared, 2) for x in (k_BTGK, v_BTGV))
    k_BHTK, v_BHTV = k_BTGK.transpose(1, 2), v_BTGV.transpose(1, 2)
    if fewest == time and sink_HK is None and router_score_BT is None:
        o_BHTV = F.scaled_dot_product_attention(q_BHTK, k_BHTK, v_BHTV, is_causal=True, scale=scale)
        return o_BHTV.transpose(1, 2).to(v_BTGV.dtype)

    position_BN = pack_positions(routed_BT, counts_BT)[:, : max(max(extents), 1)]
    index_BN = position_BN.clamp(max=time - 1)
    k_BHNK, v_BHNV = _gather(k_BTGK, index_BN), _gather(v_BTGV, index_BN)
    if router_score_BT is not None:
        path_BN = router_score_BT.gather(1, index_BN).to(v_BHNV.dtype)
        v_BHNV = v_BHNV * (1 + path_BN - path_BN.detach())[:, None, :, None]
    token_T = torch.arange(time, device=q_BTHK.device)
    blocks, start = [], 0
    for end, extent in zip(ends, extents, strict=True):
        slots = max(extent, 1)
        query_Q1 = token_T[start:end, None]
        keys, values = [k_BHNK[:, :, :slots]], [v_BHNV[:, :, :slots]]
        visible = [position_BN[:, None, :slots] <= query_Q1 - window]
        if window > 0:
            recent = slice(max(start - window + 1, 0), end)
            age_QL = query_Q1 - token_T[recent]
            keys.append(k_BHTK[:, :, recent])
            values.append(v_BHTV[:, :, recent])
            visible.append(((age_QL >= 0) & (age_QL < window)).expand(batch, -1, -1))
        if sink_HK is not None:
            keys.append(sink_HK.to(k_BHTK.dtype)[None, :, None].expand(batch, -1, -1, -1))
            values.append(v_BHTV.new_zeros(batch, heads, 1, v_BHTV.shape[-1]))
            visible.append(visible[0].new_ones(batch, end - start, 1))
        blocks.append(
            masked_attention(
                q_BHTK[:, :, start:end],
                _join(keys, 2),
                _join(values, 2),
                _join(visible, 2),
                scale,
            )
        )
        start = end
    return torch.cat(blocks, 2).transpose(1, 2).to(v_BTGV.dtype)
