"""Full attention whose cache is cut down while it reads: post-hoc eviction.

The weights and the equations are those of the transformer in `transformer.py`; a query sees the
tokens that the evictions so far have left, and those read since. The rules, their papers and the
deviations are in `ham.eviction.policies`, when they act in `ham.eviction.schedule`. An arm with
`checkpoint_of` and `eviction` puts this mixer around the weights of a trained transformer; an arm
with `mixer: transformer_evicted` is trained with it, which no paper does: the choice of tokens
gets no gradient.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from ham.baselines.transformer import Transformer, TransformerOptions
from ham.eviction.cache import EvictingKVCache, EvictingState, new_tokens, observed_from
from ham.eviction.held import HeldTokens
from ham.eviction.options import EvictionConfig
from ham.eviction.policies import attention_mass, make_policy
from ham.model.knob import Knob
from ham.model.mixer import MixerAux, MixerOptions, MixerShape, StateBytes
from ham.model.registry import register_baseline

INT32_BYTES = 4


class TransformerEvictedOptions(TransformerOptions):
    """Options of full attention, and the eviction.

    Attributes:
        eviction: Policy, budget and interval.
    """

    eviction: EvictionConfig = EvictionConfig(policy="streaming", fraction=0.25)


@register_baseline("transformer_evicted")
class TransformerEvicted(Transformer):
    """Causal multi-head attention over the tokens that a policy left in the cache."""

    Options: ClassVar[type[MixerOptions]] = TransformerEvictedOptions
    title: ClassVar[str] = "Transformer with eviction"
    paper: ClassVar[str] = "Li et al. 2024, arXiv 2404.14469 (SnapKV), and others"
    # `ham match` turns the tokens that stay; fewer heads would not fit the weights.
    memory_knobs: ClassVar[tuple[Knob, ...]] = ()
    small_options: ClassVar[dict[str, Any]] = {
        "eviction": {
            "policy": "snapkv",
            "fraction": 0.4,
            "interval": 12,
            "observation": 5,
            "kernel": 3,
        }
    }

    def __init__(self, shape: MixerShape, options: TransformerEvictedOptions):
        super().__init__(shape, options)
        self.policy = make_policy(options.eviction, shape.layer, self.kv_heads, shape.seed)
        self.schedule = self.policy.schedule

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, MixerAux]:
        """Interval by interval, each over what the evictions before it left."""
        q_BTHK, k_BTGK, v_BTGV, _ = self._project(x_BTD, start=0)
        held, outputs = None, []
        for start in range(0, x_BTD.shape[1], self.schedule.interval):
            piece = slice(start, start + self.schedule.interval)
            new = new_tokens(self.policy, k_BTGK[:, piece], v_BTGV[:, piece], start)
            held = new if held is None else held.followed_by(new)
            outputs.append(self._attend(q_BTHK[:, piece], held.k_BNGK, held.v_BNGV))
            if piece.stop < x_BTD.shape[1]:
                held = self._cut(held, q_BTHK[:, piece], piece.stop)
        return torch.cat(outputs, dim=1), MixerAux()

    def init_state(
        self, batch_size: int, device: torch.device, dtype: torch.dtype
    ) -> EvictingState:
        """An empty cache with room for one interval."""
        like = torch.empty(0, device=device, dtype=dtype)
        cache = EvictingKVCache(batch_size, self.kv_heads, self.shape.head_dim, like, self.policy)
        if self.conv is None:
            return EvictingState(cache)
        return EvictingState(cache, self.conv.init_history(batch_size, device, dtype))

    def prefill(self, x_BTD: Tensor, state: EvictingState) -> tuple[Tensor, MixerAux]:
        """Append T tokens and attend; evictions come where the schedule has them."""
        cache, time = state.cache, x_BTD.shape[1]
        q_BTHK, k_BTGK, v_BTGV, state.history_BWC = self._project(
            x_BTD, cache.positions.value, state.history_BWC
        )
        outputs, start = [], 0
        while start < time:
            piece = slice(start, min(time, start + cache.until_eviction()))
            outputs.append(self._read(q_BTHK[:, piece], k_BTGK[:, piece], v_BTGV[:, piece], cache))
            start = piece.stop
        return torch.cat(outputs, dim=1), MixerAux()

    def held_share(self, position: int) -> float:
        """Share of the tokens read that the schedule leaves."""
        return self.schedule.held(position) / position

    def forward_flops(self, context: int, kv_fraction: float = 1.0) -> float:
        """Projections, causal attention, and the scores that the policy computes once more."""
        pairs = self.schedule.pairs(context)
        return self._projection_flops(context) + self._attention_flops(pairs) + self._watch(context)

    def decode_flops(self, position: int, kv_fraction: float = 1.0) -> float:
        """Projections and one query over the tokens held; the policy's scores on the average."""
        attention = self._attention_flops(self.schedule.held(position) + 1)
        watch = self._watch(position + 1) / (position + 1)
        return self._projection_flops(1) + attention + watch

    def state_bytes(
        self, position: int, kv_fraction: float = 1.0, element_size: int = 2
    ) -> StateBytes:
        """Keys and values of the tokens held, their positions, and the attention they got."""
        pair = 2 * self.kv_width * element_size
        mass = (8 if element_size == 8 else 4) if self.policy.observation else 0
        beside = self.policy.caches * (INT32_BYTES + mass)
        conv = max(self.options.short_conv - 1, 0) * self.channels * element_size
        held, slots = self.schedule.held(position), self.schedule.slots(position)
        return StateBytes(
            kv=held * pair,
            positions=held * beside,
            conv=conv,
            allocated=slots * (pair + beside) + conv,
        )

    def _cut(self, held: HeldTokens, q_BTHK: Tensor, read: int) -> HeldTokens:
        """What the eviction after `read` tokens leaves; the queries are those of the interval."""
        kept = self.schedule.held(read)
        filled, time = held.k_BNGK.shape[1], q_BTHK.shape[1]
        if kept == filled:
            return held
        mass_BNG = held.mass_BNC
        if mass_BNG is not None:
            first = observed_from(self.policy, [read - time], time)
            slots_1T = torch.arange(filled - time + first, filled, device=q_BTHK.device)[None]
            everyone_1T = torch.ones_like(slots_1T, dtype=torch.bool)
            mass_BNG = attention_mass(q_BTHK[:, first:], held.k_BNGK, slots_1T, everyone_1T)
        held = HeldTokens(held.k_BNGK, held.v_BNGV, held.position_BNC, mass_BNG)
        return self.policy.evict(held, filled, read, [kept])

    def _read(
        self, q_BTHK: Tensor, k_BTGK: Tensor, v_BTGV: Tensor, cache: EvictingKVCache
    ) -> Tensor:
        """T tokens, no more than until the next eviction."""
        time = q_BTHK.shape[1]
        slots_BT = cache.filled.upcoming(time)
        ragged = cache.filled.ragged
        keys_BNGK, values_BNGV = cache.append(k_BTGK, v_BTGV)
        y_BTD = self._attend(q_BTHK, keys_BNGK, values_BNGV, slots_BT if ragged else None)
        cache.observe(q_BTHK, slots_BT)
        cache.evict(time)
        return y_BTD

    def _watch(self, tokens: int) -> float:
        """FLOPs of the attention weights that the policy looks at."""
        if not self.policy.observation:
            return 0.0
        pairs = self.schedule.pairs(tokens, self.policy.observation)
        return self._attention_flops(pairs) / 2
