"""Which tokens stay in the cache of a trained transformer: four rules without a trained part.

At an eviction after n tokens (`ham.eviction.schedule`) every held token j gets a priority and the
b(n) highest stay, of equal ones the older; what left never comes back. All of it depends on tokens
before the eviction alone, so a policy never sees the question that follows a context.

- `random`: hash(seed, layer, j), the same for all heads. The control that the others must beat.
- `streaming`: the first `sinks` tokens, then the most recent (StreamingLLM, Xiao et al. 2023, arXiv
  2309.17453), the same for all heads. Deviations: a token leaves at the next eviction, not at
  once (`interval: 1` does that); rotary positions are those of the text, where the paper uses
  those in the cache to go beyond the trained length.
- `norm`: -|k_j|, for each head of keys (Devoto et al. 2024, arXiv 2406.11430): keys of small norm
  draw much attention. Rotation leaves the norm alone. Deviation: the paper leaves the first two
  layers whole, here `skip_layers` says so, 0 by default, for equal bytes in all layers.
- `snapkv`: max over |i - j| <= kernel / 2 of a_i, where a_i is the attention that the last w
  queries together pay to token i <= n - w; the last w tokens themselves all stay (SnapKV, Li et al.
  2024, arXiv 2404.14469). For each head of keys. w is `observation`; the paper's LongBench runs
  have w = 32 and a kernel of 7. Deviations: the paper evicts once, when the whole prompt is read,
  whose end asks the question; here at every eviction, from what was read by then, and neighbours
  that left before have no part in the maximum. Query heads that share a head of keys add their
  attention, where the paper stores keys once per query head.

Letters as in `ham.eviction.held`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from ham.eviction.held import Count, HeldTokens, by_sequence
from ham.eviction.options import EvictionConfig
from ham.eviction.schedule import Schedule
from ham.routing.controls import EVICTION_STREAM, hash_uniform


class Policy(ABC):
    """One rule in one layer.

    Args:
        options: Budget, interval, and the options of the rule.
        layer: Index of the layer, from 0.
        heads: Heads of keys and values, G.
        seed: Of the training, for rules whose options name none.

    Class attributes:
        per_head: Whether each head of keys chooses for itself.

    Attributes:
        schedule: When the rule is applied, and how many tokens stay.
        caches: Sets of tokens of one sequence, C.
        observation: Queries before an eviction whose attention is added up; 0 for none.
    """

    per_head: ClassVar[bool] = False

    def __init__(self, options: EvictionConfig, layer: int, heads: int, seed: int = 0):
        self.options = options
        self.layer = layer
        self.seed = seed if options.seed is None else options.seed
        self.schedule = Schedule.of_layer(options, layer)
        self.caches = heads if self.per_head else 1
        self.observation = options.observation or 0

    @abstractmethod
    def priority(self, held: HeldTokens, read: Count) -> Tensor:
        """Floating `priority_BNC` after `read` tokens; larger stays sooner."""

    def evict(self, held: HeldTokens, filled: Count, read: Count, kept: list[int]) -> HeldTokens:
        """What stays after `read` tokens.

        Args:
            held: The tokens before the eviction.
            filled: Slots in use.
            read: Tokens read.
            kept: Tokens that stay, of each sequence; or one number for all.

        Returns:
            As many slots as the largest of `kept`.
        """
        most = max(kept)
        same = most == min(kept)
        count = most if same else torch.tensor(kept, device=held.k_BNGK.device)
        return held.keep(self.priority(held, read), filled, count, most)


class RandomEviction(Policy):
    """A hash of seed, layer and position."""

    def priority(self, held: HeldTokens, read: Count) -> Tensor:
        """Uniform in [0, 1)."""
        key = (EVICTION_STREAM, self.seed, self.layer)
        return hash_uniform(key, held.position_BNC.long())


class StreamingEviction(Policy):
    """Sinks, and the most recent tokens."""

    def priority(self, held: HeldTokens, read: Count) -> Tensor:
        """The position; infinite for a sink."""
        sinks_BNC = held.position_BNC < self.options.sinks
        return held.position_BNC.double().masked_fill(sinks_BNC, torch.inf)


class NormEviction(Policy):
    """Keys of small norm."""

    per_head = True

    def priority(self, held: HeldTokens, read: Count) -> Tensor:
        """-|k|."""
        return -wide(held.k_BNGK.detach()).norm(dim=-1)


class SnapKVEviction(Policy):
    """Keys that the last queries attended to, and the tokens of those queries."""

    per_head = True

    def priority(self, held: HeldTokens, read: Count) -> Tensor:
        """Pooled attention; infinite for the last tokens."""
        observed_BNC = held.position_BNC >= by_sequence(read) - self.observation
        mass_BNC = held.mass_BNC.masked_fill(observed_BNC, 0.0)
        pooled_BNC = pool(mass_BNC, held.position_BNC, self.options.kernel // 2)
        return pooled_BNC.masked_fill(observed_BNC, torch.inf)


POLICIES: dict[str, type[Policy]] = {
    "random": RandomEviction,
    "streaming": StreamingEviction,
    "norm": NormEviction,
    "snapkv": SnapKVEviction,
}


def make_policy(options: EvictionConfig, layer: int, heads: int, seed: int = 0) -> Policy:
    """The rule that `options` names, for one layer."""
    return POLICIES[options.policy](options, layer, heads, seed)


def pool(mass_BNC: Tensor, position_BNC: Tensor, reach: int) -> Tensor:
    """Largest mass among the tokens at most `reach` positions away, itself included.

    Tokens stand in the order of the text, so these are at most `reach` slots away.
    """
    pooled_BNC = mass_BNC.clone()
    for shift in range(1, min(reach, mass_BNC.shape[1] - 1) + 1):
        older, newer = slice(None, -shift), slice(shift, None)
        near = position_BNC[:, newer] - position_BNC[:, older] <= reach
        for own, other in ((older, newer), (newer, older)):
            found = mass_BNC[:, other].masked_fill(~near, 0.0)
            pooled_BNC[:, own] = torch.maximum(pooled_BNC[:, own], found)
    return pooled_BNC


def attention_mass(q_BTHK: Tensor, k_BNGK: Tensor, slot_BT: Tensor, observed_BT: Tensor) -> Tensor:
    """Attention that every key gets from the observed queries, `mass_BNG`.

    Args:
        q_BTHK: Queries; head h reads the keys of head h // (H / G).
        k_BNGK: Keys.
        slot_BT: The last slot that each query sees, its own.
        observed_BT: Boolean; which queries count.
    """
    heads = k_BNGK.shape[2]
    q_BTGRK, k_BNGK = wide(q_BTHK.detach()).unflatten(2, (heads, -1)), wide(k_BNGK.detach())
    logits_BGRTN = torch.einsum("btgrk,bngk->bgrtn", q_BTGRK, k_BNGK) * k_BNGK.shape[-1] ** -0.5
    slots_N = torch.arange(k_BNGK.shape[1], device=k_BNGK.device)
    seen_BTN = slots_N <= slot_BT[..., None]
    weight_BGRTN = logits_BGRTN.masked_fill(~seen_BTN[:, None, None], -torch.inf).softmax(-1)
    counted_BGRTN = weight_BGRTN * observed_BT[:, None, None, :, None]
    return counted_BGRTN.sum((2, 3)).transpose(1, 2)


def wide(x: Tensor) -> Tensor:
    """At least float32."""
    return x.float() if x.element_size() < 4 else x
