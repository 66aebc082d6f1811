"""The gated delta rule alone: a recurrent memory of fixed size, HAM without its cache.

Equations: Gated DeltaNet (Yang et al. 2024, arXiv 2412.06464, sections 3 and 3.4): short
convolution and SiLU on q, k and v, l2-normalised q and k, the rule, then an RMSNorm per head gated
by SiLU of a full-width projection. Deviation: values have the head size of keys (`expand_v` 1)
unless told otherwise.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ham.config import Positive
from ham.kernels.convolved_heads import convolved_heads
from ham.kernels.gated_delta_rule import gated_delta_rule_scored, gated_delta_rule_step
from ham.measure.cost import conv_flops, delta_rule_flops, linear_flops
from ham.model.blocks import (
    DecayAndWriteGates,
    RMSNorm,
    ShortConvolution,
)
from ham.model.knob import Knob
from ham.model.mixer import (
    MixerAux,
    MixerOptions,
    MixerShape,
    SequenceMixer,
    StateBytes,
)
from ham.model.registry import register_baseline
from ham.model.states import RecurrentState


class GatedDeltaRuleOptions(MixerOptions):
    """Options of the gated delta rule.

    Attributes:
        conv_size: Width of the short convolution on q, k and v.
        expand_v: Size of value heads as a multiple of the key head size.
    """

    conv_size: Positive = 4
    expand_v: Positive = 1


@register_baseline("gated_delta_rule")
class GatedDeltaRule(SequenceMixer):
    """Gated DeltaNet."""

    Options: ClassVar[type[MixerOptions]] = GatedDeltaRuleOptions
    title: ClassVar[str] = "Gated delta rule"
    paper: ClassVar[str] = "Yang et al. 2024, arXiv 2412.06464"
    operations: ClassVar[tuple[str, ...]] = ("gated_delta_rule",)
    memory_knobs: ClassVar[tuple[Knob, ...]] = (Knob("expand_v"),)

    def __init__(self, shape: MixerShape, options: GatedDeltaRuleOptions):
        super().__init__(shape, options)
        width = shape.width
        self.value_width = width * options.expand_v
        self.qkv = nn.Linear(width, 2 * width + self.value_width, bias=False)
        self.conv = ShortConvolution(2 * width + self.value_width, options.conv_size)
        self.gates = DecayAndWriteGates(width, shape.heads)
        self.output_gate = nn.Linear(width, self.value_width, bias=False)
        self.output_norm = RMSNorm(self.value_width // shape.heads)
        self.out = nn.Linear(self.value_width, width, bias=False)

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, MixerAux]:
        """The rule over a sequence from an empty state."""
        q_BTHK, k_BTHK, v_BTHV, _ = self._project(x_BTD, None)
        memory = gated_delta_rule_scored(
            q_BTHK, k_BTHK, v_BTHV, *self.gates(x_BTD), score=None, provider=self.shape.kernels
        )
        return self._output(x_BTD, memory.o_BTHV), MixerAux()

    def init_state(
        self, batch_size: int, device: torch.device, dtype: torch.dtype
    ) -> RecurrentState:
        """A zero state."""
        heads, head_dim = self.shape.heads, self.shape.head_dim
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        state_BHKV = torch.zeros(
            batch_size, heads, head_dim, self.value_width // heads, device=device, dtype=wide
        )
        return RecurrentState(state_BHKV, self.conv.init_history(batch_size, device, dtype))

    def prefill(self, x_BTD: Tensor, state: RecurrentState) -> tuple[Tensor, MixerAux]:
        """Continue from `state` with T tokens."""
        q_BTHK, k_BTHK, v_BTHV, state.history_BWC = self._project(x_BTD, state.history_BWC)
        memory = gated_delta_rule_scored(
            q_BTHK,
            k_BTHK,
            v_BTHV,
            *self.gates(x_BTD),
            score=None,
            initial_state_BHKV=state.recurrent,
            provider=self.shape.kernels,
        )
        state.recurrent = memory.final_state_BHKV
        return self._output(x_BTD, memory.o_BTHV), MixerAux()

    def step(self, x_BD: Tensor, state: RecurrentState) -> Tensor:
        """Continue from `state` with one token."""
        x_BTD = x_BD[:, None]
        q_BTHK, k_BTHK, v_BTHV, state.history_BWC = self._project(x_BTD, state.history_BWC)
        log_decay_BTH, beta_BTH = self.gates(x_BTD)
        o_BHV, state.recurrent, _ = gated_delta_rule_step(
            q_BTHK[:, 0],
            k_BTHK[:, 0],
            v_BTHV[:, 0],
            log_decay_BTH[:, 0],
            beta_BTH[:, 0],
            state.recurrent,
        )
        return self._output(x_BTD, o_BHV[:, None])[:, 0]

    def forward_flops(self, context: int, kv_fraction: float = 1.0) -> float:
        """Linear in the context."""
        width, heads = self.shape.width, self.shape.heads
        channels = 2 * width + self.value_width
        projections = linear_flops(context, width, channels + 2 * heads + 2 * self.value_width)
        return (
            projections
            + conv_flops(context, channels, self.options.conv_size)
            + delta_rule_flops(context, heads, self.shape.head_dim, self.value_width // heads)
        )

    def decode_flops(self, position: int, kv_fraction: float = 1.0) -> float:
        """The same for every position."""
        return self.forward_flops(1)

    def state_bytes(
        self, position: int, kv_fraction: float = 1.0, element_size: int = 2
    ) -> StateBytes:
        """The same for every position."""
        wide = 8 if element_size == 8 else 4
        recurrent = self.shape.head_dim * self.value_width * wide
        channels = 2 * self.shape.width + self.value_width
        conv = (self.options.conv_size - 1) * channels * element_size
        return StateBytes(recurrent=recurrent, conv=conv, allocated=recurrent + conv)

    def _project(
        self, x_BTD: Tensor, history_BWC: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        x_BTC = self.qkv(x_BTD)
        made = convolved_heads(
            x_BTC,
            self.conv.weight_WC,
            heads=self.shape.heads,
            key_size=self.shape.head_dim,
            history_BWC=history_BWC,
            provider=self.shape.kernels,
        )
        if history_BWC is not None:
            history_BWC = self.conv.next_history(x_BTC, history_BWC)
        return made.recurrent_q_BTHK, made.recurrent_k_BTHK, made.v_BTHV, history_BWC

    def _output(self, x_BTD: Tensor, o_BTHV: Tensor) -> Tensor:
        normed_BTD = self.output_norm(o_BTHV.to(x_BTD.dtype)).flatten(-2)
        return self.out(normed_BTD * F.silu(self.output_gate(x_BTD)))
