"""A cache of fixed size that holds the largest scores so far (HOLA, arXiv 2607.02303).

At time t the cache holds the `slots` largest scores among the tokens 1..t, of equal scores the
older ones. A token leaves when `slots` others beat it, and never comes back. Letters beyond those
of `ham.stores.attention`: S slots, C tokens of a piece, N = S + C candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from ham.measure.cost import causal_pairs
from ham.model.mixer import StateBytes
from ham.stores.attention import (
    QUERY_BLOCK,
    Position,
    Stretch,
    by_head,
    gather_tokens,
    like_score,
    positions_of,
    routed_values,
)
from ham.stores.base import INT32_BYTES, KVFraction, StoreCache, TokenStore
from ham.stores.recent import RecentTokens


@dataclass(frozen=True)
class Held:
    """Tokens in a bounded cache, in no particular order.

    Attributes:
        k_BHSK, v_BHSV: Keys and values.
        score_BGS: Float32 or float64; -inf in an empty slot.
        position_BGS: Int32; -1 in an empty slot.
    """

    k_BHSK: Tensor
    v_BHSV: Tensor
    score_BGS: Tensor
    position_BGS: Tensor

    def tensors(self) -> tuple[Tensor, ...]:
        """The four tensors, batch first."""
        return (self.k_BHSK, self.v_BHSV, self.score_BGS, self.position_BGS)

    def followed_by(self, other: Held) -> Held:
        """Both, side by side."""
        k, v, score, position = zip(self.tensors(), other.tensors(), strict=True)
        return Held(torch.cat(k, 2), torch.cat(v, 2), torch.cat(score, 2), torch.cat(position, 2))

    def order(self) -> Tensor:
        """Slots by falling score, of equal scores the older first, `[B, G, S]`."""
        # Two stable sorts: by age, then by score without disturbing the ages of equal scores.
        by_age_BGS = self.position_BGS.argsort(dim=-1, stable=True)
        score_BGS = self.score_BGS.gather(-1, by_age_BGS)
        return by_age_BGS.gather(-1, score_BGS.argsort(dim=-1, descending=True, stable=True))

    def best(self, slots: int) -> Held:
        """The first `slots` tokens of that order."""
        index_BGS = self.order()[..., :slots]
        return Held(
            gather_tokens(self.k_BHSK, index_BGS),
            gather_tokens(self.v_BHSV, index_BGS),
            self.score_BGS.gather(-1, index_BGS),
            self.position_BGS.gather(-1, index_BGS),
        )


@dataclass
class BoundedCache(StoreCache):
    """The tokens held, and a ring for the window."""

    held: Held
    recent: RecentTokens

    def tensors(self) -> dict[str, list[Tensor]]:
        """All tensors held, by kind; the scores count with the positions."""
        return {
            "kv": [self.held.k_BHSK, self.held.v_BHSV, *self.recent.tensors()],
            "positions": [self.held.position_BGS, self.held.score_BGS],
        }

    def kept_B(self) -> Tensor:
        """Tokens in the cache of each sequence; float32, mean over heads."""
        return (self.held.score_BGS > -torch.inf).sum(-1).float().mean(-1)

    def select(self, index_B: Tensor) -> None:
        """Keep the sequences `index_B`, in that order."""
        self.held = Held(*(tensor[index_B] for tensor in self.held.tensors()))
        self.recent.select(index_B)

    @classmethod
    def join(cls, caches: Sequence[Self]) -> Self:
        """One cache for the sequences of all `caches`, in order."""
        parts = zip(*(cache.held.tensors() for cache in caches), strict=True)
        recent = RecentTokens.join([cache.recent for cache in caches])
        return cls(Held(*(torch.cat(part) for part in parts)), recent)


class BoundedStore(TokenStore):
    """Visible are the `slots` largest scores so far, the window and the sink.

    `kept` marks the tokens that enter the cache when they are read, whether or not they are
    evicted later.
    """

    def attend(
        self,
        q_BTHK: Tensor,
        k_BTHK: Tensor,
        v_BTHV: Tensor,
        score: Tensor,
        routed: Tensor | None,
        router_score: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Read a whole sequence from an empty memory, piece by piece: linear in its length."""
        cache = self._empty(q_BTHK.shape[0], v_BTHV, by_head(score).dtype, slots=0)
        return self._read(q_BTHK, k_BTHK, v_BTHV, score, cache, 0, router_score)

    def init_cache(self, batch: int, device: torch.device, dtype: torch.dtype) -> BoundedCache:
        """Empty slots; all are allocated from the start."""
        like = torch.empty(0, device=device, dtype=dtype)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return self._empty(batch, like, wide, self.options.slots)

    def attend_cached(
        self,
        q_BTHK: Tensor,
        k_BTHK: Tensor,
        v_BTHV: Tensor,
        score: Tensor,
        routed: Tensor | None,
        cache: BoundedCache,
        position: Position,
    ) -> tuple[Tensor, Tensor]:
        """Continue from `cache` with T tokens."""
        if q_BTHK.shape[1] == 1:
            return self._step(q_BTHK, k_BTHK, v_BTHV, score, cache, position)
        return self._read(q_BTHK, k_BTHK, v_BTHV, score, cache, position)

    def state_bytes(
        self, position: int, kv_fraction: KVFraction = 1.0, element_size: int = 2
    ) -> StateBytes:
        """All slots are allocated from the start; `kv_fraction` plays no part."""
        pair = self._pair_bytes(element_size)
        slots, ring = self.options.slots, self.ring_size
        beside = self.groups * (INT32_BYTES + (8 if element_size == 8 else 4))
        return StateBytes(
            kv=(min(position, slots) + min(position, ring)) * pair,
            positions=min(position, slots) * beside,
            allocated=slots * (pair + beside) + ring * pair,
        )

    def memory_pairs(self, tokens: int, kv_fraction: float) -> float:
        """As if no token of the cache lay in the window: an upper bound."""
        outside = max(tokens - self.window, 0)
        return causal_pairs(outside, self.options.slots)

    def memory_keys(self, position: int, kv_fraction: float) -> float:
        """As if no token of the cache lay in the window: an upper bound."""
        return min(max(position + 1 - self.window, 0), self.options.slots)

    def _empty(self, batch: int, like: Tensor, wide: torch.dtype, slots: int) -> BoundedCache:
        shape = (batch, self.heads, slots, self.head_dim)
        scores = like.new_full((batch, self.groups, slots), -torch.inf, dtype=wide)
        held = Held(
            like.new_zeros(shape),
            like.new_zeros(shape),
            scores,
            torch.full_like(scores, -1, dtype=torch.int32),
        )
        return BoundedCache(held, self._init_recent(batch, like))

    def _candidates(
        self, k_BTHK: Tensor, v_BTHV: Tensor, score: Tensor, positions_BT: Tensor, cache: Held
    ) -> Held:
        """A piece of text in the layout and the dtypes of the cache."""
        score_BGT = by_head(score).to(cache.score_BGS.dtype).expand(-1, self.groups, -1)
        return Held(
            k_BTHK.transpose(1, 2).to(cache.k_BHSK.dtype),
            v_BTHV.transpose(1, 2).to(cache.v_BHSV.dtype),
            score_BGT,
            positions_BT.to(torch.int32)[:, None].expand_as(score_BGT),
        )

    def _read(
        self,
        q_BTHK: Tensor,
        k_BTHK: Tensor,
        v_BTHV: Tensor,
        score: Tensor,
        cache: BoundedCache,
        position: Position,
        router_score: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Piece by piece; within a piece the candidates are ranked token by token under a mask."""
        path_BTHV = routed_values(v_BTHV, router_score)
        outputs, masks = [], []
        for first in range(0, q_BTHK.shape[1], QUERY_BLOCK):
            piece = slice(first, first + QUERY_BLOCK)
            start = position + first
            q_BHCK, k_BHCK, v_BHCV = (x[:, piece].transpose(1, 2) for x in (q_BTHK, k_BTHK, v_BTHV))
            positions_BC = positions_of(start, q_BHCK.shape[0], q_BHCK.shape[2], q_BHCK.device)
            new = self._candidates(
                k_BTHK[:, piece], path_BTHV[:, piece], score[:, piece], positions_BC, cache.held
            )
            visible_BGCN = ranked_visibility(cache.held, new, self.options.slots)
            # The new tokens are the last candidates: the diagonal says which of them got in.
            masks.append(
                visible_BGCN[..., cache.held.score_BGS.shape[-1] :].diagonal(dim1=-2, dim2=-1)
            )
            candidates = cache.held.followed_by(new)
            memory = self._memory_stretch(candidates, visible_BGCN, positions_BC)
            o_BHCV = self._attend(q_BHCK, memory, cache.recent, k_BHCK, v_BHCV, start, positions_BC)
            outputs.append(o_BHCV.transpose(1, 2))
            cache.held = candidates.best(self.options.slots)
            if self.ring_size:
                cache.recent = self._advanced(cache.recent, k_BHCK, v_BHCV, start)
        return torch.cat(outputs, 1).to(v_BTHV.dtype), like_score(torch.cat(masks, -1), score)

    def _step(
        self,
        q_B1HK: Tensor,
        k_B1HK: Tensor,
        v_B1HV: Tensor,
        score: Tensor,
        cache: BoundedCache,
        position: Position,
    ) -> tuple[Tensor, Tensor]:
        """One token: it takes the place of the smallest score if it beats that, in place."""
        positions_B1 = positions_of(position, q_B1HK.shape[0], 1, q_B1HK.device)
        new = self._candidates(k_B1HK, v_B1HV, score, positions_B1, cache.held)
        kept_BG1 = replace_smallest(cache.held, new)
        visible_BG1S = (cache.held.score_BGS > -torch.inf)[:, :, None]
        memory = self._memory_stretch(cache.held, visible_BG1S, positions_B1)
        q_BH1K, k_BH1K, v_BH1V = (x.transpose(1, 2) for x in (q_B1HK, k_B1HK, v_B1HV))
        o_BH1V = self._attend(q_BH1K, memory, cache.recent, k_BH1K, v_BH1V, position, positions_B1)
        if self.ring_size:
            cache.recent.append(k_BH1K, v_BH1V, position)
        return o_BH1V.transpose(1, 2).to(v_B1HV.dtype), like_score(kept_BG1, score)

    def _memory_stretch(self, held: Held, visible_BGTN: Tensor, positions_BT: Tensor) -> Stretch:
        if self.window:
            # A token inside the window is read there, once.
            newest_BT = positions_BT - self.window
            outside_BGTN = held.position_BGS[:, :, None] <= newest_BT[:, None, :, None]
            visible_BGTN = visible_BGTN & outside_BGTN
        return Stretch(held.k_BHSK, held.v_BHSV, visible_BGTN)

    @staticmethod
    def _advanced(
        recent: RecentTokens, k_BHCK: Tensor, v_BHCV: Tensor, start: Position
    ) -> RecentTokens:
        """The ring with a piece added, as new tensors: autograd still needs the old ones."""
        advanced = RecentTokens.join([recent])
        advanced.append(k_BHCK, v_BHCV, start)
        return advanced


def ranked_visibility(held: Held, new: Held, slots: int) -> Tensor:
    """Which of the held and the new tokens the cache holds as each new one is read.

    Tokens evicted before the piece need not be counted: whatever they beat, `slots` held tokens
    beat as well.

    Args:
        held: The cache before the piece.
        new: The C tokens of the piece.
        slots: Size of the cache.

    Returns:
        Boolean `[B, G, C, N]`; after token c of the piece, candidate n is in the cache.
    """
    old_BGS, new_BGC = held.score_BGS, new.score_BGS
    piece, device = new_BGC.shape[-1], new_BGC.device
    both_BGN = torch.cat((old_BGS, new_BGC), -1)
    # Beaten at the start of the piece: by what stands before it in the order; a new token is
    # younger than all that are held, so that equal scores beat it. Empty slots come last.
    rank_BGS = held.order().argsort(dim=-1).to(torch.int32)
    rank_BGC = (old_BGS[..., :, None] >= new_BGC[..., None, :]).sum(-2, dtype=torch.int32)
    # Beaten since then: by a larger score, or an equal one of an older token of the piece.
    above_BGCN = new_BGC[..., :, None] > both_BGN[..., None, :]
    equal_BGCC = new_BGC[..., :, None] == new_BGC[..., None, :]
    order_C = torch.arange(piece, device=device)
    younger_CC = order_C[:, None] < order_C
    above_BGCN[..., old_BGS.shape[-1] :] |= equal_BGCC & younger_CC
    rank_BGCN = above_BGCN.cumsum(-2, dtype=torch.int32)
    rank_BGCN += torch.cat((rank_BGS, rank_BGC), -1)[..., None, :]
    arrived_CN = torch.ones(piece, both_BGN.shape[-1], dtype=torch.bool, device=device)
    arrived_CN[:, old_BGS.shape[-1] :] = ~younger_CC
    return (rank_BGCN < slots) & arrived_CN & (both_BGN > -torch.inf)[..., None, :]


def replace_smallest(held: Held, new: Held) -> Tensor:
    """Put one new token per sequence where the smallest score was, if it beats that, in place.

    Of equal smallest scores the youngest goes. Waits for nothing on the device.

    Returns:
        Boolean `[B, G, 1]`; the new token got in.
    """
    smallest_BG1 = held.score_BGS.amin(-1, keepdim=True)
    is_smallest_BGS = held.score_BGS == smallest_BG1
    slot_BG1 = held.position_BGS.masked_fill(~is_smallest_BGS, -2).argmax(-1, keepdim=True)
    enters_BG1 = new.score_BGS > smallest_BG1
    heads = held.k_BHSK.shape[1]
    for old, fresh in zip(held.tensors(), new.tensors(), strict=True):
        slot, enters = slot_BG1, enters_BG1
        if old.ndim == 4:
            slot = slot_BG1.expand(-1, heads, -1)[..., None].expand(-1, -1, -1, old.shape[-1])
            enters = enters_BG1[..., None]
        old.scatter_(2, slot, torch.where(enters, fresh, old.gather(2, slot)))
    return enters_BG1
