"""Causal attention over the last tokens only: memory that does not grow.

Equations: full attention with keys restricted to the `window` most recent tokens, the current one
included (Beltagy et al. 2020, arXiv 2004.05150, without global tokens), and with `sinks` to the
first tokens of the sequence too (Xiao et al. 2023, arXiv 2309.17453, "StreamingLLM"). Deviations
from the latter: the model is trained with its sinks, and rotary positions are those of the text,
not those within the cache.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import model_validator
from torch import Tensor, nn

from ham.cache import WindowKVCache
from ham.config import NonNegative, Positive, PositiveFloat
from ham.errors import ConfigError
from ham.measure.cost import attention_flops, linear_flops
from ham.model.blocks import RotaryPositions, split_heads
from ham.model.knob import Knob
from ham.model.mixer import (
    MixerAux,
    MixerOptions,
    MixerShape,
    SequenceMixer,
    StateBytes,
)
from ham.model.registry import register_baseline
from ham.model.states import CacheState
from ham.model.window_attention import (
    prefill_window,
    step_window,
    window_attention,
    window_pairs,
    window_provider,
)


class SlidingWindowOptions(MixerOptions):
    """Options of windowed attention.

    Attributes:
        window: Tokens that a query sees, itself included.
        sinks: First tokens of the sequence that stay visible besides; at most `window`.
        rope_base: Base of the rotary frequencies.
    """

    window: Positive = 128
    sinks: NonNegative = 0
    rope_base: PositiveFloat = 10_000.0

    @model_validator(mode="after")
    def _fewer_sinks_than_window(self) -> SlidingWindowOptions:
        if self.sinks > self.window:
            raise ValueError(
                f"sinks {self.sinks} are more than the window; legal: 0..{self.window} (window)"
            )
        return self

    def check_context(self, context: int) -> None:
        """Refuse a window that the training context never fills."""
        if self.window > context:
            raise ConfigError(
                f"window {self.window} is larger than the context {context}; "
                f"legal: 1..{context} (use mixer 'transformer' for full attention)"
            )
        if self.window + self.sinks > context:
            raise ConfigError(
                f"window {self.window} and sinks {self.sinks} together are more than the context "
                f"{context}; legal: sinks 0..{context - self.window}"
            )


@register_baseline("sliding_window")
class SlidingWindow(SequenceMixer):
    """Causal multi-head attention over a fixed window."""

    Options: ClassVar[type[MixerOptions]] = SlidingWindowOptions
    title: ClassVar[str] = "Sliding window"
    paper: ClassVar[str] = "Beltagy et al. 2020, arXiv 2004.05150"
    small_options: ClassVar[dict[str, Any]] = {"window": 24}
    memory_knobs: ClassVar[tuple[Knob, ...]] = (Knob("window"),)

    def __init__(self, shape: MixerShape, options: SlidingWindowOptions):
        super().__init__(shape, options)
        self.qkv = nn.Linear(shape.width, 3 * shape.width, bias=False)
        self.rotary = RotaryPositions(shape.head_dim, shape.max_positions, options.rope_base)
        self.out = nn.Linear(shape.width, shape.width, bias=False)

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, MixerAux]:
        """Attention within the sequence."""
        options = self.options
        q_BTHK, k_BTHK, v_BTHV = self._project(x_BTD, start=0)
        o_BTHV = window_attention(q_BTHK, k_BTHK, v_BTHV, options.window, options.sinks)
        return self._output(o_BTHV), MixerAux()

    def init_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> CacheState:
        """Slots of the sinks and an empty ring of `window` slots."""
        like = torch.empty(0, device=device, dtype=dtype)
        heads, head_dim, options = self.shape.heads, self.shape.head_dim, self.options
        cache = WindowKVCache(batch_size, options.window, heads, head_dim, like, options.sinks)
        return CacheState(cache)

    def prefill(self, x_BTD: Tensor, state: CacheState) -> tuple[Tensor, MixerAux]:
        """Read T tokens; each attends to the window that ends with it."""
        projected = self._project(x_BTD, state.cache.positions.value)
        return self._output(prefill_window(*projected, state.cache)), MixerAux()

    def step(self, x_BD: Tensor, state: CacheState) -> Tensor:
        """Read one token; the cache then holds exactly the keys it may see."""
        projected = self._project(x_BD[:, None], state.cache.positions.value)
        return self._output(step_window(*projected, state.cache))[:, 0]

    def forward_flops(self, context: int, kv_fraction: float = 1.0) -> float:
        """Projections and banded attention."""
        pairs = window_pairs(context, self.options.window, self.options.sinks)
        return self._projection_flops(context) + self._attention_flops(pairs)

    def decode_flops(self, position: int, kv_fraction: float = 1.0) -> float:
        """Projections and one query over the window and the sinks."""
        seen = min(position + 1, self.options.window + self.options.sinks)
        return self._projection_flops(1) + self._attention_flops(seen)

    def state_bytes(
        self, position: int, kv_fraction: float = 1.0, element_size: int = 2
    ) -> StateBytes:
        """Keys and values of window and sinks; all slots are allocated from the start."""
        pair = 2 * self.shape.width * element_size
        slots = self.options.window + self.options.sinks
        return StateBytes(kv=min(position, slots) * pair, allocated=slots * pair)

    def attention_provider(self, device: torch.device) -> str | None:
        """FlexAttention, where it can run."""
        return window_provider(device, self.shape.head_dim)

    def _project(self, x_BTD: Tensor, start: int | Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q_BTHK, k_BTHK, v_BTHV = (
            split_heads(part, self.shape.heads) for part in self.qkv(x_BTD).chunk(3, dim=-1)
        )
        return self.rotary(q_BTHK, start), self.rotary(k_BTHK, start), v_BTHV

    def _output(self, o_BTHV: Tensor) -> Tensor:
        return self.out(o_BTHV.flatten(-2))

    def _projection_flops(self, tokens: int) -> float:
        return linear_flops(tokens, self.shape.width, 4 * self.shape.width)

    def _attention_flops(self, pairs: float) -> float:
        head_dim = self.shape.head_dim
        return attention_flops(pairs, self.shape.heads, head_dim, head_dim)
