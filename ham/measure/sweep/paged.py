"""HAM and the gated delta rule by the fused decode kernels of `ham.kernels.decode`.

A cache has exactly the pages that its sequences need, one more token included, so memory follows
the routed tokens. Positions are frozen, so no token may be counted: the score is computed and
compared, but the threshold is infinite. A token that is not routed is written to the next free slot
all the same, so the work is that of one that is.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from ham.kernels.decode.arguments import (
    Attention,
    AttentionTile,
    DecodeScratch,
    Pages,
    Recurrence,
    Routing,
)
from ham.kernels.decode.blocks import gated_rms_norm
from ham.kernels.decode.launch import combine, paged_attention, recurrent_step, step
from ham.kernels.decode.layout import page_bytes
from ham.measure.sweep.forced import forced_mask
from ham.measure.sweep.layers import STATE_SCALE, DecodeLayer, Occupancy, Pieces, Traffic

PAGE_TOKENS = 32
TILE_TOKENS = 32
PROGRAMS = 2112
"""Sixteen for each of the 132 multiprocessors of an H100."""


class _FusedRecurrence(DecodeLayer):
    """States and projections that both layers have."""

    provider = "triton"

    def prepare(self) -> None:
        """Random states."""
        mixer, device = self.mixer, self.settings.device
        state = mixer.init_state(self.batch, device, self.settings.dtype)
        recurrent_BHKV = getattr(state, "recurrent_BHKV", None)
        self.state_BHKV = state.recurrent if recurrent_BHKV is None else recurrent_BHKV
        self.state_BHKV.normal_(std=STATE_SCALE)
        self.history_BWC = state.history_BWC.normal_()
        self.parts = Recurrence(
            mixer.conv.weight_WC,
            mixer.gates.log_rate_H,
            mixer.gates.step_bias_H,
            self.history_BWC,
            self.state_BHKV,
        )

    def state_bytes(self) -> int:
        """Recurrent state and convolution inputs."""
        return self.state_BHKV.nbytes + self.history_BWC.nbytes

    def _project(self, x_BD: Tensor) -> None:
        # Three axes, as mixers pass them: stand-ins of projections have them too.
        self.x_B1D = x_BD[:, None]
        self.qkv_BC = self.mixer.qkv(self.x_B1D)[:, 0]
        self.raw_B2H = self.mixer.gates.projection(self.x_B1D)[:, 0]


class FusedRuleLayer(_FusedRecurrence):
    """The gated delta rule in two launches."""

    fused_pieces: ClassVar[dict[str, str]] = {
        "recurrent": "convolution, decay and recurrence in one launch"
    }

    def prepare(self) -> None:
        """States and scratch."""
        super().prepare()
        shape = (self.batch, self.heads, self.state_BHKV.shape[-1])
        self.o_BHV = torch.empty(shape, device=self.settings.device, dtype=self.settings.dtype)
        self.y_BD = self.o_BHV.flatten(1).clone()

    def step(self, x_BD: Tensor) -> Tensor:
        """Project, recur, norm and gate, project."""
        self._project(x_BD)
        self.gate_BD = self.mixer.output_gate(self.x_B1D)[:, 0]
        self._recur()
        self._gate()
        return self.mixer.out(self.y_BD)

    def _recur(self) -> None:
        recurrent_step(self.qkv_BC, self.raw_B2H, self.parts, self.o_BHV)

    def _gate(self) -> None:
        gated_rms_norm(self.o_BHV, self.gate_BD, self.mixer.output_norm.weight, self.y_BD)

    def kv_bytes(self) -> int:
        """No keys, no values."""
        return 0

    def traffic(self) -> Traffic:
        """The state is read and written."""
        return Traffic(self.state_bytes(), self.state_bytes())

    def pieces(self) -> Pieces:
        """Recurrence, and norm with gates."""
        return {"recurrent": self._recur, "gates": self._gate}


class PagedHamLayer(_FusedRecurrence):
    """HAM in three launches over pages."""

    fused_pieces: ClassVar[dict[str, str]] = {
        "recurrent": "convolution, recurrence, score, threshold and append in one launch",
        "gates": "combination of the splits, norms and gates in one launch",
    }

    def prepare(self) -> None:
        """States, and pages for as many tokens as each sequence holds, and one."""
        super().prepare()
        device, dtype = self.settings.device, self.settings.dtype
        sizes = (self.heads, self.head_dim, self.head_dim)
        counts_B = self._held_B()
        self.routed_B = tuple(counts_B.tolist())
        owned = [count // PAGE_TOKENS + 1 for count in self.routed_B]
        self.page_count = sum(owned)
        size = page_bytes(PAGE_TOKENS, *sizes, dtype.itemsize)
        self.storage = torch.empty(
            self.page_count * size // dtype.itemsize, device=device, dtype=dtype
        ).normal_()
        pages = _page_table(owned, self.storage.data_ptr(), size).to(device)
        self.pages = Pages(pages, counts_B, PAGE_TOKENS, dtype)
        self.tile = AttentionTile(TILE_TOKENS, splits_for(self.batch * self.heads, self.routed_B))
        self.scratch = DecodeScratch.make(
            self.batch, *sizes, dtype, device, splits=self.tile.splits
        )
        self._constants(device, dtype)

    def _held_B(self) -> Tensor:
        """Int32 tokens in each cache: as many as the hash routes."""
        cell = self.settings.cell
        routed_BT = forced_mask(
            self.index,
            self.batch,
            cell.context,
            cell.fraction,
            cell.routing,
            self.settings.device,
        )
        return routed_BT.sum(dim=1, dtype=torch.int32)

    def _routing(self) -> Routing:
        """The mixer's score, which no token can make reach the threshold."""
        options = self.mixer.options
        threshold_1 = torch.full((1,), math.inf, device=self.settings.device)
        return Routing(options.score, options.reduction, threshold_1)

    def _constants(self, device: torch.device, dtype: torch.dtype) -> None:
        """Parameters and positions in the form that the kernels take."""
        mixer = self.mixer
        rotary = mixer.rotary
        self.attention = Attention(
            mixer.q_norm.weight,
            mixer.k_norm.weight,
            None if rotary is None else rotary.cos,
            None if rotary is None else rotary.sin,
        )
        self.routing = self._routing()
        self.positions_B = torch.full((self.batch,), self.settings.cell.context, device=device)
        self.y_BHV = torch.empty(self.batch, self.heads, self.head_dim, device=device, dtype=dtype)

    def step(self, x_BD: Tensor) -> Tensor:
        """Project, three launches, project."""
        self._project(x_BD)
        self.gates_B2H = self.mixer.branch_gates(self.x_B1D)[:, 0]
        self._recur()
        self._attend()
        self._combine()
        return self.mixer.out(self.y_BHV.flatten(1))

    def _recur(self) -> None:
        step(
            self.qkv_BC,
            self.raw_B2H,
            self.parts,
            self.attention,
            self.routing,
            self.pages,
            self.positions_B,
            self.scratch,
        )

    def _attend(self) -> None:
        paged_attention(self.pages, self.scratch, *self._output(), tile=self.tile)

    def _combine(self) -> None:
        combine(self.scratch, *self._output(), tile=self.tile)

    def _output(self) -> tuple[Tensor, ...]:
        gains = (self.mixer.recurrent_norm.weight, self.mixer.attention_norm.weight)
        return (self.gates_B2H, *gains, self.y_BHV)

    def kv_bytes(self) -> int:
        """Pages, their table, counts."""
        return self.storage.nbytes + self.pages.page_table_RP.nbytes + self.pages.counts_R.nbytes

    def traffic(self) -> Traffic:
        """States both ways; routed keys and values read, one token per sequence written."""
        pair = 2 * self.heads * self.head_dim * self.storage.element_size()
        states = self.state_bytes()
        return Traffic(states + pair * sum(self.routed_B), states + pair * self.batch)

    def occupancy(self) -> Occupancy:
        """Counts of the sequences against the slots on their pages."""
        return Occupancy(self.routed_B, self.page_count * PAGE_TOKENS)

    def pieces(self) -> Pieces:
        """The three launches."""
        return {"recurrent": self._recur, "attention": self._attend, "gates": self._combine}


class PagedWindowLayer(PagedHamLayer):
    """The gated delta rule with a window by the launches of HAM, of which it needs no score.

    Its pages hold a window of tokens. As with HAM, the token of the step is written and not
    counted, so as many tokens are read as a query sees once the window is full.
    """

    fused_pieces: ClassVar[dict[str, str]] = {
        **PagedHamLayer.fused_pieces,
        "recurrent": "convolution, recurrence and append in one launch",
    }

    def _held_B(self) -> Tensor:
        """The window, the same in all sequences."""
        held = min(self.mixer.options.window, self.settings.cell.context)
        return torch.full((self.batch,), held, dtype=torch.int32, device=self.settings.device)

    def _routing(self) -> Routing:
        """A score that is given, which costs nothing."""
        device = self.settings.device
        threshold_1 = torch.full((1,), math.inf, device=device)
        return Routing("given", "min", threshold_1, torch.zeros(self.batch, device=device))

    def occupancy(self) -> None:
        """Nothing is routed."""


def splits_for(rows: int, counts: tuple[int, ...]) -> int:
    """Programs that share one head of a sequence: enough for the device, a power of two."""
    wanted = max(1, PROGRAMS // rows)
    useful = max(1, max(counts) // (2 * TILE_TOKENS))
    return 1 << (min(wanted, useful, 64).bit_length() - 1)


def _page_table(owned: list[int], first: int, size: int) -> Tensor:
    """Byte addresses of consecutive pages, `page_table_BP`; 0 where a sequence has none."""
    table = torch.zeros(len(owned), max(owned), dtype=torch.int64)
    for row, count in enumerate(owned):
        table[row, :count] = first + size * torch.arange(count)
        first += size * count
    return table
