"""One layer's decoding memory at a frozen position, and its step, for every architecture.

A layer allocates its memory once, fills it with random finite numbers, and decodes one token per
sequence with static shapes and without asking the device anything, so that a CUDA graph can hold
it. `pieces` are the parts of the core between the projections, which can be timed alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ham.kernels.gated_delta_rule import gated_delta_rule_step
from ham.kernels.speed.clock import Clock
from ham.measure.sweep.attention import attend_one, empty_cache, fastest_backend, fastest_layout
from ham.measure.sweep.forced import forced_mask
from ham.measure.sweep.grid import Cell
from ham.measure.sweep.ops import StepOps
from ham.model.mixer import SequenceMixer

STATE_SCALE = 0.1
"""Standard deviation of the numbers that recurrent states are filled with."""

Pieces = dict[str, Callable[[], object]]


@dataclass(frozen=True)
class Traffic:
    """Bytes that one step of a whole batch must read and write; activations are left out."""

    read: int
    written: int


@dataclass(frozen=True)
class Occupancy:
    """How well the allocated cache is used.

    Attributes:
        routed_B: Tokens held by each sequence.
        slots: Token slots allocated for all sequences.
    """

    routed_B: tuple[int, ...]
    slots: int


@dataclass
class LayerSettings:
    """What the layers of a session share.

    Attributes:
        cell: Sizes and routing.
        device, dtype: Of the caches and activations.
        clock: For choosing the fastest attention.
        layouts: Layout of a dense cache by head size, filled by the first layer that asks.
        ops: The operations between matrix products.
        backend: Attention of the session's dense caches, chosen by the first layer that asks.
    """

    cell: Cell
    device: torch.device
    dtype: torch.dtype
    clock: Clock
    layouts: dict[tuple[int, int], str]
    ops: StepOps
    backend: str | None = None


class DecodeLayer(ABC):
    """The memory of one layer and its decode step.

    Args:
        mixer: The layer's mixer.
        index: Which layer of the model it is.
        settings: Sizes, device, dtype.

    Attributes:
        fused_pieces: What the launch of a piece does, where that is more than its name says.
    """

    provider = "torch"
    fused_pieces: Mapping[str, str] = {}

    def __init__(self, mixer: SequenceMixer, index: int, settings: LayerSettings):
        self.mixer = mixer
        self.index = index
        self.settings = settings
        self.batch = settings.cell.batch
        self.heads, self.head_dim = mixer.shape.heads, mixer.shape.head_dim

    @abstractmethod
    def prepare(self) -> None:
        """Allocate and fill the memory."""

    @abstractmethod
    def step(self, x_BD: Tensor) -> Tensor:
        """The mixer's output for one token per sequence, `y_BD`."""

    @abstractmethod
    def kv_bytes(self) -> int:
        """Allocated bytes of keys, values and what finds them."""

    @abstractmethod
    def state_bytes(self) -> int:
        """Allocated bytes of recurrent and convolution states."""

    @abstractmethod
    def traffic(self) -> Traffic:
        """Bytes that a step must move."""

    def occupancy(self) -> Occupancy | None:
        """How well the cache is used; None where every slot always is."""
        return None

    def pieces(self) -> Pieces:
        """Parts of the core by name, each callable after a step; may be empty."""
        return {}


class RecurrentLayer(DecodeLayer):
    """Gated delta rule and Mamba-2: the mixer's own step."""

    def prepare(self) -> None:
        """A random state."""
        self.provider = self.settings.ops.name
        state = self.mixer.init_state(self.batch, self.settings.device, self.settings.dtype)
        for tensors in state.tensors().values():
            for tensor in tensors:
                tensor.normal_(std=STATE_SCALE)
        self.state = state

    def step(self, x_BD: Tensor) -> Tensor:
        """The mixer's step, its state updated in place."""
        state = self.state
        return self.settings.ops.recur(self.mixer, x_BD, state.recurrent, state.history_BWC)

    def kv_bytes(self) -> int:
        """No keys, no values."""
        return 0

    def state_bytes(self) -> int:
        """Counted on the tensors."""
        return sum(self.state.bytes_allocated().values())

    def traffic(self) -> Traffic:
        """The state is read and written."""
        return Traffic(self.state_bytes(), self.state_bytes())


class DenseLayer(DecodeLayer):
    """Full attention over a cache with exactly as many slots as a query sees."""

    def prepare(self) -> None:
        """Keys and values in the fastest layout; the new token has the last slot."""
        settings, position = self.settings, self.settings.cell.context
        self.keys = self._visible_keys(position)
        self.slot = position % self.keys
        conv = getattr(self.mixer, "conv", None)
        self.history_BWC = (
            None
            if conv is None
            else conv.init_history(self.batch, settings.device, settings.dtype).normal_()
        )
        size = (self.heads, self.head_dim)
        if size not in settings.layouts:
            arguments = (*size, settings.device, settings.dtype, settings.clock)
            settings.layouts[size] = fastest_layout(*arguments)
        self.k_BHTK, self.v_BHTV = (
            empty_cache(
                self.batch,
                self.heads,
                self.keys,
                self.head_dim,
                settings.layouts[size],
                settings.device,
                settings.dtype,
            ).normal_()
            for _ in range(2)
        )
        if settings.backend is None:
            q_BHK = self.k_BHTK[:, :, 0].contiguous()
            settings.backend = fastest_backend(q_BHK, self.k_BHTK, self.v_BHTV, settings.clock)
        self.provider = settings.backend

    def _visible_keys(self, position: int) -> int:
        """Keys that the query at `position` sees, its own included."""
        return position + 1

    def step(self, x_BD: Tensor) -> Tensor:
        """Project, rotate, append, attend, project."""
        self.qkv_BC = self._project(x_BD)
        self._append()
        return self.mixer.out(self._attend().flatten(1))

    def _project(self, x_BD: Tensor) -> Tensor:
        qkv_B1C = self.mixer.qkv(x_BD[:, None])
        if self.history_BWC is not None:
            qkv_B1C, history_BWC = self.mixer.conv(qkv_B1C, self.history_BWC)
            self.history_BWC.copy_(history_BWC)
        return qkv_B1C[:, 0]

    def _append(self) -> None:
        position = self.settings.cell.context
        self.q_BHK = self.settings.ops.rotate_append(
            self.qkv_BC,
            self.mixer.rotary.cos[position],
            self.mixer.rotary.sin[position],
            self.k_BHTK[:, :, self.slot],
            self.v_BHTV[:, :, self.slot],
        )

    def _attend(self) -> Tensor:
        return attend_one(self.q_BHK, self.k_BHTK, self.v_BHTV, self.provider)

    def kv_bytes(self) -> int:
        """Counted on the tensors."""
        return self.k_BHTK.nbytes + self.v_BHTV.nbytes

    def state_bytes(self) -> int:
        """Inputs of a short convolution, if there is one."""
        return 0 if self.history_BWC is None else self.history_BWC.nbytes

    def traffic(self) -> Traffic:
        """Everything is read; one token per sequence is written."""
        states = self.state_bytes()
        return Traffic(self.kv_bytes() + states, self.kv_bytes() // self.keys + states)

    def pieces(self) -> Pieces:
        """Rotation with append, and attention."""
        return {"append": self._append, "attention": self._attend}


class PaddedHamLayer(DecodeLayer):
    """HAM in plain torch: routed keys of each sequence side by side, padded to the longest.

    It does what a HAM step does and can be captured, but reads padding and masks it.
    """

    provider = "torch_padded"

    def prepare(self) -> None:
        """States, and as many keys for each sequence as it holds."""
        device, dtype = self.settings.device, self.settings.dtype
        counts_B, last_B = self._held()
        self.routed_B = tuple(counts_B.tolist())
        self.slots = max(self.routed_B) + 1
        sizes = (self.batch, self.heads, self.slots, self.head_dim)
        self.k_BHNK = torch.randn(sizes, device=device, dtype=dtype)
        self.v_BHNV = torch.randn(sizes, device=device, dtype=dtype)
        self.rows_B = torch.arange(self.batch, device=device)
        self.counts_B = counts_B
        seen_B1 = (counts_B + last_B)[:, None]
        self.visible_B11N = (torch.arange(self.slots, device=device) < seen_B1)[:, None, None]
        self.state_BHKV = STATE_SCALE * torch.randn(
            self.batch, self.heads, self.head_dim, self.head_dim, device=device
        )
        self.history_BWC = self.mixer.conv.init_history(self.batch, device, dtype).normal_()

    def _held(self) -> tuple[Tensor, Tensor]:
        """Tokens in each cache before the step, and whether that of the step joins: by the hash."""
        cell, device = self.settings.cell, self.settings.device
        routed_BT = forced_mask(
            self.index, self.batch, cell.context + 1, cell.fraction, cell.routing, device
        )
        return routed_BT[:, :-1].sum(dim=1), routed_BT[:, -1]

    def step(self, x_BD: Tensor) -> Tensor:
        """All parts in order."""
        self.x_B1D = x_BD[:, None]
        self._recur()
        self._score()
        self._append()
        self._attend()
        return self._combine()[:, 0]

    def _recur(self) -> None:
        """Projections, convolution, recurrent step."""
        position = self.settings.cell.context
        projected = self.mixer._project(self.x_B1D, self.history_BWC, position)
        self.projected = projected
        self.o_BHV, state_BHKV, self.prediction_BHV = gated_delta_rule_step(
            projected.recurrent_q_BTHK[:, 0],
            projected.recurrent_k_BTHK[:, 0],
            projected.v_BTHV[:, 0],
            projected.log_decay_BTH[:, 0],
            projected.beta_BTH[:, 0],
            self.state_BHKV,
        )
        self.state_BHKV.copy_(state_BHKV)
        self.history_BWC.copy_(projected.history_BWC)

    def _score(self) -> None:
        """Score and threshold; the decision itself is forced."""
        score_BTH = self.mixer._score_of_prediction(self.prediction_BHV[:, None], self.projected)
        self.routing = self.mixer.router(self.x_B1D, score_BTH, self.settings.cell.context)

    def _append(self) -> None:
        self.k_BHNK[self.rows_B, :, self.counts_B] = self.projected.attention_k_BTHK[:, 0]
        self.v_BHNV[self.rows_B, :, self.counts_B] = self.projected.v_BTHV[:, 0]

    def _attend(self) -> None:
        self.attended_BHTV = F.scaled_dot_product_attention(
            self.projected.attention_q_BTHK.transpose(1, 2),
            self.k_BHNK,
            self.v_BHNV,
            attn_mask=self.visible_B11N,
        )

    def _combine(self) -> Tensor:
        attended_BTHV = self.attended_BHTV.transpose(1, 2)
        return self.mixer._combine(self.x_B1D, self.o_BHV[:, None], attended_BTHV)

    def kv_bytes(self) -> int:
        """Keys, values and counts, padding included."""
        return self.k_BHNK.nbytes + self.v_BHNV.nbytes + self.counts_B.nbytes

    def state_bytes(self) -> int:
        """Recurrent state and convolution inputs."""
        return self.state_BHKV.nbytes + self.history_BWC.nbytes

    def traffic(self) -> Traffic:
        """States both ways; routed keys and values read, one token per sequence written."""
        pair = 2 * self.heads * self.head_dim * self.k_BHNK.element_size()
        states = self.state_bytes()
        return Traffic(states + pair * (sum(self.routed_B) + self.batch), states + pair)

    def occupancy(self) -> Occupancy:
        """Counts of the sequences against the padded slots."""
        return Occupancy(self.routed_B, self.batch * self.slots)

    def pieces(self) -> Pieces:
        """Recurrence, score, append, attention, and norms with gates."""
        return {
            "recurrent": self._recur,
            "score": self._score,
            "append": self._append,
            "attention": self._attend,
            "gates": self._combine,
        }
