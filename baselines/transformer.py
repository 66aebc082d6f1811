"""Full causal attention with rotary positions: the upper end of the memory axis.

Equations: scaled dot-product attention (Vaswani et al. 2017, arXiv 1706.03762) with rotary
positions (arXiv 2104.09864), no biases. Deviation: none.
"""

from __future__ import annotations

import contextlib
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ham.cache import BLOCK_TOKENS, DenseKVCache, grown_tokens
from ham.config import PositiveFloat
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


class TransformerOptions(MixerOptions):
    """Options of full attention.

    Attributes:
        rope_base: Base of the rotary frequencies.
    """

    rope_base: PositiveFloat = 10_000.0


@register_baseline("transformer")
class Transformer(SequenceMixer):
    """Causal multi-head attention over every earlier token."""

    Options: ClassVar[type[MixerOptions]] = TransformerOptions
    title: ClassVar[str] = "Transformer"
    paper: ClassVar[str] = "Vaswani et al. 2017, arXiv 1706.03762"

    def __init__(self, shape: MixerShape, options: TransformerOptions):
        super().__init__(shape, options)
        self.qkv = nn.Linear(shape.width, 3 * shape.width, bias=False)
        self.rotary = RotaryPositions(shape.head_dim, shape.max_positions, options.rope_base)
        self.out = nn.Linear(shape.width, shape.width, bias=False)

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, MixerAux]:
        """Attention within the sequence."""
        q_BTHK, k_BTHK, v_BTHV = self._project(x_BTD, start=0)
        return self._attend(q_BTHK, k_BTHK, v_BTHV), MixerAux()

    def init_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> CacheState:
        """An empty cache."""
        like = torch.empty(0, device=device, dtype=dtype)
        return CacheState(DenseKVCache(batch_size, self.shape.heads, self.shape.head_dim, like))

    def prefill(self, x_BTD: Tensor, state: CacheState) -> tuple[Tensor, MixerAux]:
        """Append T tokens and attend over everything so far."""
        positions = state.cache.positions
        q_BTHK, k_BTHK, v_BTHV = self._project(x_BTD, positions.value)
        query_BT = positions.upcoming(x_BTD.shape[1]) if positions.ragged else None
        keys_BNHK, values_BNHV = state.cache.append(k_BTHK, v_BTHV)
        return self._attend(q_BTHK, keys_BNHK, values_BNHV, query_BT), MixerAux()

    def step(self, x_BD: Tensor, state: CacheState) -> Tensor:
        """Append one token and attend over everything so far."""
        return self.prefill(x_BD[:, None], state)[0][:, 0]

    def forward_flops(self, context: int, kv_fraction: float = 1.0) -> float:
        """Projections and causal attention."""
        return self._projection_flops(context) + self._attention_flops(causal_pairs(context))

    def decode_flops(self, position: int, kv_fraction: float = 1.0) -> float:
        """Projections and one query over `position + 1` keys."""
        return self._projection_flops(1) + self._attention_flops(position + 1)

    def state_bytes(
        self, position: int, kv_fraction: float = 1.0, element_size: int = 2
    ) -> StateBytes:
        """Keys and values of every token."""
        pair = 2 * self.shape.width * element_size
        return StateBytes(kv=position * pair, allocated=grown_tokens(position, BLOCK_TOKENS) * pair)

    def _project(self, x_BTD: Tensor, start: int | Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q_BTHK, k_BTHK, v_BTHV = (
            split_heads(part, self.shape.heads) for part in self.qkv(x_BTD).chunk(3, dim=-1)
        )
        return self.rotary(q_BTHK, start), self.rotary(k_BTHK, start), v_BTHV

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
        varying = contextlib.nullcontext() if whole else for_varying_shapes(q_BTHK.device)
        with varying:
            o_BHTV = F.scaled_dot_product_attention(
                q_BTHK.transpose(1, 2),
                k_BNHK.to(q_BTHK.dtype).transpose(1, 2),
                v_BNHV.to(q_BTHK.dtype).transpose(1, 2),
                attn_mask=mask,
                is_causal=whole and not single,
            )
        return self.out(o_BHTV.transpose(1, 2).flatten(-2))

    def _projection_flops(self, tokens: int) -> float:
        return linear_flops(tokens, self.shape.width, 4 * self.shape.width)

    def _attention_flops(self, pairs: float) -> float:
        head_dim = self.shape.head_dim
        return attention_flops(pairs, self.shape.heads, head_dim, head_dim)
