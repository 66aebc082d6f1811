"""The decoding memory of a transformer whose cache is cut down again and again.

Slots are allocated for what the last eviction left and for one interval, so that tokens are added
in place. Sequences may stand at different positions: each is cut when its own schedule says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from ham.eviction.held import HeldTokens
from ham.eviction.policies import Policy, attention_mass
from ham.model.positions import Positions, span
from ham.model.states import CacheState


class EvictingKVCache:
    """Keys and values of the tokens that a policy left.

    Attributes:
        policy: Which tokens stay, and when.
        slots: All slots; those not in use hold finite numbers that no query sees, and a mass of 0.
        positions: Tokens read of each sequence.
        filled: Slots in use of each sequence.
    """

    def __init__(self, batch: int, heads: int, head_dim: int, like: Tensor, policy: Policy):
        self.policy = policy
        self.positions = Positions.zeros(batch, like.device)
        self.filled = Positions.zeros(batch, like.device)
        pair = like.new_zeros(batch, policy.schedule.slots(0), heads, head_dim)
        self.slots = new_tokens(policy, pair, pair.clone(), 0)

    @classmethod
    def join(cls, caches: Sequence[Self]) -> Self:
        """One cache of all sequences of `caches`, whose policy is the same."""
        joined = cls.__new__(cls)
        joined.policy = caches[0].policy
        joined.positions = Positions.join([cache.positions for cache in caches])
        joined.filled = Positions.join([cache.filled for cache in caches])
        parts = zip(*(cache._resized(joined._room()).tensors() for cache in caches), strict=True)
        joined.slots = HeldTokens(*(torch.cat(part) for part in parts))
        return joined

    def select(self, index_B: Tensor) -> None:
        """Keep the sequences `index_B`, in that order; slots that none of them needs are freed."""
        self.positions.select(index_B)
        self.filled.select(index_B)
        self.slots = self._resized(self._room()).each(lambda tensor: tensor[index_B])

    def until_eviction(self) -> int:
        """Tokens that can be read before the first eviction of any sequence."""
        return min(map(self.policy.schedule.until_eviction, self.positions.lengths))

    def append(self, k_BTGK: Tensor, v_BTGV: Tensor) -> tuple[Tensor, Tensor]:
        """Add T tokens, at most `until_eviction()`; views of all keys and values in use.

        The views reach to the end of the fullest sequence. `evict` must follow.
        """
        new = new_tokens(self.policy, k_BTGK, v_BTGV, self.positions.value)
        slots_BT = self.filled.upcoming(k_BTGK.shape[1])
        for buffer, tensor in zip(self.slots.tensors(), new.tensors(), strict=True):
            if self.filled.ragged:
                rows_B1 = torch.arange(buffer.shape[0], device=buffer.device)[:, None]
                buffer[rows_B1, slots_BT] = tensor.to(buffer.dtype)
            else:
                begin = self.filled.longest
                buffer[:, begin : begin + tensor.shape[1]] = tensor
        self.filled.advance(k_BTGK.shape[1])
        used = self._used()
        return used.k_BNGK, used.v_BNGV

    def observe(self, q_BTHK: Tensor, slots_BT: Tensor) -> None:
        """Add up the attention of those of T queries whose tokens were just added and count.

        Args:
            q_BTHK: Queries.
            slots_BT: The slots of their tokens, `[1, T]` where they are the same for all.
        """
        policy, time = self.policy, q_BTHK.shape[1]
        first = observed_from(policy, self.positions.lengths, time)
        if first == time:
            return
        used = self._used()
        phase_BT = self.positions.upcoming(time)[:, first:] % policy.schedule.interval
        observed_BT = phase_BT >= policy.schedule.interval - policy.observation
        used.mass_BNC.add_(
            attention_mass(q_BTHK[:, first:], used.k_BNGK, slots_BT[:, first:], observed_BT)
        )

    def evict(self, tokens: int) -> None:
        """Count the T tokens that were added as read, and cut the sequences that are due."""
        self.positions.advance(tokens)
        schedule, lengths = self.policy.schedule, self.positions.lengths
        due = [length % schedule.interval == 0 for length in lengths]
        if not any(due):
            return
        held = self._used()
        kept = [schedule.held(length) for length in lengths]
        if kept != self.filled.lengths:
            held = self.policy.evict(held, self.filled.value, self.positions.value, kept)
            self.filled = Positions(kept, held.k_BNGK.device)
        if held.mass_BNC is not None:
            due_B11 = torch.tensor(due, device=held.mass_BNC.device)[:, None, None]
            mass_BNC = held.mass_BNC.masked_fill(due_B11, 0.0)
            held = HeldTokens(held.k_BNGK, held.v_BNGV, held.position_BNC, mass_BNC)
        self.slots = held
        self.slots = self._resized(self._room())

    def _used(self) -> HeldTokens:
        return self.slots.each(lambda tensor: tensor[:, : self.filled.longest])

    def _room(self) -> int:
        return max(map(self.policy.schedule.slots, self.positions.lengths), default=0)

    def _resized(self, slots: int) -> HeldTokens:
        """All slots as new tensors, cut or filled up with zeros."""

        def resized(tensor: Tensor) -> Tensor:
            missing = slots - tensor.shape[1]
            return F.pad(tensor, (0, 0) * (tensor.ndim - 2) + (0, missing))

        return self.slots.each(resized)


class EvictingState(CacheState):
    """The cache, and the inputs that a short convolution still needs if there is one."""

    cache: EvictingKVCache

    def tensors(self) -> dict[str, list[Tensor]]:
        """All tensors held, by kind; the attention added up counts with the positions."""
        keys, values, *beside = self.cache.slots.tensors()
        conv = {} if self.history_BWC is None else {"conv": [self.history_BWC]}
        return {"kv": [keys, values], "positions": beside, **conv}

    def kept_B(self) -> Tensor:
        """Tokens in the cache of each sequence; float32."""
        return self.cache.filled.tensor_B.float()


def new_tokens(policy: Policy, k_BTGK: Tensor, v_BTGV: Tensor, start: int | Tensor) -> HeldTokens:
    """T tokens from position `start` on, in the layout of the caches of `policy`."""
    batch, time = k_BTGK.shape[:2]
    position_BT = span(start, time, k_BTGK.device).to(torch.int32)
    position_BTC = position_BT[..., None].expand(batch, -1, policy.caches).contiguous()
    mass_BTC = None
    if policy.observation:
        kind = torch.float64 if k_BTGK.dtype == torch.float64 else torch.float32
        mass_BTC = torch.zeros_like(position_BTC, dtype=kind)
    return HeldTokens(k_BTGK, v_BTGV, position_BTC, mass_BTC)


def observed_from(policy: Policy, read: Sequence[int], time: int) -> int:
    """The first of `time` queries that counts in any sequence after `read` tokens; `time` if none.

    The queries reach no further than the next eviction.
    """
    if not policy.observation:
        return time
    interval = policy.schedule.interval
    return min(time, *(max(0, interval - policy.observation - n % interval) for n in read))
