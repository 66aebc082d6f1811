"""A cache that takes the largest scores of every finished chunk (B'MOJO, arXiv 2407.06324).

When a chunk of `chunk` tokens ends, its `top_k` largest scores enter the cache, of equal scores
the older ones, and are visible from the next chunk on. Letters beyond those of
`ham.stores.attention`: C tokens of a chunk, M finished chunks, N tokens in the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from ham.cache import BLOCK_TOKENS, grown_tokens
from ham.model.mixer import StateBytes
from ham.stores.attention import (
    QUERY_BLOCK,
    Position,
    Stretch,
    attend_stretches,
    by_head,
    gather_tokens,
    like_score,
    positions_of,
    routed_values,
)
from ham.stores.base import INT32_BYTES, KVFraction, StoreCache, TokenStore
from ham.stores.recent import RecentTokens


@dataclass
class ChunkCache(StoreCache):
    """Chosen tokens of finished chunks, the chunk that is being read, and a ring for the window.

    Attributes:
        k_BHNK, v_BHNV: Chosen tokens; they grow by blocks of `BLOCK_TOKENS`.
        position_BGN: Int32; -1 in an unused slot.
        k_BHCK, v_BHCV: The current chunk; slot = position mod chunk.
        score_BGC: Its scores.
        recent: The window.
        lengths: Tokens read by each sequence, known to the host so that growth waits for nothing.
    """

    k_BHNK: Tensor
    v_BHNV: Tensor
    position_BGN: Tensor
    k_BHCK: Tensor
    v_BHCV: Tensor
    score_BGC: Tensor
    recent: RecentTokens
    lengths: list[int]

    def tensors(self) -> dict[str, list[Tensor]]:
        """All tensors held, by kind; scores count with the positions."""
        pending = [self.k_BHCK, self.v_BHCV]
        return {
            "kv": [self.k_BHNK, self.v_BHNV, *pending, *self.recent.tensors()],
            "positions": [self.position_BGN, self.score_BGC],
        }

    def kept_B(self) -> Tensor:
        """Chosen tokens of finished chunks; float32, mean over heads."""
        return (self.position_BGN >= 0).sum(-1).float().mean(-1)

    def select(self, index_B: Tensor) -> None:
        """Keep the sequences `index_B`, in that order."""
        for name in _BATCHED:
            setattr(self, name, getattr(self, name)[index_B])
        self.recent.select(index_B)
        self.lengths = [self.lengths[row] for row in index_B.tolist()]

    @classmethod
    def join(cls, caches: Sequence[Self]) -> Self:
        """One cache for the sequences of all `caches`, in order."""
        slots = max(cache.k_BHNK.shape[2] for cache in caches)
        for cache in caches:
            cache.grow(slots)
        tensors = (torch.cat([getattr(cache, name) for cache in caches]) for name in _BATCHED)
        recent = RecentTokens.join([cache.recent for cache in caches])
        return cls(*tensors, recent, [length for cache in caches for length in cache.lengths])

    def grow(self, slots: int) -> None:
        """Have at least `slots` slots for chosen tokens, in whole blocks."""
        more = grown_tokens(slots, BLOCK_TOKENS) - self.k_BHNK.shape[2]
        if more <= 0:
            return
        for name, fill in (("k_BHNK", 0), ("v_BHNV", 0), ("position_BGN", -1)):
            old = getattr(self, name)
            shape = (*old.shape[:2], more, *old.shape[3:])
            setattr(self, name, torch.cat((old, old.new_full(shape, fill)), 2))


_BATCHED = ("k_BHNK", "v_BHNV", "position_BGN", "k_BHCK", "v_BHCV", "score_BGC")


class ChunkTopKStore(TokenStore):
    """Visible are the chosen tokens of earlier chunks, the window and the sink.

    `kept` marks the chosen tokens of the chunks that end within the text read by one call: the
    choice needs the whole chunk, so tokens of a chunk that a later call ends are marked by none.
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
        """Read a whole sequence from an empty memory, in blocks of queries."""
        q_BHTK, k_BHTK, v_BHTV = (x.transpose(1, 2) for x in (q_BTHK, k_BTHK, v_BTHV))
        path_BHTV = routed_values(v_BTHV, router_score).transpose(1, 2)
        chosen_BGN, valid_BGN = self._chosen(by_head(score))
        keys, values = gather_tokens(k_BHTK, chosen_BGN), gather_tokens(path_BHTV, chosen_BGN)
        outputs = []
        for first in range(0, q_BHTK.shape[2], QUERY_BLOCK):
            q_BHQK = q_BHTK[:, :, first : first + QUERY_BLOCK]
            last = first + q_BHQK.shape[2] - 1
            used = slice(last // self.options.chunk * self.options.top_k)
            query_Q1 = torch.arange(first, last + 1, device=q_BHTK.device)[:, None]
            position_BG1N = chosen_BGN[:, :, None, used]
            begun_Q1 = query_Q1 - query_Q1 % self.options.chunk
            visible_BGQN = valid_BGN[:, :, None, used] & (position_BG1N < begun_Q1)
            visible_BGQN &= position_BG1N <= query_Q1 - self.window
            stretches = [Stretch(keys[:, :, used], values[:, :, used], visible_BGQN)]
            if self.window:
                near = slice(max(first - self.window + 1, 0), last + 1)
                age_QL = query_Q1 - torch.arange(near.start, near.stop, device=q_BHTK.device)
                inside = ((age_QL >= 0) & (age_QL < self.window))[None, None]
                stretches.append(Stretch(k_BHTK[:, :, near], v_BHTV[:, :, near], inside))
            outputs.append(attend_stretches(q_BHQK, stretches, self._sink_BHK()))
        kept_BGT = torch.zeros_like(by_head(score), dtype=torch.bool)
        kept_BGT.scatter_(2, chosen_BGN, valid_BGN)
        return torch.cat(outputs, 2).transpose(1, 2), like_score(kept_BGT, score)

    def init_cache(self, batch: int, device: torch.device, dtype: torch.dtype) -> ChunkCache:
        """No chosen token, and room for one chunk."""
        like = torch.empty(0, device=device, dtype=dtype)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        chunk = (batch, self.heads, self.options.chunk, self.head_dim)
        none = (batch, self.heads, 0, self.head_dim)
        return ChunkCache(
            like.new_zeros(none),
            like.new_zeros(none),
            like.new_zeros((batch, self.groups, 0), dtype=torch.int32),
            like.new_zeros(chunk),
            like.new_zeros(chunk),
            like.new_zeros((batch, self.groups, self.options.chunk), dtype=wide),
            self._init_recent(batch, like),
            [0] * batch,
        )

    def attend_cached(
        self,
        q_BTHK: Tensor,
        k_BTHK: Tensor,
        v_BTHV: Tensor,
        score: Tensor,
        routed: Tensor | None,
        cache: ChunkCache,
        position: Position,
    ) -> tuple[Tensor, Tensor]:
        """Continue from `cache`, in pieces that end where the chunk of some sequence ends."""
        kept_BGT = torch.zeros_like(by_head(score), dtype=torch.bool)
        outputs, first, time = [], 0, q_BTHK.shape[1]
        while first < time:
            left = min(self.options.chunk - length % self.options.chunk for length in cache.lengths)
            piece = slice(first, min(first + left, time))
            outputs.append(
                self._read_piece(
                    *(x[:, piece].transpose(1, 2) for x in (q_BTHK, k_BTHK, v_BTHV)),
                    by_head(score)[..., piece],
                    cache,
                    position + first,
                )
            )
            first = piece.stop
            cache.lengths = [length + piece.stop - piece.start for length in cache.lengths]
            self._finish_chunks(cache, kept_BGT, first)
        o_BTHV = torch.cat(outputs, 2).transpose(1, 2).to(v_BTHV.dtype)
        return o_BTHV, like_score(kept_BGT, score)

    def state_bytes(
        self, position: int, kv_fraction: KVFraction = 1.0, element_size: int = 2
    ) -> StateBytes:
        """The finished chunks decide; `kv_fraction` plays no part."""
        pair = self._pair_bytes(element_size)
        chunk, ring = self.options.chunk, self.ring_size
        chosen = position // chunk * self.options.top_k
        slots = grown_tokens(chosen, BLOCK_TOKENS)
        score = self.groups * (8 if element_size == 8 else 4)
        place = self.groups * INT32_BYTES
        return StateBytes(
            kv=(chosen + position % chunk + min(position, ring)) * pair,
            positions=chosen * place + position % chunk * score,
            allocated=slots * (pair + place) + chunk * (pair + score) + ring * pair,
        )

    def memory_pairs(self, tokens: int, kv_fraction: float) -> float:
        """As if no chosen token lay in the window: an upper bound."""
        full, rest = divmod(tokens, self.options.chunk)
        return self.options.top_k * (self.options.chunk * full * (full - 1) / 2 + rest * full)

    def memory_keys(self, position: int, kv_fraction: float) -> float:
        """As if no chosen token lay in the window: an upper bound."""
        return position // self.options.chunk * self.options.top_k

    def _chosen(self, score_BGT: Tensor) -> tuple[Tensor, Tensor]:
        """Positions of the `top_k` of each finished chunk, `[B, G, M * top_k]`, and which count.

        A score of -inf does not count, even where a chunk has too few others.
        """
        chunk = self.options.chunk
        finished = score_BGT.shape[-1] // chunk
        score_BGMC = score_BGT[..., : finished * chunk].unflatten(-1, (finished, chunk))
        # A stable sort, because topk picks any of equal scores.
        best = score_BGMC.sort(dim=-1, descending=True, stable=True)
        values, index = (x[..., : self.options.top_k] for x in best)
        offset_M1 = torch.arange(finished, device=score_BGT.device)[:, None] * chunk
        return (index + offset_M1).flatten(2), (values > -torch.inf).flatten(2)

    def _read_piece(
        self,
        q_BHTK: Tensor,
        k_BHTK: Tensor,
        v_BHTV: Tensor,
        score_BGT: Tensor,
        cache: ChunkCache,
        start: Position,
    ) -> Tensor:
        """Tokens of one chunk of each sequence: attend, then note them as pending."""
        batch, heads, time, _ = q_BHTK.shape
        positions_BT = positions_of(start, batch, time, q_BHTK.device)
        place_BG1N = cache.position_BGN[:, :, None]
        newest_B1T1 = (positions_BT - self.window)[:, None, :, None]
        visible = (place_BG1N >= 0) & (place_BG1N <= newest_B1T1)
        memory = Stretch(cache.k_BHNK, cache.v_BHNV, visible)
        o_BHTV = self._attend(q_BHTK, memory, cache.recent, k_BHTK, v_BHTV, start, positions_BT)
        slot_BGT = (positions_BT % self.options.chunk)[:, None].expand(-1, self.groups, -1)
        cache.score_BGC.scatter_(2, slot_BGT, score_BGT.to(cache.score_BGC.dtype))
        slot_BHT1 = (positions_BT % self.options.chunk)[:, None, :, None].expand(-1, heads, -1, 1)
        for pending, new in ((cache.k_BHCK, k_BHTK), (cache.v_BHCV, v_BHTV)):
            index = slot_BHT1.expand(-1, -1, -1, pending.shape[-1])
            pending.scatter_(2, index, new.to(pending.dtype))
        if self.ring_size:
            cache.recent.append(k_BHTK, v_BHTV, start)
        return o_BHTV

    def _finish_chunks(self, cache: ChunkCache, kept_BGT: Tensor, read: int) -> None:
        """Move the best of every chunk that just ended to the cache; marks them in `kept_BGT`.

        Args:
            cache: Holds the pending chunk.
            kept_BGT: Mask over the tokens of the call.
            read: How many of them were read so far.
        """
        chunk, top_k = self.options.chunk, self.options.top_k
        rows = [row for row, length in enumerate(cache.lengths) if length % chunk == 0]
        if not rows:
            return
        cache.grow(max(cache.lengths) // chunk * top_k)
        place, valid = self._chosen(cache.score_BGC[rows])
        keys = gather_tokens(cache.k_BHCK[rows], place)
        values = gather_tokens(cache.v_BHCV[rows], place)
        for number, row in enumerate(rows):
            length = cache.lengths[row]
            slots = slice((length // chunk - 1) * top_k, length // chunk * top_k)
            cache.k_BHNK[row, :, slots] = keys[number]
            cache.v_BHNV[row, :, slots] = values[number]
            position = (place[number] + (length - chunk)).masked_fill(~valid[number], -1)
            cache.position_BGN[row, :, slots] = position.to(torch.int32)
            # Places in this call; what an earlier call read has no place in its mask.
            here_GK = place[number] + (read - chunk)
            marked_GK = valid[number] & (here_GK >= 0)
            mask = torch.zeros_like(kept_BGT[row], dtype=torch.int8)
            mask.scatter_add_(1, here_GK.clamp(min=0), marked_GK.to(torch.int8))
            kept_BGT[row] |= mask.bool()
