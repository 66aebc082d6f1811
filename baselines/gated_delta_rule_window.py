"""The gated delta rule and a sliding window in every layer: HAM that keeps what is recent.

Equations: the synchronous hybrid of Irie et al. 2025 (arXiv 2506.00744, "Blending Complementary
Memory Systems"): a delta rule and softmax attention over the last `window` tokens read the same
q, k and v of every token, the current one included, and gates computed from the input add their
read-outs. It answers whether routing beats recency at equal bytes, so everything else is as in
HAM (`ham.layer`): it is HAM with target 0 and the same window, without the router.

Deviations: the rule is gated (arXiv 2412.06464); q, k and v pass HAM's short convolution; each
branch has its norm before the mix, not one norm after it; two independent gates per head, not one
per dimension; the attention branch norms q and k per head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from ham.cache import WindowKVCache
from ham.config import Positive, PositiveFloat
from ham.errors import ConfigError
from ham.kernels.gated_delta_rule import gated_delta_rule_scored, gated_delta_rule_step
from ham.measure.cost import attention_flops
from ham.model.knob import Knob
from ham.model.mixer import (
    MixerAux,
    MixerOptions,
    MixerState,
    StateBytes,
)
from ham.model.registry import register_baseline
from ham.model.two_memories import TwoMemories
from ham.model.window_attention import (
    prefill_window,
    step_window,
    window_attention,
    window_pairs,
    window_provider,
)


class GatedDeltaRuleWindowOptions(MixerOptions):
    """Options of the gated delta rule with a window.

    Attributes:
        window: Tokens that a query of the attention branch sees, itself included.
        rope: Rotary positions on the attention branch.
        rope_base: Base of their frequencies.
        conv_size: Width of the short convolution on q, k and v.
    """

    window: Positive = 64
    rope: bool = True
    rope_base: PositiveFloat = 10_000.0
    conv_size: Positive = 4

    def check_context(self, context: int) -> None:
        """Refuse a window that the training context never fills."""
        if self.window > context:
            raise ConfigError(
                f"window {self.window} is larger than the context {context}; legal: 1..{context}"
            )


@dataclass
class RecurrentWindowState(MixerState):
    """Recurrent state of every token, convolution inputs, and the last tokens in a ring."""

    recurrent_BHKV: Tensor
    history_BWC: Tensor
    cache: WindowKVCache

    def tensors(self) -> dict[str, list[Tensor]]:
        """All tensors held, by kind."""
        return {
            "kv": self.cache.tensors(),
            "recurrent": [self.recurrent_BHKV],
            "conv": [self.history_BWC],
        }

    def select(self, index_B: Tensor) -> None:
        """Keep the sequences `index_B`, in that order."""
        self.recurrent_BHKV = self.recurrent_BHKV[index_B]
        self.history_BWC = self.history_BWC[index_B]
        self.cache.select(index_B)

    @classmethod
    def join(cls, states: Sequence[Self]) -> Self:
        """One memory of all sequences of `states`."""
        return cls(
            torch.cat([state.recurrent_BHKV for state in states]),
            torch.cat([state.history_BWC for state in states]),
            WindowKVCache.join([state.cache for state in states]),
        )


@register_baseline("gated_delta_rule_window")
class GatedDeltaRuleWindow(TwoMemories):
    """Gated delta rule and sliding-window attention on shared projections."""

    Options: ClassVar[type[MixerOptions]] = GatedDeltaRuleWindowOptions
    title: ClassVar[str] = "Gated delta rule + window"
    paper: ClassVar[str] = "Irie et al. 2025, arXiv 2506.00744"
    operations: ClassVar[tuple[str, ...]] = ("gated_delta_rule",)
    small_options: ClassVar[dict[str, Any]] = {"window": 24}
    memory_knobs: ClassVar[tuple[Knob, ...]] = (Knob("window"),)

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, MixerAux]:
        """Both branches over a sequence from empty memories."""
        projected = self._project(x_BTD)
        memory = gated_delta_rule_scored(
            *projected.recurrent, score=None, provider=self.shape.kernels
        )
        attended_BTHV = window_attention(*projected.attention, self.options.window)
        return self._combine(x_BTD, memory.o_BTHV, attended_BTHV), MixerAux()

    def init_state(
        self, batch_size: int, device: torch.device, dtype: torch.dtype
    ) -> RecurrentWindowState:
        """A zero state and an empty ring of `window` slots."""
        heads, head_dim = self.shape.heads, self.shape.head_dim
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        like = torch.empty(0, device=device, dtype=dtype)
        return RecurrentWindowState(
            torch.zeros(batch_size, heads, head_dim, head_dim, device=device, dtype=wide),
            self.conv.init_history(batch_size, device, dtype),
            WindowKVCache(batch_size, self.options.window, heads, head_dim, like),
        )

    def prefill(self, x_BTD: Tensor, state: RecurrentWindowState) -> tuple[Tensor, MixerAux]:
        """Continue from `state` with T tokens."""
        projected = self._project(x_BTD, state.history_BWC, state.cache.positions.value)
        memory = gated_delta_rule_scored(
            *projected.recurrent,
            score=None,
            initial_state_BHKV=state.recurrent_BHKV,
            provider=self.shape.kernels,
        )
        state.recurrent_BHKV = memory.final_state_BHKV
        state.history_BWC = projected.history_BWC
        attended_BTHV = prefill_window(*projected.attention, state.cache)
        return self._combine(x_BTD, memory.o_BTHV, attended_BTHV), MixerAux()

    def step(self, x_BD: Tensor, state: RecurrentWindowState) -> Tensor:
        """Continue from `state` with one token."""
        x_BTD = x_BD[:, None]
        projected = self._project(x_BTD, state.history_BWC, state.cache.positions.value)
        o_BHV, state.recurrent_BHKV, _ = gated_delta_rule_step(
            *(part[:, 0] for part in projected.recurrent), state.recurrent_BHKV
        )
        state.history_BWC = projected.history_BWC
        attended_BTHV = step_window(*projected.attention, state.cache)
        return self._combine(x_BTD, o_BHV[:, None], attended_BTHV)[:, 0]

    def forward_flops(self, context: int, kv_fraction: float = 1.0) -> float:
        """Linear in the context once the window is full."""
        pairs = window_pairs(context, self.options.window)
        return self._token_flops(context) + self._attention_flops(pairs)

    def decode_flops(self, position: int, kv_fraction: float = 1.0) -> float:
        """One token of both branches, its query over the window."""
        seen = min(position + 1, self.options.window)
        return self._token_flops(1) + self._attention_flops(seen)

    def state_bytes(
        self, position: int, kv_fraction: float = 1.0, element_size: int = 2
    ) -> StateBytes:
        """The state, and keys and values of the window; all is allocated from the start."""
        width, window = self.shape.width, self.options.window
        recurrent, conv = self._recurrent_and_conv_bytes(element_size)
        pair = 2 * width * element_size
        return StateBytes(
            kv=min(position, window) * pair,
            recurrent=recurrent,
            conv=conv,
            allocated=window * pair + recurrent + conv,
        )

    def attention_provider(self, device: torch.device) -> str | None:
        """FlexAttention, where it can run."""
        return window_provider(device, self.shape.head_dim)

    def _attention_flops(self, pairs: float) -> float:
        head_dim = self.shape.head_dim
        return attention_flops(pairs, self.shape.heads, head_dim, head_dim)
