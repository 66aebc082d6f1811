"""What layers with a recurrent memory and attention on the same projections share.

HAM and its rivals differ in what the attention branch may read; projections, recurrent branch,
norms and gates are the same, and stand here. Letters as in `ham.model.mixer`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor, nn

from ham.measure.cost import conv_flops, delta_rule_flops, linear_flops
from ham.model.blocks import (
    DecayAndWriteGates,
    RMSNorm,
    RotaryPositions,
    ShortConvolution,
    split_heads,
    unit_vectors,
)
from ham.model.mixer import MixerShape, SequenceMixer


class TwoMemoriesOptions(Protocol):
    """Options that the shared parts read: rotary positions and the width of the convolution."""

    rope: bool
    rope_base: float
    conv_size: int


@dataclass
class Projected:
    """What both branches need of T tokens."""

    recurrent_q_BTHK: Tensor
    recurrent_k_BTHK: Tensor
    attention_q_BTHK: Tensor
    attention_k_BTHK: Tensor
    attention_v_BTHV: Tensor
    v_BTHV: Tensor
    log_decay_BTH: Tensor
    beta_BTH: Tensor
    history_BWC: Tensor

    @property
    def recurrent(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Inputs of the gated delta rule in its order."""
        return (
            self.recurrent_q_BTHK,
            self.recurrent_k_BTHK,
            self.v_BTHV,
            self.log_decay_BTH,
            self.beta_BTH,
        )

    @property
    def attention(self) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of the attention branch."""
        return self.attention_q_BTHK, self.attention_k_BTHK, self.attention_v_BTHV


class TwoMemories(SequenceMixer):
    """Base of mixers with both branches: parts, projections, the gated sum, and their costs.

    Args:
        shape: Where the mixer sits.
        options: Of the mixer; at least `TwoMemoriesOptions`.
    """

    def __init__(self, shape: MixerShape, options: TwoMemoriesOptions):
        super().__init__(shape, options)
        width, heads, head_dim = shape.width, shape.heads, shape.head_dim
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.conv = ShortConvolution(3 * width, options.conv_size)
        self.gates = DecayAndWriteGates(width, heads)
        self.q_norm = RMSNorm(head_dim)
        self.k_norm = RMSNorm(head_dim)
        self.rotary = (
            RotaryPositions(head_dim, shape.max_positions, options.rope_base)
            if options.rope
            else None
        )
        self.recurrent_norm = RMSNorm(head_dim)
        self.attention_norm = RMSNorm(head_dim)
        self.branch_gates = nn.Linear(width, 2 * heads, bias=True)
        nn.init.zeros_(self.branch_gates.bias)
        self.out = nn.Linear(width, width, bias=False)

    def _project(
        self, x_BTD: Tensor, history_BWC: Tensor | None = None, start: int | Tensor = 0
    ) -> Projected:
        mixed_BTC, history_BWC = self.conv(self.qkv(x_BTD), history_BWC)
        q_BTHK, k_BTHK, v_BTHV = (
            split_heads(part, self.shape.heads) for part in mixed_BTC.chunk(3, dim=-1)
        )
        attention_q_BTHK, attention_k_BTHK = self.q_norm(q_BTHK), self.k_norm(k_BTHK)
        if self.rotary is not None:
            attention_q_BTHK = self.rotary(attention_q_BTHK, start)
            attention_k_BTHK = self.rotary(attention_k_BTHK, start)
        log_decay_BTH, beta_BTH = self.gates(x_BTD)
        v_BTHV = F.silu(v_BTHV)
        return Projected(
            recurrent_q_BTHK=unit_vectors(F.silu(q_BTHK)),
            recurrent_k_BTHK=unit_vectors(F.silu(k_BTHK)),
            attention_q_BTHK=attention_q_BTHK,
            attention_k_BTHK=attention_k_BTHK,
            attention_v_BTHV=self._attention_values(v_BTHV),
            v_BTHV=v_BTHV,
            log_decay_BTH=log_decay_BTH,
            beta_BTH=beta_BTH,
            history_BWC=history_BWC,
        )

    def _attention_values(self, v_BTHV: Tensor) -> Tensor:
        """What the attention branch stores of a value."""
        return v_BTHV

    def _norm_attended(self, attended_BTHV: Tensor) -> Tensor:
        return self.attention_norm(attended_BTHV)

    def _combine(self, x_BTD: Tensor, recurrent_BTHV: Tensor, attended_BTHV: Tensor) -> Tensor:
        """Norm each branch per head, gate it from the input, add, project (HAM, Eq. 12-13)."""
        recurrent_gate_BTH, attention_gate_BTH = self.branch_gates(x_BTD).sigmoid().chunk(2, dim=-1)
        dtype = x_BTD.dtype
        mixed_BTHV = recurrent_gate_BTH[..., None] * self.recurrent_norm(
            recurrent_BTHV.to(dtype)
        ) + attention_gate_BTH[..., None] * self._norm_attended(attended_BTHV.to(dtype))
        return self.out(mixed_BTHV.flatten(-2))

    def _token_flops(self, tokens: int) -> float:
        """All but the attention."""
        width, heads, head_dim = self.shape.width, self.shape.heads, self.shape.head_dim
        return (
            linear_flops(tokens, width, 4 * width + 4 * heads)
            + conv_flops(tokens, 3 * width, self.options.conv_size)
            + delta_rule_flops(tokens, heads, head_dim, head_dim)
        )

    def _recurrent_and_conv_bytes(self, element_size: int) -> tuple[int, int]:
        """Bytes of the recurrent state and of the convolution's inputs of one sequence."""
        width = self.shape.width
        recurrent = width * self.shape.head_dim * (8 if element_size == 8 else 4)
        return recurrent, (self.options.conv_size - 1) * 3 * width * element_size
