"""One layer's decode step by the kernels of `ham.kernels.decode`.

A layer takes the memory that a prefill left, updates it in place, allocates nothing in a step and
never asks the device anything, so that a CUDA graph can hold it. Letters as in `ham.model.mixer`;
R rows of the routed cache: one per sequence, or one per sequence and head.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ham.kernels.decode.arguments import (
    LARGEST_HEAD,
    Attention,
    AttentionTile,
    DecodeScratch,
    Pages,
    Recurrence,
    Routing,
)
from ham.kernels.decode.blocks import gated_rms_norm
from ham.kernels.decode.launch import combine, paged_attention, recurrent_step, step
from ham.layer import HamMixer, HamState
from ham.model.mixer import RoutingHints, SequenceMixer
from ham.model.states import RecurrentState
from ham.routing.options import STATE_SCORES

RULE = "gated_delta_rule"


@dataclass
class StepInputs:
    """What every layer of a step reads; the same tensors for the decoder's whole life.

    Attributes:
        tokens_B: Int64 ids of the tokens of this step.
        positions_B: Int64 positions of those tokens.
        active_B: Int8; 0 where a row of the batch has no sequence.
        dtype: Of activations and caches.
    """

    tokens_B: Tensor
    positions_B: Tensor
    active_B: Tensor
    dtype: torch.dtype


class FusedLayer(ABC):
    """The step of one mixer from its normed input to its output."""

    @abstractmethod
    def step(self, x_BD: Tensor) -> Tensor:
        """Mix one token per sequence; `y_BD`."""

    @abstractmethod
    def states(self) -> tuple[Tensor, Tensor]:
        """`state_BHKV` and `history_BWC`, which steps update in place."""


class FusedRule(FusedLayer):
    """The gated delta rule: two launches between its projections."""

    def __init__(self, mixer: SequenceMixer, state: RecurrentState, inputs: StepInputs):
        self.inputs = inputs
        dtype = inputs.dtype
        self.weights = {
            name: cast(getattr(mixer, name).weight, dtype)
            for name in ("qkv", "output_gate", "output_norm", "out")
        }
        self.gates = cast(mixer.gates.projection.weight, dtype)
        self.parts = recurrence_of(mixer, state.recurrent, state.history_BWC, dtype)
        batch, heads, _, value_size = self.parts.state_BHKV.shape
        self.o_BHV = state.recurrent.new_zeros(batch, heads, value_size, dtype=dtype)
        self.y_BD = torch.zeros_like(self.o_BHV.flatten(1))

    def step(self, x_BD: Tensor) -> Tensor:
        """Project, recur, norm and gate, project."""
        weights = self.weights
        recurrent_step(
            F.linear(x_BD, weights["qkv"]),
            F.linear(x_BD, self.gates),
            self.parts,
            self.o_BHV,
            active_B=self.inputs.active_B,
        )
        gate_BD = F.linear(x_BD, weights["output_gate"])
        gated_rms_norm(self.o_BHV, gate_BD, weights["output_norm"], self.y_BD)
        return F.linear(self.y_BD, weights["out"])

    def states(self) -> tuple[Tensor, Tensor]:
        """`state_BHKV` and `history_BWC`."""
        return self.parts.state_BHKV, self.parts.history_BWC


class FusedHam(FusedLayer):
    """HAM: three launches between its projections.

    Args:
        mixer: The layer.
        state: What a prefill left, its cache apart.
        inputs: Of the step.
        pages: The layer's part of the paged cache.
        scratch: Shared by all layers.
        tile: How the attention is cut.
    """

    def __init__(
        self,
        mixer: HamMixer,
        state: HamState,
        inputs: StepInputs,
        pages: Pages,
        scratch: DecodeScratch,
        tile: AttentionTile,
    ):
        self.mixer, self.inputs = mixer, inputs
        self.pages, self.scratch, self.tile = pages, scratch, tile
        dtype, rotary = inputs.dtype, mixer.rotary
        self.weights = {
            name: cast(getattr(mixer, name).weight, dtype)
            for name in ("qkv", "branch_gates", "out", "recurrent_norm", "attention_norm")
        }
        self.gates = cast(mixer.gates.projection.weight, dtype)
        self.gate_bias = cast(mixer.branch_gates.bias, dtype)
        self.parts = recurrence_of(mixer, state.recurrent_BHKV, state.history_BWC, dtype)
        self.attention = Attention(
            cast(mixer.q_norm.weight, dtype),
            cast(mixer.k_norm.weight, dtype),
            None if rotary is None else rotary.cos,
            None if rotary is None else rotary.sin,
        )
        self.routing = self._routing()
        batch, heads, _, value_size = self.parts.state_BHKV.shape
        self.y_BHV = state.recurrent_BHKV.new_zeros(batch, heads, value_size, dtype=dtype)

    def step(self, x_BD: Tensor) -> Tensor:
        """Project, step and append, attend, combine, project."""
        weights, active_B = self.weights, self.inputs.active_B
        if self.routing.given_R is not None:
            self.routing.given_R.copy_(self._given(x_BD))
        step(
            F.linear(x_BD, weights["qkv"]),
            F.linear(x_BD, self.gates),
            self.parts,
            self.attention,
            self.routing,
            self.pages,
            self.inputs.positions_B,
            self.scratch,
            active_B=active_B,
        )
        output = (
            F.linear(x_BD, weights["branch_gates"], self.gate_bias),
            weights["recurrent_norm"],
            weights["attention_norm"],
            self.y_BHV,
        )
        per_head = self.routing.per_head
        paged_attention(
            self.pages, self.scratch, *output, tile=self.tile, per_head=per_head, active_B=active_B
        )
        if not self.tile.fused:
            combine(self.scratch, *output, tile=self.tile)
        return F.linear(self.y_BHV.flatten(1), weights["out"])

    def states(self) -> tuple[Tensor, Tensor]:
        """`state_BHKV` and `history_BWC`."""
        return self.parts.state_BHKV, self.parts.history_BWC

    def _routing(self) -> Routing:
        options = self.mixer.options
        threshold_1 = self.mixer.controller.threshold.float().reshape(1).contiguous()
        if options.score in STATE_SCORES:
            return Routing(options.score, options.reduction, threshold_1)
        given_R = torch.zeros(self.pages.counts_R.shape, device=threshold_1.device)
        reduction = "per_head" if self.mixer.router.per_head else "min"
        return Routing("given", reduction, threshold_1, given_R)

    def _given(self, x_BD: Tensor) -> Tensor:
        inputs = self.inputs
        hints = RoutingHints(inputs.tokens_B[:, None])
        score = self.mixer.router.score(x_BD[:, None], None, inputs.positions_B[:, None], hints)
        return score.flatten().float()


def refusal(mixer: SequenceMixer) -> str | None:
    """Why a layer has no fused step, in a few words, or None if it has one."""
    if mixer.shape.head_dim > LARGEST_HEAD:
        return f"heads of {mixer.shape.head_dim} are larger than {LARGEST_HEAD}"
    if isinstance(mixer, HamMixer):
        return _ham_refusal(mixer.options)
    if mixer.registered_name == RULE:
        if mixer.value_width // mixer.shape.heads > LARGEST_HEAD:
            return f"value heads are larger than {LARGEST_HEAD}"
        return None
    return f"mixer {mixer.registered_name!r} has no fused step"


def _ham_refusal(options) -> str | None:
    if options.budget != "threshold":
        return f"budget {options.budget!r} has no fused step"
    for name, off in (("window", 0), ("self_visible", False), ("sink", "none")):
        if getattr(options, name) != off:
            return f"{name} has no fused step"
    if options.score == "oracle":
        return "score 'oracle' needs hints at every step"
    if options.conv_size < 2:
        return "a convolution of one token has no fused step"
    return None


def recurrence_of(
    mixer: SequenceMixer, state_BHKV: Tensor, history_BWC: Tensor, dtype: torch.dtype
) -> Recurrence:
    """Parameters and memory of the recurrent branch, the memory owned by the caller."""
    return Recurrence(
        cast(mixer.conv.weight_WC, dtype),
        mixer.gates.log_rate_H.detach(),
        mixer.gates.step_bias_H.detach(),
        history_BWC.to(dtype).contiguous().clone(),
        state_BHKV.contiguous().clone(),
    )


def cast(parameter: nn.Parameter | Tensor, dtype: torch.dtype) -> Tensor:
    """The parameter in the arithmetic of the step: cast once, not at every step."""
    return parameter.detach().to(dtype).contiguous()
