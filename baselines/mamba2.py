"""Mamba-2: a recurrence with scalar decay and an outer-product write, no delta rule.

Equations: state-space duality (Dao and Gu 2024, arXiv 2405.21060): one input projection to z, x, B,
C and dt; short convolution with SiLU on x, B and C, which are shared over heads; the SSD
recurrence with the D skip; RMSNorm of y × SiLU(z). Deviation: one group of B and C.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ham.config import Positive
from ham.errors import ConfigError
from ham.kernels.ssd import ssd, ssd_step
from ham.measure.cost import conv_flops, linear_flops, ssd_flops
from ham.model.blocks import RMSNorm, ShortConvolution, initial_step_bias
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


class Mamba2Options(MixerOptions):
    """Options of Mamba-2.

    Attributes:
        state_size: Size S of the state per channel.
        expand: Inner width as a multiple of the model width.
        head_dim: Channels P of a head.
        conv_size: Width of the short convolution.
    """

    state_size: Positive = 64
    expand: Positive = 2
    head_dim: Positive = 64
    conv_size: Positive = 4


@register_baseline("mamba2")
class Mamba2(SequenceMixer):
    """Mamba-2's mixer (SSD)."""

    Options: ClassVar[type[MixerOptions]] = Mamba2Options
    title: ClassVar[str] = "Mamba-2"
    paper: ClassVar[str] = "Dao and Gu 2024, arXiv 2405.21060"
    operations: ClassVar[tuple[str, ...]] = ("ssd",)
    small_options: ClassVar[dict[str, Any]] = {"state_size": 16, "head_dim": 16}
    # The tiles of matrix units are 16 wide.
    memory_knobs: ClassVar[tuple[Knob, ...]] = (Knob("state_size", least=16, step=16),)

    def __init__(self, shape: MixerShape, options: Mamba2Options):
        super().__init__(shape, options)
        self.inner = shape.width * options.expand
        if self.inner % options.head_dim:
            raise ConfigError(
                f"mamba2 head_dim {options.head_dim} does not divide the inner width {self.inner}"
            )
        self.heads = self.inner // options.head_dim
        self.channels = self.inner + 2 * options.state_size
        self.project = nn.Linear(shape.width, self.inner + self.channels + self.heads, bias=False)
        self.conv = ShortConvolution(self.channels, options.conv_size)
        self.conv_bias_C = nn.Parameter(torch.zeros(self.channels))
        self.log_rate_H = nn.Parameter(torch.empty(self.heads).uniform_(1, 16).log())
        self.step_bias_H = nn.Parameter(initial_step_bias(self.heads))
        self.skip_H = nn.Parameter(torch.ones(self.heads))
        self.output_norm = RMSNorm(self.inner)
        self.out = nn.Linear(self.inner, shape.width, bias=False)

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, MixerAux]:
        """The recurrence over a sequence from an empty state."""
        z, x, b, c, dt, _ = self._project(x_BTD, None)
        rate = -self.log_rate_H.exp()
        memory = ssd(x, dt, rate, b, c, self.skip_H, provider=self.shape.kernels)
        return self._output(memory.y_BTHP, z), MixerAux()

    def init_state(
        self, batch_size: int, device: torch.device, dtype: torch.dtype
    ) -> RecurrentState:
        """A zero state."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        sizes = (batch_size, self.heads, self.options.head_dim, self.options.state_size)
        return RecurrentState(
            torch.zeros(sizes, device=device, dtype=wide),
            self.conv.init_history(batch_size, device, dtype),
        )

    def prefill(self, x_BTD: Tensor, state: RecurrentState) -> tuple[Tensor, MixerAux]:
        """Continue from `state` with T tokens."""
        z, x, b, c, dt, state.history_BWC = self._project(x_BTD, state.history_BWC)
        memory = ssd(
            x,
            dt,
            -self.log_rate_H.exp(),
            b,
            c,
            self.skip_H,
            initial_state_BHPS=state.recurrent,
            provider=self.shape.kernels,
        )
        state.recurrent = memory.final_state_BHPS
        return self._output(memory.y_BTHP, z), MixerAux()

    def step(self, x_BD: Tensor, state: RecurrentState) -> Tensor:
        """Continue from `state` with one token."""
        z, x, b, c, dt, state.history_BWC = self._project(x_BD[:, None], state.history_BWC)
        y_BHP, state.recurrent = ssd_step(
            x[:, 0],
            dt[:, 0],
            -self.log_rate_H.exp(),
            b[:, 0],
            c[:, 0],
            self.skip_H,
            state.recurrent,
        )
        return self._output(y_BHP[:, None], z)[:, 0]

    def forward_flops(self, context: int, kv_fraction: float = 1.0) -> float:
        """Linear in the context."""
        options, width = self.options, self.shape.width
        inputs = linear_flops(context, width, self.inner + self.channels + self.heads)
        return (
            inputs
            + conv_flops(context, self.channels, options.conv_size)
            + ssd_flops(context, self.heads, options.head_dim, options.state_size)
            + linear_flops(context, self.inner, width)
        )

    def decode_flops(self, position: int, kv_fraction: float = 1.0) -> float:
        """The same for every position."""
        return self.forward_flops(1)

    def state_bytes(
        self, position: int, kv_fraction: float = 1.0, element_size: int = 2
    ) -> StateBytes:
        """The same for every position."""
        recurrent = self.inner * self.options.state_size * (8 if element_size == 8 else 4)
        conv = (self.options.conv_size - 1) * self.channels * element_size
        return StateBytes(recurrent=recurrent, conv=conv, allocated=recurrent + conv)

    def _project(self, x_BTD: Tensor, history_BWC: Tensor | None) -> tuple[Tensor, ...]:
        """Returns z_BTC, x_BTHP, b_BTS, c_BTS, dt_BTH and the convolution's new history."""
        z_BTC, xbc_BTC, step_BTH = self.project(x_BTD).split(
            (self.inner, self.channels, self.heads), dim=-1
        )
        xbc_BTC, history_BWC = self.conv(xbc_BTC, history_BWC)
        xbc_BTC = F.silu(xbc_BTC + self.conv_bias_C.to(xbc_BTC.dtype))
        size = self.options.state_size
        x_BTC, b_BTS, c_BTS = xbc_BTC.split((self.inner, size, size), dim=-1)
        step_BTH = step_BTH.float() if step_BTH.element_size() < 4 else step_BTH
        dt_BTH = F.softplus(step_BTH + self.step_bias_H)
        x_BTHP = x_BTC.unflatten(-1, (self.heads, self.options.head_dim))
        return z_BTC, x_BTHP, b_BTS, c_BTS, dt_BTH, history_BWC

    def _output(self, y_BTHP: Tensor, z_BTC: Tensor) -> Tensor:
        gated_BTC = y_BTHP.flatten(-2).to(z_BTC.dtype) * F.silu(z_BTC)
        return self.out(self.output_norm(gated_BTC))
