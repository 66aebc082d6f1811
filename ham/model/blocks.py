"""Parts that several mixers and the decoder share: rotary positions, short convolution, MLP, gates.

Letters as in `ham.model.mixer`; W is the width of the short convolution, C its channels,
F the hidden width of the MLP.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ham.kernels.convolved_heads import Rotation
from ham.kernels.convolved_heads.arguments import EPSILON as NORM_EPSILON
from ham.kernels.convolved_heads.reference import convolve, rotate
from ham.kernels.runs import differs_between_runs, takes_runs
from ham.model.positions import span


@takes_runs()
def _unit_gain_norm(x: Tensor, shape: tuple[int, ...], epsilon: float) -> Tensor:
    return F.rms_norm(x, shape, eps=epsilon)


class RMSNorm(nn.RMSNorm):
    """Root-mean-square norm of the last axis (Zhang and Sennrich 2019, arXiv 1910.07467).

    The gain is cast to the input's dtype: with a float32 gain on a bfloat16 input, as autocast
    gives it, torch leaves its fused kernel.
    """

    def __init__(self, size: int):
        super().__init__(size, eps=NORM_EPSILON)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `x` and multiply by the gain; keeps the dtype."""
        gain = self.weight.to(x.dtype)
        if differs_between_runs(gain):
            return _unit_gain_norm(x, self.normalized_shape, self.eps) * gain
        return F.rms_norm(x, self.normalized_shape, gain, self.eps)


class RotaryPositions(nn.Module):
    """Rotary position embedding (Su et al. 2021, arXiv 2104.09864), half-split layout.

    Args:
        head_dim: Size of a head; even.
        max_positions: Number of positions in the table.
        base: Base of the frequencies.
    """

    def __init__(self, head_dim: int, max_positions: int, base: float = 10_000.0):
        super().__init__()
        self.head_dim = head_dim
        self.base = base
        for name in ("cos", "sin"):
            table = torch.empty(max_positions, head_dim // 2, dtype=torch.float32)
            self.register_buffer(name, table, persistent=False)
        self.fill_tables()

    def fill_tables(self) -> None:
        """Compute the tables, which are not stored with the weights."""
        exponent = torch.arange(0, self.head_dim, 2, dtype=torch.float64) / self.head_dim
        positions = torch.arange(self.cos.shape[0], dtype=torch.float64)
        angle = torch.outer(positions, self.base**-exponent)
        self.cos.copy_(angle.cos())
        self.sin.copy_(angle.sin())

    def rows(self, start: int | Tensor, length: int) -> Rotation:
        """Tables of `length` tokens from position `start` on.

        `start` is one int for all sequences or an int64 tensor `[B]`.
        """
        if isinstance(start, int):
            rows = slice(start, start + length)
        else:
            rows = span(start, length, start.device)
        return Rotation(self.cos[rows], self.sin[rows])

    def forward(self, x_BTHK: Tensor, start: int | Tensor = 0) -> Tensor:
        """Rotate `x_BTHK`, whose first token stands at position `start`; keeps the dtype."""
        return rotate(x_BTHK, self.rows(start, x_BTHK.shape[1]))


class ShortConvolution(nn.Module):
    """Depthwise causal convolution over time."""

    def __init__(self, channels: int, size: int):
        super().__init__()
        self.size = size
        bound = 1 / math.sqrt(size)
        self.weight_WC = nn.Parameter(torch.empty(size, channels).uniform_(-bound, bound))

    def init_history(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Zeros in place of the W - 1 inputs before the first token, `history_BWC`."""
        channels = self.weight_WC.shape[1]
        return torch.zeros(batch_size, self.size - 1, channels, device=device, dtype=dtype)

    def next_history(self, x_BTC: Tensor, history_BWC: Tensor) -> Tensor:
        """The last W - 1 inputs once `x_BTC` has been read after `history_BWC`."""
        if x_BTC.shape[1] >= self.size - 1:
            # From the front, because -0 would take everything.
            return x_BTC[:, x_BTC.shape[1] - self.size + 1 :].to(history_BWC.dtype)
        return torch.cat((history_BWC, x_BTC.to(history_BWC.dtype)), dim=1)[:, x_BTC.shape[1] :]

    def forward(
        self, x_BTC: Tensor, history_BWC: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Convolve; returns `y_BTC` and, of a history, the one for the next call."""
        y_BTC = convolve(x_BTC, self.weight_WC, history_BWC)
        return y_BTC, None if history_BWC is None else self.next_history(x_BTC, history_BWC)


class DecayAndWriteGates(nn.Module):
    """The two scalars per head and token that steer the gated delta rule.

    log a_t = -exp(A_log) softplus(W_a x_t + dt_bias) and b_t = sigmoid(W_b x_t)
    (Yang et al. 2024, arXiv 2412.06464, section 3; initialisation after Mamba-2).
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.projection = nn.Linear(width, 2 * heads, bias=False)
        self.log_rate_H = nn.Parameter(torch.empty(heads).uniform_(1, 16).log())
        self.step_bias_H = nn.Parameter(initial_step_bias(heads))

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """Returns `log_decay_BTH` (<= 0) and `beta_BTH` in (0, 1), at least float32."""
        raw = self.projection(x_BTD)
        raw = raw.float() if raw.element_size() < 4 else raw
        step_BTH, write_BTH = raw.chunk(2, dim=-1)
        log_decay_BTH = -self.log_rate_H.exp() * F.softplus(step_BTH + self.step_bias_H)
        return log_decay_BTH, write_BTH.sigmoid()


def initial_step_bias(heads: int) -> Tensor:
    """Bias whose softplus is log-uniform in 0.001..0.1 (Gu and Dao 2023, arXiv 2312.00752)."""
    low, high = math.log(1e-3), math.log(1e-1)
    step_H = torch.exp(torch.empty(heads).uniform_(low, high)).clamp(min=1e-4)
    return step_H + torch.log(-torch.expm1(-step_H))


class SwiGLU(nn.Module):
    """Gated MLP (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Position-wise map of `x_BTD`."""
        gate_BTF, value_BTF = self.up(x_BTD).chunk(2, dim=-1)
        return self.down(F.silu(gate_BTF) * value_BTF)


def split_heads(x_BTD: Tensor, heads: int) -> Tensor:
    """`x_BTD` to `x_BTHK`."""
    return x_BTD.unflatten(-1, (heads, -1))
