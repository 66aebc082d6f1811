"""Problem sizes and random inputs on which providers are compared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ham.kernels.convolved_heads.arguments import Rotation
from ham.kernels.convolved_heads.cost import cost
from ham.kernels.draws import normals
from ham.kernels.registry import Cost


@dataclass(frozen=True)
class ConvolvedHeadsCase:
    """One problem size.

    Attributes:
        attention: With q and k for attention.
        rotated: With rotary tables for them.
    """

    batch: int
    time: int
    heads: int
    key_size: int
    value_size: int
    width: int = 4
    attention: bool = True
    rotated: bool = True

    @property
    def name(self) -> str:
        """Readable and unique within the operation."""
        name = f"B{self.batch} T{self.time} H{self.heads} K{self.key_size} V{self.value_size}"
        name += f" W{self.width}"
        return name + (" attention" if self.attention else "") + (" rope" if self.rotated else "")

    def cost(self, dtype: torch.dtype) -> Cost:
        """FLOPs and bytes of one forward pass."""
        return cost(
            batch=self.batch,
            time=self.time,
            heads=self.heads,
            key_size=self.key_size,
            value_size=self.value_size,
            width=self.width,
            dtype=dtype,
            attention=self.attention,
        )

    def inputs(self, dtype: torch.dtype, device: torch.device, seed: int) -> dict[str, Any]:
        """Keyword arguments of `convolved_heads`; tables stay in float32, as in a model."""
        generator = torch.Generator().manual_seed(seed)
        normal = normals(generator, device, dtype)
        channels = self.heads * (2 * self.key_size + self.value_size)
        inputs: dict[str, Any] = {
            "x_BTC": normal(self.batch, self.time, channels),
            "weight_WC": normal(self.width, channels),
            "heads": self.heads,
            "key_size": self.key_size,
        }
        if self.attention:
            inputs["q_gain_K"] = 1 + normal(self.key_size) / 4
            inputs["k_gain_K"] = 1 + normal(self.key_size) / 4
        if self.attention and self.rotated:
            shape = (self.time, self.key_size // 2)
            angle = 6.3 * torch.rand(shape, generator=generator, dtype=torch.float64)
            inputs["rotation"] = Rotation(
                *(table.to(device, torch.float32) for table in (angle.cos(), angle.sin()))
            )
        return inputs


VERIFY_CASES = (
    ConvolvedHeadsCase(3, 1, 3, 16, 16),
    ConvolvedHeadsCase(1, 3, 1, 16, 24, width=3),
    ConvolvedHeadsCase(3, 63, 3, 24, 24, rotated=False),
    ConvolvedHeadsCase(2, 65, 2, 32, 64, attention=False),
    ConvolvedHeadsCase(1, 300, 2, 64, 64),
    ConvolvedHeadsCase(1, 130, 1, 128, 128),
)

SPEED_CASES = (ConvolvedHeadsCase(4, 1024, 4, 64, 64),)
