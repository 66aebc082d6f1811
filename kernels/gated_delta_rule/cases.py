"""Problem sizes and random inputs on which providers of the gated delta rule are compared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.nn import functional as F

from ham.kernels.draws import normals
from ham.kernels.gated_delta_rule.cost import cost
from ham.kernels.registry import Cost

LOG_DECAY_STRONG = -10.0


@dataclass(frozen=True)
class GatedDeltaRuleCase:
    """One problem size.

    Attributes:
        gates: `typical`: decay and beta as a trained layer has them. `extreme`: log decays of -10
            and -0.0 and betas of exactly 0 and 1 mixed in.
        key_heads: Heads of q and k; 0 for those of v.
        lengths: Tokens of each of the sequences that share the one row; empty for a plain batch.
    """

    batch: int
    time: int
    heads: int
    key_size: int
    value_size: int
    chunk_size: int = 64
    initial_state: bool = False
    gates: Literal["typical", "extreme"] = "typical"
    key_heads: int = 0
    lengths: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """Readable and unique within the operation."""
        name = f"B{self.batch} T{self.time} H{self.heads}"
        name += f" G{self.key_heads}" if self.key_heads else ""
        name += f" K{self.key_size} V{self.value_size}"
        name += f" C{self.chunk_size}"
        name += f" N{len(self.lengths)}" if self.lengths else ""
        name += " state" if self.initial_state else ""
        return name + (" extreme" if self.gates == "extreme" else "")

    def cost(self, dtype: torch.dtype) -> Cost:
        """FLOPs and bytes of one forward pass."""
        return cost(
            batch=self.batch,
            time=self.time,
            heads=self.heads,
            key_size=self.key_size,
            value_size=self.value_size,
            dtype=dtype,
            initial_state=self.initial_state,
            key_heads=self.key_heads or None,
            sequences=len(self.lengths) or None,
        )

    def inputs(self, dtype: torch.dtype, device: torch.device, seed: int) -> dict[str, Any]:
        """Keyword arguments of `gated_delta_rule`; keys have unit length, gates are float32."""
        generator = torch.Generator().manual_seed(seed)
        normal = normals(generator)
        rows = (self.batch, self.time, self.heads)
        key_rows = (self.batch, self.time, self.key_heads or self.heads)
        tensors = {
            "q_BTHK": F.normalize(normal(*key_rows, self.key_size), dim=-1),
            "k_BTHK": F.normalize(normal(*key_rows, self.key_size), dim=-1),
            "v_BTHV": normal(*rows, self.value_size),
            "log_decay_BTH": -F.softplus(normal(*rows) - 3.0),
            "beta_BTH": torch.sigmoid(normal(*rows)),
        }
        if self.gates == "extreme":
            kind = torch.randint(0, 4, rows, generator=generator)
            tensors["log_decay_BTH"][kind == 0] = LOG_DECAY_STRONG
            tensors["log_decay_BTH"][kind == 1] = -0.0
            kind = torch.randint(0, 4, rows, generator=generator)
            tensors["beta_BTH"][kind == 0] = 0.0
            tensors["beta_BTH"][kind == 1] = 1.0
        if self.initial_state:
            count = len(self.lengths) or self.batch
            tensors["initial_state_BHKV"] = normal(
                count, self.heads, self.key_size, self.value_size
            )
        wide = torch.promote_types(dtype, torch.float32)
        narrow = ("q_BTHK", "k_BTHK", "v_BTHV")
        inputs: dict[str, Any] = {
            name: tensor.to(device, dtype if name in narrow else wide)
            for name, tensor in tensors.items()
        }
        if self.lengths:
            ends = torch.tensor((0, *self.lengths)).cumsum(0)
            inputs["cu_seqlens_N1"] = ends.to(device, torch.int32)
        return {**inputs, "chunk_size": self.chunk_size}


VERIFY_CASES = (
    GatedDeltaRuleCase(3, 1, 3, 16, 24),
    GatedDeltaRuleCase(3, 63, 1, 16, 24, initial_state=True),
    GatedDeltaRuleCase(1, 64, 3, 24, 16),
    GatedDeltaRuleCase(3, 65, 3, 16, 24, initial_state=True, gates="extreme"),
    GatedDeltaRuleCase(1, 200, 3, 32, 32, chunk_size=32),
    GatedDeltaRuleCase(1, 512, 2, 64, 64),
    GatedDeltaRuleCase(2, 70, 4, 16, 24, initial_state=True, key_heads=2),
    GatedDeltaRuleCase(1, 150, 2, 16, 24, initial_state=True, lengths=(64, 0, 1, 85)),
)

SPEED_CASES = tuple(
    GatedDeltaRuleCase(4, 1024, 4, size, size, chunk_size=chunk_size)
    for size in (32, 64)
    for chunk_size in (32, 64, 128)
)
