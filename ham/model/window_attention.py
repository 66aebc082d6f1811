"""Causal attention over the last tokens, and over the first ones too where a mixer asks for sinks.

A query at position t sees position j <= t if j > t - window (Beltagy et al. 2020, arXiv 2004.05150)
or j < sinks (Xiao et al. 2023, arXiv 2309.17453). Letters as in `ham.model.mixer`; C blocks of
queries, S sinks, W the window.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ham.cache import WindowKVCache
from ham.kernels.runs import takes_runs
from ham.kernels.sdpa import for_varying_shapes
from ham.measure.cost import causal_pairs
from ham.model import window_blocks


@takes_runs()
def window_attention(
    q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, window: int, sinks: int = 0
) -> Tensor:
    """Attention within a sequence whose cost grows with T × (window + sinks), not with T².

    By FlexAttention on a GPU where `window_blocks.takes` says so, else by `banded_attention`.
    Returns `o_BTHV`.
    """
    attend = window_blocks.attend if window_blocks.takes(q_BTHK, window) else banded_attention
    return attend(q_BTHK, k_BTHK, v_BTHV, window, sinks)


def banded_attention(
    q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, window: int, sinks: int = 0
) -> Tensor:
    """`window_attention` on every device, by torch's masked attention.

    The sequence is cut into blocks of `window` tokens; a block sees itself, the one before and the
    sinks.
    """
    batch, length = q_BTHK.shape[:2]
    if length <= window:
        return _attend(q_BTHK, k_BTHK, v_BTHV, None, causal=True)
    blocks = -(-length // window)
    pad = blocks * window - length
    q, k, v = (
        F.pad(x, (0, 0, 0, 0, 0, pad)).unflatten(1, (blocks, window))
        for x in (q_BTHK, k_BTHK, v_BTHV)
    )
    k, v = (torch.cat((F.pad(x, (0, 0) * 3 + (1, 0))[:, :-1], x), dim=2) for x in (k, v))
    visible_CWN = _band(blocks, window, q.device)
    if sinks:
        k, v = (
            torch.cat((x[:, None, :sinks].expand(-1, blocks, -1, -1, -1), near), dim=2)
            for x, near in ((k_BTHK, k), (v_BTHV, v))
        )
        visible_CWN = torch.cat((_far_sinks(blocks, window, sinks, q.device), visible_CWN), dim=2)
    visible = visible_CWN.repeat(batch, 1, 1)[:, None]
    o = _attend(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), visible)
    return o.unflatten(0, (batch, blocks)).flatten(1, 2)[:, :length]


def prefill_window(q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, cache: WindowKVCache) -> Tensor:
    """Attention of T new tokens over `cache` and themselves, then kept in it; `o_BTHV`."""
    if cache.positions.longest == 0:
        o_BTHV = window_attention(q_BTHK, k_BTHK, v_BTHV, cache.window, cache.sinks)
    else:
        o_BTHV = _attend_ring(q_BTHK, k_BTHK, v_BTHV, cache)
    cache.append(k_BTHK, v_BTHV)
    return o_BTHV


def step_window(q_B1HK: Tensor, k_B1HK: Tensor, v_B1HV: Tensor, cache: WindowKVCache) -> Tensor:
    """Attention of one new token; once it is appended, `cache` holds exactly what it may see."""
    cache.append(k_B1HK, v_B1HV)
    filled = min(cache.positions.longest, cache.slots)
    visible = None
    if cache.positions.shortest < filled:
        visible = (cache.positions_BW()[:, :filled] >= 0)[:, None, None]
    return _attend(q_B1HK, cache.k_BWHK[:, :filled], cache.v_BWHV[:, :filled], visible)


def window_pairs(tokens: int, window: int, sinks: int = 0) -> float:
    """Query-key pairs within a sequence of `tokens`."""
    far = causal_pairs(max(tokens - window, 0), sinks)
    return causal_pairs(tokens, window) + far


def window_provider(device: torch.device, head_size: int) -> str | None:
    """`flex` where FlexAttention computes `window_attention` of long sequences; None elsewhere."""
    return window_blocks.PROVIDER if window_blocks.runs_on(device, head_size) else None


def _band(blocks: int, window: int, device: torch.device) -> Tensor:
    """Which of the previous and the own block each query sees, `visible_CWN`."""
    row = torch.arange(window, device=device)[:, None]
    column = torch.arange(2 * window, device=device) - window
    band = (column <= row) & (column > row - window)
    return torch.stack((band & (column >= 0), *(band,) * (blocks - 1)))


def _far_sinks(blocks: int, window: int, sinks: int, device: torch.device) -> Tensor:
    """Which sinks each query sees beyond its window, `visible_CWS`."""
    query_CW1 = torch.arange(blocks * window, device=device).reshape(blocks, window, 1)
    return torch.arange(sinks, device=device) <= query_CW1 - window


def _attend_ring(q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, cache: WindowKVCache) -> Tensor:
    """New queries over the cache as it was before them and over the new keys."""
    new_BT = cache.positions.upcoming(q_BTHK.shape[1])
    positions_BN = torch.cat((cache.positions_BW(), new_BT), dim=1)
    age_BTN = new_BT[:, :, None] - positions_BN[:, None]
    kept_BTN = (age_BTN < cache.window) | (positions_BN < cache.sinks)[:, None]
    visible_BTN = kept_BTN & (age_BTN >= 0) & (positions_BN >= 0)[:, None]
    keys_BNHK = torch.cat((cache.k_BWHK.to(k_BTHK.dtype), k_BTHK), dim=1)
    values_BNHV = torch.cat((cache.v_BWHV.to(v_BTHV.dtype), v_BTHV), dim=1)
    return _attend(q_BTHK, keys_BNHK, values_BNHV, visible_BTN[:, None])


def _attend(
    q_BTHK: Tensor, k_BNHK: Tensor, v_BNHV: Tensor, visible: Tensor | None, causal: bool = False
) -> Tensor:
    with for_varying_shapes(q_BTHK.device):
        o_BHTV = F.scaled_dot_product_attention(
            q_BTHK.transpose(1, 2),
            k_BNHK.to(q_BTHK.dtype).transpose(1, 2),
            v_BNHV.to(q_BTHK.dtype).transpose(1, 2),
            attn_mask=visible,
            is_causal=causal,
        )
    return o_BHTV.transpose(1, 2)
