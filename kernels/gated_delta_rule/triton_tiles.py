"""Tile sizes of the Triton gated delta rule, and what its launches hand to each other."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ham.kernels.triton_target import interpreting, target_of

CHUNK = 64
GLUON_VERSIONS = ("3.6.",)


class Gates(NamedTuple):
    """What launch 1 makes of every chunk; X stands for batch × heads, M for chunks.

    Attributes:
        gates_XM3C: Cumulative decay in units of log2, high and low part, and beta; float32.
        inverse_XMCC: `(I + L)^-1 - I`, in the dtype of the keys.
        passing_XM: Log2 of a bound on the factor by which a state passes the chunk, float32; empty
            where sequences are not cut into segments.
    """

    gates_XM3C: Tensor
    inverse_XMCC: Tensor
    passing_XM: Tensor


@dataclass(frozen=True)
class Tile:
    """How a kernel is cut.

    Attributes:
        block_v: Columns of V that one program owns.
        warps: Warps per program.
        stages: Depth of the software pipeline over chunks.
        descriptors: Load through tensor descriptors where `use_descriptors` allows.
    """

    block_v: int
    warps: int
    stages: int
    descriptors: bool = True


def padded(size: int) -> int:
    """Head size as a tile holds it: a power of two, at least the 16 that a matrix unit takes."""
    return max(16, 1 << (size - 1).bit_length())


def precision(dtype: torch.dtype) -> str:
    """How products treat float32 operands: one or three products in the 10-bit tf32."""
    return "tf32" if dtype == torch.bfloat16 else "tf32x3"


def decay_parts(dtype: torch.dtype) -> int:
    """How many float32 numbers stand for a cumulative decay; one is good to 3e-5."""
    return 1 if dtype == torch.bfloat16 else 2


@dataclass(frozen=True)
class GradientTile:
    """How the gradients local to a chunk are cut.

    Attributes:
        block_k: Columns of K that one program owns.
        block_v: Columns of V that it reads at a time; all of them where `chunks` is not 0.
        warps: Warps per program.
        stages: Depth of the software pipeline.
        chunks: Chunks that one program takes in a row, all columns of V at once; 0 for one chunk
            in two passes over V.
    """

    block_k: int
    block_v: int
    warps: int
    stages: int
    chunks: int = 0


@dataclass(frozen=True)
class InverseTile:
    """How the launch of inverses is cut; one warp per chunk.

    Attributes:
        block_k: Columns of K read at a time.
        stages: Depth of the software pipeline over them.
        registers: Most registers per thread, 0 for no bound; 168 let 12 warps share a
            multiprocessor instead of 8.
        precision: Of the products of 16 × 16 blocks: `half`, `tf32` or `tf32x3`.
    """

    block_k: int
    stages: int
    registers: int
    precision: str


# Each was compared with float64 on an H100 under Triton 3.6; compare before adding one. Gradients
# of keys came out wrong with 32 key and 64 value columns, hence the bound on the width in `tiles`.
WALK_TILES = (Tile(64, 4, 2), Tile(32, 4, 2), Tile(32, 4, 3))
GRADIENT_TILES = (GradientTile(64, 64, 4, 2), GradientTile(64, 32, 4, 2))
INVERSE_TILES = (InverseTile(64, 3, 0, "half"),)
FLOAT32_INVERSE_TILES = (InverseTile(64, 3, 0, "tf32x3"),)
FLOAT32_TILES = (Tile(32, 4, 1),)
FLOAT32_GRADIENT_TILES = (GradientTile(64, 32, 4, 1),)

DEPENDENT_LAUNCH = False
REVERSE_DESCRIPTORS = False

# What is worth timing on a new device beside the above.
CANDIDATES = {
    "inverse": (
        InverseTile(64, 3, 0, "tf32"),
        InverseTile(64, 3, 0, "half"),
        InverseTile(64, 3, 168, "half"),
        InverseTile(32, 3, 168, "half"),
        InverseTile(32, 1, 0, "half"),
        InverseTile(32, 1, 128, "half"),
    ),
    "walk": (Tile(64, 4, 2), Tile(64, 4, 3), Tile(32, 4, 2), Tile(32, 4, 3), Tile(128, 8, 2)),
    "reverse": (
        Tile(64, 4, 2, False),
        Tile(64, 4, 2),
        Tile(32, 4, 2),
        Tile(32, 4, 3, False),
        Tile(32, 4, 3),
    ),
    "segment": (Tile(64, 4, 2), Tile(64, 4, 3), Tile(32, 4, 2), Tile(32, 4, 3)),
    "gradient": (
        GradientTile(64, 64, 4, 2),
        GradientTile(64, 128, 4, 2, 8),
        GradientTile(64, 128, 4, 2, 32),
        GradientTile(64, 128, 8, 2, 16),
        GradientTile(32, 128, 4, 2, 16),
    ),
}


def fit(tile: Tile, width: int) -> Tile:
    """`tile`, no wider than `width`."""
    return replace(tile, block_v=min(tile.block_v, padded(width)))


def fit_gradient(tile: GradientTile, key_size: int, value_size: int) -> GradientTile:
    """`tile`, no wider than the head, and in its two-pass form no wider in V than in K."""
    block_k = min(tile.block_k, padded(key_size))
    if tile.chunks:
        return replace(tile, block_k=block_k, block_v=padded(value_size))
    return replace(tile, block_k=block_k, block_v=min(tile.block_v, block_k, padded(value_size)))


def tiles(kernel: str, dtype: torch.dtype, key_size: int, value_size: int) -> tuple[Any, ...]:
    """Every tile that `kernel` may be given.

    Kernels: `inverse`, `walk`, `saving_walk`, `segment`, `reverse`, `gradient`.
    """
    if kernel == "inverse":
        return FLOAT32_INVERSE_TILES if dtype == torch.float32 else INVERSE_TILES
    if kernel == "gradient":
        listed = FLOAT32_GRADIENT_TILES if dtype == torch.float32 else GRADIENT_TILES
        return tuple(dict.fromkeys(fit_gradient(tile, key_size, value_size) for tile in listed))
    listed = FLOAT32_TILES if dtype == torch.float32 else WALK_TILES
    if kernel == "reverse" and dtype != torch.float32:
        listed = tuple(replace(tile, descriptors=REVERSE_DESCRIPTORS) for tile in listed)
    return tuple(dict.fromkeys(fit(tile, value_size) for tile in listed))


@functools.cache
def choose_tile(kernel: str, dtype: torch.dtype, key_size: int, value_size: int) -> Any:
    """The tile of `kernel`; neither batch nor length play a part, so neither recompiles."""
    legal = tiles(kernel, dtype, key_size, value_size)
    if kernel in ("inverse", "gradient") or len(legal) == 1:
        return legal[0]
    wide, narrow, deep = (legal[0], *legal[-2:])
    if key_size <= 64:
        return deep
    return narrow if kernel == "saving_walk" else wide


def use_descriptors(x: Tensor) -> bool:
    """Whether a kernel loads through tensor descriptors, which Hopper has hardware for.

    Not in float32: with one pipeline stage, all that fits there, Triton 3.6 compiles them to
    accesses out of bounds now and then.
    """
    if x.dtype == torch.float32:
        return interpreting()
    return target_of(x.device).capability >= (9, 0)


def use_gluon(x: Tensor, key_size: int, value_size: int) -> bool:
    """Whether the kernels written for Hopper alone serve: bfloat16, sizes 64 and 128.

    They are written in Gluon, Triton's lower level, whose interface Triton calls experimental:
    other versions than those it was tried with take the plain kernels.
    """
    fits = x.dtype == torch.bfloat16 and key_size in (64, 128) and value_size in (64, 128)
    return fits and target_of(x.device).capability[0] == 9 and gluon_known() and not interpreting()


@functools.cache
def gluon_known() -> bool:
    """Whether this Triton's Gluon is one that the kernels were tried with."""
    import triton

    return triton.__version__.startswith(GLUON_VERSIONS)


def register_bound(device: torch.device) -> dict[str, int]:
    """Launch option without which ptxas for sm_80 gives the forward walk 32 registers a thread.

    It then spills 8 KiB a thread at K = V = 128; told that it may take 255, it takes them.
    """
    return {} if target_of(device).capability >= (9, 0) else {"maxnreg": 255}


def dependent_launch(device: torch.device) -> bool:
    """Whether kernels of the forward start while the one before ends, as Hopper can."""
    return DEPENDENT_LAUNCH and not interpreting() and target_of(device).capability >= (9, 0)


def dependent(device: torch.device, follows: bool) -> dict[str, bool]:
    """Launch options of a kernel that, if it `follows` at once, waits for the one before itself."""
    if follows and dependent_launch(device):
        return {"PDL": True, "launch_pdl": True}
    return {"PDL": False}


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    return torch.empty(size, dtype=torch.int8, device="cuda")


def allow_descriptors() -> None:
    """Let kernels build tensor descriptors, for which Triton asks its user for scratch memory.

    The setting belongs to the current context, and autograd runs backwards in threads of their own,
    so the launcher calls this every time.
    """
    import triton

    triton.set_allocator(_scratch)
