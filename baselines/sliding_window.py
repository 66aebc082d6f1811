"""Causal attention over the last tokens only: memory that does not grow.

Equations: full attention with keys restricted to the `window` most recent tokens, the current one
included (Beltagy et al. 2020, arXiv 2004.05150, without global tokens). Deviation: none.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ham.cache import WindowKVCache
from ham.config import Positive, PositiveFloat
from ham.errors import ConfigError
from ham.kernels.sdpa import for_varying_shapes
from ham.measure.cost import attention_flops, causal_pairs, linear_flops
from ham.model.blocks import RotaryPositions, split_heads
from ham.model.mixer import (
    MixerAux,
    MixerOptions,
    MixerShape,
    SequenceMixer,
    StateBytes,
)
from ham.model.registry import register_baseline
from ham.model.states import CacheState


class SlidingWindowOptions(MixerOptions):
    """Options of windowed attention.

    Attributes:
        window: Tokens that a query sees, itself included.
        rope_base: Base of the rotary frequencies.
    """

    window: Positive = 128
    rope_base: PositiveFloat = 10_000.0

    def check_context(self, context: int) -> None:
        """Refuse a window that the training context never fills."""
        if self.window > context:
            raise ConfigError(
                f"window {self.window} is larger than the context {context}; "
                f"legal: 1..{context} (use mixer 'transformer' for full attention)"
            )


@register_baseline("sliding_window")
class SlidingWindow(SequenceMixer):
    """Causal multi-head attention over a fixed window."""

    Options: ClassVar[type[MixerOptions]] = SlidingWindowOptions
    title: ClassVar[str] = "Sliding window"
    paper: ClassVar[str] = "Beltagy et al. 2020, arXiv 2004.05150"

    def __init__(self, shape: MixerShape, options: SlidingWindowOptions):
        super().__init__(shape, options)
        self.qkv = nn.Linear(shape.width, 3 * shape.width, bias=False)
        self.rotary = RotaryPositions(shape.head_dim, shape.max_positions, options.rope_base)
        self.out = nn.Linear(shape.width, shape.width, bias=False)

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, MixerAux]:
        """Attention within the sequence."""
        q_BTHK, k_BTHK, v_BTHV = self._project(x_BTD, start=0)
        return self._output(banded_attention(q_BTHK, k_BTHK, v_BTHV, self.options.window)), (
            MixerAux()
        )

    def init_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> CacheState:
        """An empty ring of `window` slots."""
        like = torch.empty(0, device=device, dtype=dtype)
        heads, head_dim = self.shape.heads, self.shape.head_dim
        return CacheState(WindowKVCache(batch_size, self.options.window, heads, head_dim, like))

    def prefill(self, x_BTD: Tensor, state: CacheState) -> tuple[Tensor, MixerAux]:
        """Read T tokens; each attends to the window that ends with it."""
        cache = state.cache
        q_BTHK, k_BTHK, v_BTHV = self._project(x_BTD, cache.positions.value)
        if cache.positions.longest == 0:
            o_BTHV = banded_attention(q_BTHK, k_BTHK, v_BTHV, self.options.window)
        else:
            o_BTHV = self._attend_ring(q_BTHK, k_BTHK, v_BTHV, cache)
        cache.append(k_BTHK, v_BTHV)
        return self._output(o_BTHV), MixerAux()

    def step(self, x_BD: Tensor, state: CacheState) -> Tensor:
        """Read one token; the ring then holds exactly the keys it may see."""
        cache = state.cache
        q_BTHK, k_BTHK, v_BTHV = self._project(x_BD[:, None], cache.positions.value)
        cache.append(k_BTHK, v_BTHV)
        filled = min(cache.positions.longest, self.options.window)
        visible = None
        if cache.positions.shortest < filled:
            visible = (cache.positions_BW()[:, :filled] >= 0)[:, None, None]
        o_BTHV = _attend(q_BTHK, cache.k_BWHK[:, :filled], cache.v_BWHV[:, :filled], visible)
        return self._output(o_BTHV)[:, 0]

    def forward_flops(self, context: int, kv_fraction: float = 1.0) -> float:
        """Projections and banded attention."""
        pairs = causal_pairs(context, self.options.window)
        return self._projection_flops(context) + self._attention_flops(pairs)

    def decode_flops(self, position: int, kv_fraction: float = 1.0) -> float:
        """Projections and one query over the window."""
        seen = min(position + 1, self.options.window)
        return self._projection_flops(1) + self._attention_flops(seen)

    def state_bytes(
        self, position: int, kv_fraction: float = 1.0, element_size: int = 2
    ) -> StateBytes:
        """Keys and values of the window; all slots are allocated from the start."""
        pair = 2 * self.shape.width * element_size
        window = self.options.window
        return StateBytes(kv=min(position, window) * pair, allocated=window * pair)

    def _project(self, x_BTD: Tensor, start: int | Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q_BTHK, k_BTHK, v_BTHV = (
            split_heads(part, self.shape.heads) for part in self.qkv(x_BTD).chunk(3, dim=-1)
        )
        return self.rotary(q_BTHK, start), self.rotary(k_BTHK, start), v_BTHV

    def _attend_ring(
        self, q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, cache: WindowKVCache
    ) -> Tensor:
        """New queries over the ring as it was before them and over the new keys."""
        new_BT = cache.positions.upcoming(q_BTHK.shape[1])
        positions_BN = torch.cat((cache.positions_BW(), new_BT), dim=1)
        age_BTN = new_BT[:, :, None] - positions_BN[:, None]
        in_window_BTN = (age_BTN >= 0) & (age_BTN < self.options.window)
        visible_BTN = in_window_BTN & (positions_BN >= 0)[:, None]
        keys_BNHK = torch.cat((cache.k_BWHK.to(k_BTHK.dtype), k_BTHK), dim=1)
        values_BNHV = torch.cat((cache.v_BWHV.to(v_BTHV.dtype), v_BTHV), dim=1)
        return _attend(q_BTHK, keys_BNHK, values_BNHV, visible_BTN[:, None])

    def _output(self, o_BTHV: Tensor) -> Tensor:
        return self.out(o_BTHV.flatten(-2))

    def _projection_flops(self, tokens: int) -> float:
        return linear_flops(tokens, self.shape.width, 4 * self.shape.width)

    def _attention_flops(self, pairs: float) -> float:
        head_dim = self.shape.head_dim
        return attention_flops(pairs, self.shape.heads, head_dim, head_dim)


def banded_attention(q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, window: int) -> Tensor:
    """Windowed causal attention whose cost grows with T × window, not with T².

    The sequence is cut into blocks of `window` tokens; a block sees itself and the one before.
    Returns `o_BTHV`.
    """
    batch, length = q_BTHK.shape[:2]
    if length <= window:
        return _attend(q_BTHK, k_BTHK, v_BTHV, None, causal=True)
    blocks = -(-length // window)
    pad = blocks * window - length
    q, k, v = (
        F.pad(x, (0, 0, 0, 0, 0, pad)).unflatten(1, (blocks, window))
        for x in (q_BTHK, k_BTHK, v_BTHV)
    )
    k, v = (torch.cat((F.pad(x, (0, 0) * 3 + (1, 0))[:, :-1], x), dim=2) for x in (k, v))
    row = torch.arange(window, device=q.device)[:, None]
    column = torch.arange(2 * window, device=q.device) - window
    band = (column <= row) & (column > row - window)
    first = band & (column >= 0)
    visible = torch.stack((first, *(band,) * (blocks - 1))).repeat(batch, 1, 1)[:, None]
    o = _attend(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), visible)
    return o.unflatten(0, (batch, blocks)).flatten(1, 2)[:, :length]


def _attend(
    q_BTHK: Tensor, k_BNHK: Tensor, v_BNHV: Tensor, visible: Tensor | None, causal: bool = False
) -> Tensor:
    with for_varying_shapes(q_BTHK.device):
        o_BHTV = F.scaled_dot_product_attention(
            q_BTHK.transpose(1, 2),
            k_BNHK.to(q_BTHK.dtype).transpose(1, 2),
            v_BNHV.to(q_BTHK.dtype).transpose(1, 2),
            attn_mask=visible,
            is_causal=causal,
        )
    return o_BHTV.transpose(1, 2)
