"""Problem sizes and random inputs on which providers of the Mamba-2 recurrence are compared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.nn import functional as F

from ham.kernels.draws import normals
from ham.kernels.registry import Cost
from ham.kernels.ssd.cost import cost

STEP_LARGE = 0.625


@dataclass(frozen=True)
class SsdCase:
    """One problem size.

    Attributes:
        gates: `typical`: step sizes and decay rates as a trained layer has them. `extreme`: step
            sizes of 0 and 0.625 mixed in, the latter with a log decay of -0.6 to -10.
        groups: Groups of heads that share b and c, with an axis for them. Default: all heads share
            one b and c, without such an axis.
    """

    batch: int
    time: int
    heads: int
    head_size: int
    state_size: int
    chunk_size: int = 64
    initial_state: bool = False
    gates: Literal["typical", "extreme"] = "typical"
    groups: int | None = None

    @property
    def name(self) -> str:
        """Readable and unique within the operation."""
        name = f"B{self.batch} T{self.time} H{self.heads} P{self.head_size} S{self.state_size}"
        name += f" C{self.chunk_size}"
        name += f" G{self.groups}" if self.groups else ""
        name += " state" if self.initial_state else ""
        return name + (" extreme" if self.gates == "extreme" else "")

    def cost(self, dtype: torch.dtype) -> Cost:
        """FLOPs and bytes of one forward pass."""
        return cost(
            batch=self.batch,
            time=self.time,
            heads=self.heads,
            head_size=self.head_size,
            state_size=self.state_size,
            dtype=dtype,
            groups=self.groups or 1,
            initial_state=self.initial_state,
        )

    def inputs(self, dtype: torch.dtype, device: torch.device, seed: int) -> dict[str, Any]:
        """Keyword arguments of `ssd`; dt, a and D are at least float32."""
        generator = torch.Generator().manual_seed(seed)
        normal = normals(generator)
        rows = (self.batch, self.time)
        projection = (
            (*rows, self.groups, self.state_size) if self.groups else (*rows, self.state_size)
        )
        rates = torch.rand(self.heads, generator=generator, dtype=torch.float64)
        tensors = {
            "x_BTHP": normal(*rows, self.heads, self.head_size),
            "dt_BTH": F.softplus(normal(*rows, self.heads) - 3.0),
            "a_H": -(1.0 + 15.0 * rates),
            "b_BTS": normal(*projection),
            "c_BTS": normal(*projection) * self.state_size**-0.5,
            "d_H": normal(self.heads),
        }
        if self.gates == "extreme":
            kind = torch.randint(0, 4, (*rows, self.heads), generator=generator)
            tensors["dt_BTH"][kind == 0] = STEP_LARGE
            tensors["dt_BTH"][kind == 1] = 0.0
        if self.initial_state:
            tensors["initial_state_BHPS"] = normal(
                self.batch, self.heads, self.head_size, self.state_size
            )
        wide = torch.promote_types(dtype, torch.float32)
        narrow = ("x_BTHP", "b_BTS", "c_BTS")
        inputs: dict[str, Any] = {
            name: tensor.to(device, dtype if name in narrow else wide)
            for name, tensor in tensors.items()
        }
        return {**inputs, "chunk_size": self.chunk_size}


VERIFY_CASES = (
    SsdCase(3, 1, 3, 16, 24),
    SsdCase(3, 63, 1, 16, 24, initial_state=True),
    SsdCase(1, 64, 3, 24, 16),
    SsdCase(3, 65, 3, 16, 24, initial_state=True, gates="extreme"),
    SsdCase(1, 200, 3, 32, 32, chunk_size=32),
    SsdCase(1, 512, 2, 64, 64),
    SsdCase(1, 65, 3, 24, 16, groups=3, gates="extreme"),
    SsdCase(1, 70, 4, 16, 24, chunk_size=32, initial_state=True, groups=2),
)

SPEED_CASES = tuple(
    SsdCase(4, 1024, 4, size, size, chunk_size=chunk_size)
    for size in (32, 64)
    for chunk_size in (32, 64)
)
