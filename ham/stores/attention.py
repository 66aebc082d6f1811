"""Softmax over several stretches of keys at once, each under a mask of its own.

Letters as in `ham.model.mixer`; G is 1 where all heads see the same tokens and H where each head
has its own, X any trailing axis.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ham.kernels.sdpa import attention, for_varying_shapes

QUERY_BLOCK = 256
"""Queries that attend together; masks of one block are all that is held at a time."""

Position = int | Tensor
"""Where a piece of text starts: one position for the batch, or int64 `[B]`."""


@dataclass(frozen=True)
class Stretch:
    """Keys that some of the queries see.

    Attributes:
        k_BHNK, v_BHNV: Keys and values; what is never visible must still be finite.
        visible: Boolean, broadcastable to `[B, G, T, N]`.
    """

    k_BHNK: Tensor
    v_BHNV: Tensor
    visible: Tensor


def attend_stretches(
    q_BHTK: Tensor, stretches: Sequence[Stretch], sink_BHK: Tensor | None = None
) -> Tensor:
    """Attention of all queries over all stretches and the null key, whose value is zero.

    Returns:
        `o_BHTV` in the dtype of the first stretch's values; exactly 0, without gradient, where a
        query sees no key.
    """
    batch, heads, time, _ = q_BHTK.shape
    first = stretches[0].v_BHNV
    keys = [part.k_BHNK.to(q_BHTK.dtype) for part in stretches]
    values = [part.v_BHNV.to(q_BHTK.dtype) for part in stretches]
    groups = max(part.visible.shape[1] for part in stretches)
    masks = [part.visible.expand(batch, groups, time, -1) for part in stretches]
    # One more key, which never counts but keeps the softmax of an empty row finite: the sink, or
    # a null key that only rows without any other key look at.
    seen_BGT1 = torch.cat(masks, -1).any(-1, keepdim=True)
    null = sink_BHK is None
    null_BHK = q_BHTK.new_zeros(1, 1, 1) if null else sink_BHK.to(q_BHTK.dtype)
    keys.append(null_BHK[:, :, None].expand(batch, heads, 1, q_BHTK.shape[-1]))
    values.append(values[0].new_zeros(batch, heads, 1, first.shape[-1]))
    masks.append(~seen_BGT1 if null else torch.ones_like(seen_BGT1))
    with for_varying_shapes(q_BHTK.device):
        o_BHTV = attention(q_BHTK, torch.cat(keys, 2), torch.cat(values, 2), torch.cat(masks, -1))
    return o_BHTV.to(first.dtype)


def positions_of(start: Position, batch: int, time: int, device: torch.device) -> Tensor:
    """`positions_BT`, int64, of `time` tokens from `start` on."""
    steps_T = torch.arange(time, device=device)
    if isinstance(start, Tensor):
        return start[:, None] + steps_T
    return (start + steps_T).expand(batch, -1)


def gather_tokens(x_BHNX: Tensor, index_BGM: Tensor) -> Tensor:
    """Tokens `index_BGM` of `x_BHNX` along its third axis, `[B, H, M, X]`."""
    index_BHM = index_BGM.expand(-1, x_BHNX.shape[1], -1)
    return x_BHNX.gather(2, index_BHM[..., None].expand(-1, -1, -1, x_BHNX.shape[-1]))


def by_head(score: Tensor) -> Tensor:
    """A score `[B, T]` or `[B, T, H]` as `score_BGT`, float32 or wider, without gradient.

    NaN becomes -inf, and a token with -inf never enters a cache.
    """
    score = score.detach()
    wide = score if score.dtype == torch.float64 else score.float()
    wide_BGT = wide[:, None] if wide.ndim == 2 else wide.transpose(1, 2)
    return wide_BGT.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)


def like_score(kept_BGT: Tensor, score: Tensor) -> Tensor:
    """The inverse layout of `by_head` for a boolean mask: `[B, T]` or `[B, T, H]`."""
    return kept_BGT[:, 0] if score.ndim == 2 else kept_BGT.transpose(1, 2)


def routed_values(v_BTHV: Tensor, router_score: Tensor | None) -> Tensor:
    """Values times a factor of exactly 1 through which the router learns: v (1 + s - stop(s)).

    `router_score` is `[B, T]` or `[B, T, H]`.
    """
    if router_score is None:
        return v_BTHV
    path = (router_score - router_score.detach()).to(v_BTHV.dtype)
    path_BTG1 = path[:, :, None, None] if path.ndim == 2 else path[..., None]
    return v_BTHV * (1 + path_BTG1)
