"""What layers with a recurrent memory and attention on the same projections share.

HAM and its rivals differ in what the attention branch may read; projections, recurrent branch,
norms and gates are the same, and stand here. Letters as in `ham.model.mixer`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from ham.kernels.convolved_heads import convolved_heads
from ham.kernels.gated_sum import gated_sum
from ham.measure.cost import conv_flops, delta_rule_flops, linear_flops
from ham.model.blocks import (
    DecayAndWriteGates,
    RMSNorm,
    RotaryPositions,
    ShortConvolution,
)
from ham.model.mixer import MixerShape, SequenceMixer

BRANCHES = ("recurrent", "attention")
"""The two memories in the order of their gates."""


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
    history_BWC: Tensor | None

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


@dataclass(frozen=True)
class GatedBranches:
    """What the branches of one layer gave for a batch, in the order of `BRANCHES`.

    Attributes:
        gates: Both gates, in 0..1, each `[B, T, H]`.
        gated: Both read-outs, normed and gated, each `[B, T, H, V]`; the layer adds them.
    """

    gates: tuple[Tensor, Tensor]
    gated: tuple[Tensor, Tensor]


class TwoMemories(SequenceMixer):
    """Base of mixers with both branches: parts, projections, the gated sum, and their costs.

    Args:
        shape: Where the mixer sits.
        options: Of the mixer; at least `TwoMemoriesOptions`.

    Attributes:
        watcher: Called with the branches of every batch; None but within `watched`.
    """

    watcher: Callable[[GatedBranches], None] | None = None

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
        x_BTC = self.qkv(x_BTD)
        rotary = self.rotary
        made = convolved_heads(
            x_BTC,
            self.conv.weight_WC,
            heads=self.shape.heads,
            key_size=self.shape.head_dim,
            q_gain_K=self.q_norm.weight,
            k_gain_K=self.k_norm.weight,
            rotation=None if rotary is None else rotary.rows(start, x_BTD.shape[1]),
            history_BWC=history_BWC,
            provider=self.shape.kernels,
        )
        log_decay_BTH, beta_BTH = self.gates(x_BTD)
        return Projected(
            recurrent_q_BTHK=made.recurrent_q_BTHK,
            recurrent_k_BTHK=made.recurrent_k_BTHK,
            attention_q_BTHK=made.attention_q_BTHK,
            attention_k_BTHK=made.attention_k_BTHK,
            attention_v_BTHV=self._attention_values(made.v_BTHV),
            v_BTHV=made.v_BTHV,
            log_decay_BTH=log_decay_BTH,
            beta_BTH=beta_BTH,
            history_BWC=(
                None if history_BWC is None else self.conv.next_history(x_BTC, history_BWC)
            ),
        )

    def _attention_values(self, v_BTHV: Tensor) -> Tensor:
        """What the attention branch stores of a value."""
        return v_BTHV

    @property
    def _norms_attended(self) -> bool:
        """Whether attention's read-out is normed before its gate."""
        return True

    def _combine(self, x_BTD: Tensor, recurrent_BTHV: Tensor, attended_BTHV: Tensor) -> Tensor:
        """Norm each branch per head, gate it from the input, add, project (HAM, Eq. 12-13)."""
        gates_BTH = self.branch_gates(x_BTD)
        if self.watcher is not None:
            self.watcher(self._gated(gates_BTH, recurrent_BTHV, attended_BTHV))
        if self._norms_attended:
            mixed_BTHV = gated_sum(
                recurrent_BTHV,
                attended_BTHV.to(recurrent_BTHV.dtype),
                gates_BTH,
                self.recurrent_norm.weight,
                self.attention_norm.weight,
                provider=self.shape.kernels,
            )
        else:
            recurrent_BTHV, attended_BTHV = self._gated(
                gates_BTH, recurrent_BTHV, attended_BTHV
            ).gated
            mixed_BTHV = recurrent_BTHV + attended_BTHV
        return self.out(mixed_BTHV.flatten(-2))

    def _gated(
        self, gates_BTH: Tensor, recurrent_BTHV: Tensor, attended_BTHV: Tensor
    ) -> GatedBranches:
        """Both branches before they are added; `gates_BTH` has 2 H gates before their sigmoid."""
        recurrent_gate_BTH, attention_gate_BTH = gates_BTH.sigmoid().chunk(2, dim=-1)
        if self._norms_attended:
            attended_BTHV = self.attention_norm(attended_BTHV)
        return GatedBranches(
            (recurrent_gate_BTH, attention_gate_BTH),
            (
                recurrent_gate_BTH[..., None] * self.recurrent_norm(recurrent_BTHV),
                attention_gate_BTH[..., None] * attended_BTHV,
            ),
        )

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


@contextmanager
def watched(watchers: Mapping[TwoMemories, Callable[[GatedBranches], None]]) -> Iterator[None]:
    """Let layers report their branches: one call per layer and batch, until the block ends."""
    for mixer, watcher in watchers.items():
        mixer.watcher = watcher
    try:
        yield
    finally:
        for mixer in watchers:
            mixer.watcher = None
