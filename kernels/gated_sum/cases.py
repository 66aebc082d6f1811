"""Problem sizes and random inputs on which providers are compared."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ham.kernels.draws import normals
from ham.kernels.gated_sum.cost import cost
from ham.kernels.registry import Cost


@dataclass(frozen=True)
class GatedSumCase:
    """One problem size; every third token of attention's read-out is exactly zero."""

    batch: int
    time: int
    heads: int
    size: int

    @property
    def name(self) -> str:
        """Readable and unique within the operation."""
        return f"B{self.batch} T{self.time} H{self.heads} V{self.size}"

    def cost(self, dtype: torch.dtype) -> Cost:
        """FLOPs and bytes of one forward pass."""
        return cost(batch=self.batch, time=self.time, heads=self.heads, size=self.size, dtype=dtype)

    def inputs(self, dtype: torch.dtype, device: torch.device, seed: int) -> dict[str, Tensor]:
        """Keyword arguments of `gated_sum`."""
        normal = normals(torch.Generator().manual_seed(seed))
        rows = (self.batch, self.time)
        attended_BTHV = normal(*rows, self.heads, self.size)
        attended_BTHV[:, ::3] = 0
        inputs = {
            "recurrent_BTHV": normal(*rows, self.heads, self.size) / 8,
            "attended_BTHV": attended_BTHV,
            "gates_BTH": 2 * normal(*rows, 2 * self.heads),
            "recurrent_gain_V": 1 + normal(self.size) / 4,
            "attention_gain_V": 1 + normal(self.size) / 4,
        }
        return {name: value.to(device, dtype) for name, value in inputs.items()}


VERIFY_CASES = (
    GatedSumCase(1, 1, 1, 16),
    GatedSumCase(3, 63, 3, 24),
    GatedSumCase(1, 500, 5, 32),
    GatedSumCase(2, 65, 2, 64),
    GatedSumCase(1, 130, 1, 128),
)

SPEED_CASES = (GatedSumCase(4, 1024, 4, 64),)
