"""Tile sizes of the Triton gated delta rule, and what its launches hand to each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
from torch import Tensor

CHUNK = 64


class Gates(NamedTuple):
    """What launch 1 makes of every chunk; X stands for batch × heads, M for chunks.

    Attributes:
        gates_XM3C: Cumulative decay in units of log2, high and low part, and beta; float32.
        inverse_XMCC: `(I + L)^-1 - I`, in the dtype of the keys.
    """

    gates_XM3C: Tensor
    inverse_XMCC: Tensor


@dataclass(frozen=True)
class Tile:
    """How a kernel is cut.

    Attributes:
        block_v: Columns of V that one program owns.
        warps: Warps per program.
        stages: Depth of the software pipeline over chunks.
    """

    block_v: int
    warps: int
    stages: int


def padded(size: int) -> int:
    """Head size as a tile holds it: a power of two, at least the 16 that a matrix unit takes."""
    return max(16, 1 << (size - 1).bit_length())


def _narrow(v_BTHV: Tensor, block_v: int, warps: int, stages: int) -> Tile:
    if v_BTHV.dtype == torch.float32:
        block_v, stages = 32, 1
    return Tile(min(padded(v_BTHV.shape[-1]), block_v), warps, stages)


def _crowded(v_BTHV: Tensor, block_v: int) -> bool:
    """Whether blocks of that many columns give each of about 130 multiprocessors a program."""
    batch, _, heads, value_size = v_BTHV.shape
    return batch * heads * triton.cdiv(value_size, block_v) >= 128


def tiles(dtype: torch.dtype, value_size: int) -> list[Tile]:
    """Every tile that one of the kernels can be given for values of this size."""
    widths = (32,) if dtype == torch.float32 else (32, 64)
    stages = (1,) if dtype == torch.float32 else (1, 2, 3)
    blocks = sorted({min(padded(value_size), width) for width in widths})
    return [Tile(block, 4, depth) for block in blocks for depth in stages]


def walk_tile(v_BTHV: Tensor, save: bool) -> Tile:
    """Tile of the forward walk over these values; `save` when it writes for the backward."""
    if _crowded(v_BTHV, 64):
        return _narrow(v_BTHV, 64, 4, 2)
    return _narrow(v_BTHV, 32, 4, 3)


def reverse_tile(v_BTHV: Tensor) -> Tile:
    """Tile of the reverse walk."""
    return _narrow(v_BTHV, 32, 4, 2)


def gradient_tile(v_BTHV: Tensor) -> Tile:
    """Tile of the gradients local to a chunk."""
    return _narrow(v_BTHV, 64, 4, 1)


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    return torch.empty(size, dtype=torch.int8, device="cuda")


def allow_descriptors() -> None:
    """Let kernels build tensor descriptors, for which Triton asks its user for scratch memory.

    The setting belongs to the current context, and autograd runs backwards in threads of their own,
    so every launcher calls this.
    """
    triton.set_allocator(_scratch)
