"""How paged attention is cut when nobody says otherwise; times of other tiles are in `LOG.md`."""

from __future__ import annotations

import torch

from ham.kernels.decode.arguments import AttentionTile
from ham.kernels.triton_target import target_of

PROGRAMS_PER_MULTIPROCESSOR = 16
"""About four times as many as are resident, so that ragged sequences even out."""

TILES_PER_PROGRAM = 2
"""At least so many tiles should a split have, or the merge costs more than it spreads."""

MOST_SPLITS = 64


def choose_tile(
    batch: int, heads: int, cached_tokens: int, device: torch.device, *, fused: bool = False
) -> AttentionTile:
    """A tile for a batch whose sequences are expected to have about `cached_tokens` in the cache.

    The number of splits is fixed when a graph is captured and right for any counts; the expectation
    only decides how well the work spreads.
    """
    tile = AttentionTile(fused=fused)
    wanted = PROGRAMS_PER_MULTIPROCESSOR * target_of(device).multiprocessors // (batch * heads)
    useful = cached_tokens // (TILES_PER_PROGRAM * tile.tokens)
    splits = max(min(wanted, useful, MOST_SPLITS), 1)
    return AttentionTile(splits=1 << (splits.bit_length() - 1), fused=fused)
