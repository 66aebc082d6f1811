"""Tile sizes of the Triton gated delta rule, and what its launches hand to each other."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ham.kernels.triton_target import target_of

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


# Each was compared with float64 on an H100 under Triton 3.6; compare before adding one. Gradients
# of keys came out wrong with 32 key and 64 value columns, hence the bound on the width in `tiles`.
WALK_TILES = (Tile(64, 4, 2), Tile(32, 4, 2), Tile(32, 4, 3))
GRADIENT_TILES = (Tile(64, 4, 2), Tile(32, 4, 2))
FLOAT32_TILES = (Tile(32, 4, 1),)
MULTIPROCESSORS = 132


def fit(tile: Tile, width: int) -> Tile:
    """`tile`, no wider than `width`."""
    return replace(tile, block_v=min(tile.block_v, padded(width)))


def tiles(kernel: str, dtype: torch.dtype, key_size: int, value_size: int) -> tuple[Tile, ...]:
    """Every tile that `kernel` may be given: `walk`, `saving_walk`, `reverse` or `gradient`."""
    width = min(padded(key_size), value_size) if kernel == "gradient" else value_size
    listed = GRADIENT_TILES if kernel == "gradient" else WALK_TILES
    if dtype == torch.float32:
        listed = FLOAT32_TILES
    return tuple(dict.fromkeys(fit(tile, width) for tile in listed))


def choose_tile(kernel: str, q_BTHK: Tensor, v_BTHV: Tensor) -> Tile:
    """The tile of `kernel` for these tensors; the length of the sequence plays no part."""
    batch, _, heads, value_size = v_BTHV.shape
    key_size = q_BTHK.shape[-1]
    legal = tiles(kernel, v_BTHV.dtype, key_size, value_size)
    if kernel == "gradient" or len(legal) == 1:
        return legal[0]
    wide, narrow, deep = (fit(tile, value_size) for tile in WALK_TILES)
    if key_size <= 64 or batch * heads * triton.cdiv(value_size, 64) < MULTIPROCESSORS // 2:
        return deep
    return narrow if kernel == "saving_walk" else wide


def use_descriptors(v_BTHV: Tensor) -> bool:
    """Whether the forward walk loads through tensor descriptors, which Hopper has hardware for.

    Not in float32: with one pipeline stage, all that fits there, Triton 3.6 compiles them to
    accesses out of bounds now and then.
    """
    if v_BTHV.dtype == torch.float32:
        return not v_BTHV.is_cuda
    return target_of(v_BTHV.device).capability >= (9, 0)


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    return torch.empty(size, dtype=torch.int8, device="cuda")


def allow_descriptors() -> None:
    """Let kernels build tensor descriptors, for which Triton asks its user for scratch memory.

    The setting belongs to the current context, and autograd runs backwards in threads of their own,
    so the launcher calls this every time.
    """
    triton.set_allocator(_scratch)
