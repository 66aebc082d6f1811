"""Tile sizes of the Triton gated delta rule, and what its launches hand to each other."""

from __future__ import annotations

from dataclasses import dataclass, replace
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


def precision(dtype: torch.dtype) -> str:
    """How products treat float32 operands: one or three products in the 10-bit tf32."""
    return "tf32" if dtype == torch.bfloat16 else "tf32x3"


def decay_parts(dtype: torch.dtype) -> int:
    """How many float32 numbers stand for a cumulative decay; one is good to 3e-5."""
    return 1 if dtype == torch.bfloat16 else 2


# The first tile of a list is the rule. A walk without a software pipeline (one stage) over bfloat16
# and 32 columns reads out of bounds on Hopper (Triton 3.6), so none is listed.
WALK_TILES = (Tile(64, 4, 2), Tile(32, 4, 3))
REVERSE_TILES = (Tile(32, 4, 2), Tile(64, 4, 2))
GRADIENT_TILES = (Tile(64, 8, 1), Tile(64, 4, 2), Tile(32, 4, 2))
FLOAT32_TILES = (Tile(32, 4, 1),)
MULTIPROCESSORS = 132


def fit(tile: Tile, value_size: int) -> Tile:
    """`tile`, no wider than the values."""
    return replace(tile, block_v=min(tile.block_v, padded(value_size)))


def tiles(kernel: str, v_BTHV: Tensor) -> tuple[Tile, ...]:
    """Every tile that `kernel`, one of `walk`, `reverse` and `gradient`, may be given."""
    listed = {"walk": WALK_TILES, "reverse": REVERSE_TILES, "gradient": GRADIENT_TILES}[kernel]
    if v_BTHV.dtype == torch.float32:
        listed = FLOAT32_TILES
    return tuple(dict.fromkeys(fit(tile, v_BTHV.shape[-1]) for tile in listed))


def choose_tile(kernel: str, v_BTHV: Tensor) -> Tile:
    """The tile of `kernel` for these values; the length of the sequence plays no part."""
    wide, *rest = tiles(kernel, v_BTHV)
    batch, _, heads, value_size = v_BTHV.shape
    programs = batch * heads * triton.cdiv(value_size, wide.block_v)
    if kernel == "walk" and rest and programs < MULTIPROCESSORS // 2:
        return rest[0]
    return wide


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    return torch.empty(size, dtype=torch.int8, device="cuda")


def allow_descriptors() -> None:
    """Let kernels build tensor descriptors, for which Triton asks its user for scratch memory.

    The setting belongs to the current context, and autograd runs backwards in threads of their own,
    so every launcher calls this.
    """
    triton.set_allocator(_scratch)
