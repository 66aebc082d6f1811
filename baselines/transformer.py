"""Full causal attention with rotary positions: the upper end of the memory axis.

Equations: scaled dot-product attention (Vaswani et al. 2017, arXiv 1706.03762) with rotary
positions (arXiv 2104.09864), no biases. Options: grouped queries (Ainslie et al. 2023,
arXiv 2305.13245), where query head h reads key head h // (heads / kv_heads); and the short
convolution of HAM on q, k and v before the rotation, which lets a key hold the tokens just before
its own: a recall device by itself. Deviation: no activation follows that convolution, so that an
arm with it differs from the plain one in reach only.
"""

from __future__ import annotations

import contextlib
from typing import ClassVar

import torch
from torch import Tensor, nn

from ham.cache import BLOCK_TOKENS, DenseKVCache, grown_tokens
from ham.config import NonNegative, Positive, PositiveFloat
from ham.errors import ConfigError
from ham.kernels.sdpa import attention, for_varying_shapes
from ham.measure.cost import attention_flops, causal_pairs, conv_flops, linear_flops
from ham.model.blocks import RotaryPositions, ShortConvolution, split_heads
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


def _shared_evenly(shape: MixerShape) -> list[int]:
    """Numbers of key heads that the query heads can share evenly."""
    return [count for count in range(1, shape.heads + 1) if shape.heads % count == 0]


class TransformerOptions(MixerOptions):
    """Options of full attention.

    Attributes:
        rope_base: Base of the rotary frequencies.
        kv_heads: Heads of keys and values, a divisor of the heads of queries; None for as many.
        short_conv: Width of a short convolution on q, k and v; 0 for none.
    """

    rope_base: PositiveFloat = 10_000.0
    kv_heads: Positive | None = None
    short_conv: NonNegative = 0


@register_baseline("transformer")
class Transformer(SequenceMixer):
    """Causal multi-head attention over every earlier token."""

    Options: ClassVar[type[MixerOptions]] = TransformerOptions
    title: ClassVar[str] = "Transformer"
    paper: ClassVar[str] = "Vaswani et al. 2017, arXiv 1706.03762"
    memory_knobs: ClassVar[tuple[Knob, ...]] = (Knob("kv_heads", choices=_shared_evenly),)

    def __init__(self, shape: MixerShape, options: TransformerOptions):
        super().__init__(shape, options)
        self.kv_heads = options.kv_heads or shape.heads
        if shape.heads % self.kv_heads:
            raise ConfigError(
                f"transformer kv_heads {self.kv_heads} does not divide the {shape.heads} heads"
            )
        self.kv_width = self.kv_heads * shape.head_dim
        self.channels = shape.width + 2 * self.kv_width
        self.qkv = nn.Linear(shape.width, self.channels, bias=False)
        self.conv = (
            ShortConvolution(self.channels, options.short_conv) if options.short_conv else None
        )
        self.rotary = RotaryPositions(shape.head_dim, shape.max_positions, options.rope_base)
        self.out = nn.Linear(shape.width, shape.width, bias=False)

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, MixerAux]:
        """Attention within the sequence."""
        q_BTHK, k_BTHK, v_BTHV, _ = self._project(x_BTD, start=0)
        return self._attend(q_BTHK, k_BTHK, v_BTHV), MixerAux()

    def init_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> CacheState:
        """An empty cache."""
        like = torch.empty(0, device=device, dtype=dtype)
        cache = DenseKVCache(batch_size, self.kv_heads, self.shape.head_dim, like)
        if self.conv is None:
            return CacheState(cache)
        return CacheState(cache, self.conv.init_history(batch_size, device, dtype))

    def prefill(self, x_BTD: Tensor, state: CacheState) -> tuple[Tensor, MixerAux]:
        """Append T tokens and attend over everything so far."""
        positions = state.cache.positions
        q_BTHK, k_BTHK, v_BTHV, state.history_BWC = self._project(
            x_BTD, positions.value, state.history_BWC
        )
        query_BT = positions.upcoming(x_BTD.shape[1]) if positions.ragged else None
        keys_BNHK, values_BNHV = state.cache.append(k_BTHK, v_BTHV)
        return self._attend(q_BTHK, keys_BNHK, values_BNHV, query_BT), MixerAux()

    def step(self, x_BD: Tensor, state: CacheState) -> Tensor:
        """Append one token and attend over everything so far."""
        return self.prefill(x_BD[:, None], state)[0][:, 0]

    def held_share(self, position: int) -> float:
        """Every token is held."""
        return 1.0

    def forward_flops(self, context: int, kv_fraction: float = 1.0) -> float:
        """Projections and causal attention."""
        return self._projection_flops(context) + self._attention_flops(causal_pairs(context))

    def decode_flops(self, position: int, kv_fraction: float = 1.0) -> float:
        """Projections and one query over `position + 1` keys."""
        return self._projection_flops(1) + self._attention_flops(position + 1)

    def state_bytes(
        self, position: int, kv_fraction: float = 1.0, element_size: int = 2
    ) -> StateBytes:
        """Keys and values of every token, and the inputs of the convolution."""
        pair = 2 * self.kv_width * element_size
        conv = max(self.options.short_conv - 1, 0) * self.channels * element_size
        slots = grown_tokens(position, BLOCK_TOKENS)
        return StateBytes(kv=position * pair, conv=conv, allocated=slots * pair + conv)

    def _project(
        self, x_BTD: Tensor, start: int | Tensor, history_BWC: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """q, k, v and the convolution's new history; G of the H heads for k and v."""
        mixed_BTC = self.qkv(x_BTD)
        if self.conv is not None:
            mixed_BTC, history_BWC = self.conv(mixed_BTC, history_BWC)
        widths = (self.shape.width, self.kv_width, self.kv_width)
        q_BTD, k_BTC, v_BTC = mixed_BTC.split(widths, dim=-1)
        q_BTHK = split_heads(q_BTD, self.shape.heads)
        k_BTGK, v_BTGV = (split_heads(part, self.kv_heads) for part in (k_BTC, v_BTC))
        return self.rotary(q_BTHK, start), self.rotary(k_BTGK, start), v_BTGV, history_BWC

    def _attend(
        self, q_BTHK: Tensor, k_BNHK: Tensor, v_BNHV: Tensor, positions_BT: Tensor | None = None
    ) -> Tensor:
        """Causal attention; the last query stands at the last key, unless positions are given."""
        queries, keys = q_BTHK.shape[1], k_BNHK.shape[1]
        ragged = positions_BT is not None
        whole, single = queries == keys and not ragged, queries == 1
        mask = None
        if ragged:
            slots_N = torch.arange(keys, device=q_BTHK.device)
            mask = (slots_N <= positions_BT[..., None])[:, None]
        elif not whole and not single:
            mask = torch.ones(queries, keys, dtype=torch.bool, device=q_BTHK.device)
            mask = mask.tril(keys - queries)
        grouped = self.kv_heads != self.shape.heads
        if grouped and mask is not None:
            # On a GPU no fused kernel takes groups and a mask; the fallback stores every score.
            k_BNHK, v_BNHV = (
                x.repeat_interleave(self.shape.heads // self.kv_heads, dim=2)
                for x in (k_BNHK, v_BNHV)
            )
        varying = contextlib.nullcontext() if whole else for_varying_shapes(q_BTHK.device)
        with varying:
            o_BHTV = attention(
                q_BTHK.transpose(1, 2),
                k_BNHK.to(q_BTHK.dtype).transpose(1, 2),
                v_BNHV.to(q_BTHK.dtype).transpose(1, 2),
                attn_mask=mask,
                is_causal=whole and not single,
                enable_gqa=grouped and mask is None,
            )
        return self.out(o_BHTV.transpose(1, 2).flatten(-2))

    def _projection_flops(self, tokens: int) -> float:
        width = self.shape.width
        conv = conv_flops(tokens, self.channels, self.options.short_conv)
        return linear_flops(tokens, width, self.channels + width) + conv

    def _attention_flops(self, pairs: float) -> float:
        head_dim = self.shape.head_dim
        return attention_flops(pairs, self.shape.heads, head_dim, head_dim)
