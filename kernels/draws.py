"""Random inputs of the cases that providers are compared on."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def normals(
    generator: torch.Generator,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float64,
) -> Callable[..., Tensor]:
    """`normal(*shape)`: standard normal numbers, drawn on the CPU in float64, then moved and cast.

    So that every device and dtype gets the same numbers, up to rounding.
    """

    def normal(*shape: int) -> Tensor:
        drawn = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return drawn.to(device, dtype)

    return normal
