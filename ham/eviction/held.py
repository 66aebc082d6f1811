"""The tokens in a cache, and which of them an eviction leaves.

Letters as in `ham.model.mixer`; G heads of keys and values, C caches of a layer that choose their
tokens apart (1 or G), N slots, M slots that are left.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Count = int | Tensor
"""A number of tokens: the same for all sequences, or int64 `[B]`."""


@dataclass(frozen=True)
class HeldTokens:
    """Tokens of a batch of sequences, in each cache in the order of the text.

    All tensors have their slots on the second axis.

    Attributes:
        k_BNGK, v_BNGV: Keys, positions applied, and values.
        position_BNC: Int32 positions in the text.
        mass_BNC: Attention that each token got since the last eviction, float32 or float64; None
            where the policy does not ask.
    """

    k_BNGK: Tensor
    v_BNGV: Tensor
    position_BNC: Tensor
    mass_BNC: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        """The tensors held."""
        mass = [] if self.mass_BNC is None else [self.mass_BNC]
        return [self.k_BNGK, self.v_BNGV, self.position_BNC, *mass]

    def each(self, change: Callable[[Tensor], Tensor]) -> HeldTokens:
        """The same change made to every tensor."""
        return HeldTokens(*(change(tensor) for tensor in self.tensors()))

    def followed_by(self, new: HeldTokens) -> HeldTokens:
        """Both, one after the other."""
        pairs = zip(self.tensors(), new.tensors(), strict=True)
        return HeldTokens(*(torch.cat(pair, dim=1) for pair in pairs))

    def keep(self, priority_BNC: Tensor, filled: Count, kept: Count, most: int) -> HeldTokens:
        """The tokens of highest priority in each cache, still in the order of the text.

        Args:
            priority_BNC: Larger stays sooner; of equal ones the older.
            filled: Slots in use.
            kept: Tokens that stay; at most `filled`.
            most: The largest of `kept`.

        Returns:
            `most` slots; those beyond `kept` of a sequence hold tokens that left.
        """
        slots_N1 = torch.arange(priority_BNC.shape[1], device=priority_BNC.device)[:, None]
        used = slots_N1 < by_sequence(filled)
        # Slots that nothing stands in come last: the sort is stable.
        ranked_BNC = priority_BNC.masked_fill(~used, -torch.inf)
        rank_BNC = ranked_BNC.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        leaves_BNC = ~(used & (rank_BNC < by_sequence(kept)))
        # Those that stay first, each part in the order it has.
        index_BMC = leaves_BNC.to(torch.uint8).argsort(dim=1, stable=True)[:, :most]
        return self.each(lambda tensor: _gather(tensor, index_BMC))


def by_sequence(count: Count) -> Count:
    """A count that broadcasts against `[B, N, C]`."""
    return count if isinstance(count, int) else count[:, None, None]


def _gather(tensor: Tensor, index_BMC: Tensor) -> Tensor:
    """Slots of `[B, N, C]`, or of `[B, N, G, ...]` whose heads share a cache if C is 1."""
    index = index_BMC.expand(-1, -1, tensor.shape[2])
    if tensor.ndim == 4:
        index = index[..., None].expand(-1, -1, -1, tensor.shape[3])
    return tensor.gather(1, index)
