"""The last tokens of each sequence in a ring, for a window that is always visible."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ham.stores.attention import Position, positions_of


class RecentTokens:
    """Keys and values of the last `size` tokens; slot = position mod size, per sequence.

    A window of w tokens needs w - 1 slots, because the query's own token is at hand. Sequences of
    the batch may stand at different positions.
    """

    def __init__(self, batch: int, heads: int, size: int, head_dim: int, like: Tensor):
        self.size = size
        self.k_BHWK = like.new_zeros(batch, heads, size, head_dim)
        self.v_BHWV = like.new_zeros(batch, heads, size, head_dim)

    def positions_BW(self, end: Position) -> Tensor:
        """Position of the token in each slot once `end` tokens were read; below 0: empty."""
        batch, device = self.k_BHWK.shape[0], self.k_BHWK.device
        newest_B1 = positions_of(end, batch, 1, device) - 1
        slots_W = torch.arange(self.size, device=device)
        return newest_B1 - (newest_B1 - slots_W) % max(self.size, 1)

    def append(self, k_BHTK: Tensor, v_BHTV: Tensor, start: Position) -> None:
        """Add T tokens, the first of which stands at `start`; the oldest are overwritten."""
        batch, heads, time, _ = k_BHTK.shape
        count = min(time, self.size)
        if count == 0:
            return
        positions_BT = positions_of(start + (time - count), batch, count, k_BHTK.device)
        slots_BHT1 = (positions_BT % self.size)[:, None, :, None].expand(-1, heads, -1, -1)
        for ring, new in ((self.k_BHWK, k_BHTK), (self.v_BHWV, v_BHTV)):
            index = slots_BHT1.expand(-1, -1, -1, ring.shape[-1])
            ring.scatter_(2, index, new[:, :, time - count :].to(ring.dtype))

    def select(self, index_B: Tensor) -> None:
        """Keep the sequences `index_B`, in that order."""
        self.k_BHWK, self.v_BHWV = self.k_BHWK[index_B], self.v_BHWV[index_B]

    @classmethod
    def join(cls, parts: Sequence[RecentTokens]) -> RecentTokens:
        """One ring for the sequences of all `parts`, in order."""
        joined = cls.__new__(cls)
        joined.size = parts[0].size
        joined.k_BHWK = torch.cat([part.k_BHWK for part in parts])
        joined.v_BHWV = torch.cat([part.v_BHWV for part in parts])
        return joined

    def tensors(self) -> list[Tensor]:
        """The tensors held."""
        return [self.k_BHWK, self.v_BHWV]
