"""How the Triton kernels of the Mamba-2 recurrence are cut."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Literal

import torch

from ham.kernels.gated_delta_rule.triton_tiles import padded
from ham.kernels.triton_target import Target

Kernel = Literal["walk", "accumulate", "gradient", "group_gradient"]


@dataclass(frozen=True)
class Tile:
    """How a kernel is cut.

    Attributes:
        chunk: Tokens per chunk; the same in all launches of one call.
        block_p: Columns of P that one program owns (`gradient`: takes at a time).
        warps: Warps per program.
        stages: Depth of the software pipeline, over chunks or over blocks of columns.
        descriptors: Load through tensor descriptors where the device and the tensors allow it.
        split: `gradient` only: one program for dc and another for db and dx.
    """

    chunk: int
    block_p: int
    warps: int
    stages: int
    descriptors: bool = False
    split: bool = False

    @property
    def name(self) -> str:
        """For tables and compile cases."""
        flags = ("d" if self.descriptors else "") + ("r" if self.split else "")
        return f"C{self.chunk} BP{self.block_p} w{self.warps} s{self.stages} {flags}".rstrip()


# The first one is used on Hopper, the last one before it.
TILES: dict[Kernel, tuple[Tile, ...]] = {
    "walk": (Tile(64, 64, 4, 2, descriptors=True), Tile(64, 64, 4, 2), Tile(64, 32, 4, 2)),
    "accumulate": (Tile(64, 64, 4, 3, descriptors=True), Tile(64, 64, 4, 3)),
    "gradient": (Tile(64, 32, 4, 2, split=True),),
    "group_gradient": (Tile(64, 64, 4, 2),),
}
# Float32 operands take twice the registers and three products; half a chunk spills least.
FLOAT32_TILES: dict[Kernel, tuple[Tile, ...]] = {
    "walk": (Tile(32, 16, 4, 1),),
    "accumulate": (Tile(32, 32, 4, 1),),
    "gradient": (Tile(32, 16, 4, 1, split=True),),
    "group_gradient": (Tile(32, 16, 4, 1),),
}
# What is worth timing in bfloat16 on a GPU. Tiles of one call have one chunk size. Chunks of 128
# tokens halve the states that training writes and reads; their tiles spill registers.
CANDIDATES: dict[Kernel, tuple[Tile, ...]] = {
    "walk": (
        *TILES["walk"],
        Tile(64, 64, 4, 3, descriptors=True),
        Tile(64, 64, 4, 1),
        Tile(64, 32, 4, 2, descriptors=True),
        Tile(64, 32, 4, 3, descriptors=True),
        Tile(64, 128, 8, 2, descriptors=True),
        Tile(128, 64, 8, 2, descriptors=True),
        Tile(128, 64, 8, 2),
        Tile(128, 64, 8, 1),
        Tile(128, 32, 8, 2, descriptors=True),
    ),
    "accumulate": (
        *TILES["accumulate"],
        Tile(64, 32, 4, 3, descriptors=True),
        Tile(64, 32, 4, 4, descriptors=True),
        Tile(64, 32, 4, 3),
        Tile(64, 64, 4, 2),
        Tile(64, 128, 8, 3, descriptors=True),
        Tile(64, 128, 8, 2),
        Tile(128, 64, 4, 2, descriptors=True),
        Tile(128, 32, 4, 2, descriptors=True),
        Tile(128, 32, 4, 3, descriptors=True),
        Tile(128, 64, 4, 2),
    ),
    "gradient": (
        *TILES["gradient"],
        Tile(64, 32, 4, 2),
        Tile(64, 32, 4, 3, split=True),
        Tile(64, 64, 4, 1, split=True),
        Tile(64, 64, 4, 2, split=True),
        Tile(64, 64, 4, 2),
        Tile(128, 32, 8, 2, split=True),
        Tile(128, 64, 8, 2, split=True),
        Tile(128, 64, 8, 1),
    ),
    "group_gradient": (
        *TILES["group_gradient"],
        Tile(64, 32, 4, 2),
        Tile(64, 64, 4, 1),
        Tile(64, 64, 4, 3),
        Tile(128, 32, 8, 2),
        Tile(128, 64, 8, 2),
    ),
}
CHUNKS = {torch.float32: 32, torch.bfloat16: 64}
WAVES = 2
# Narrower heads fit into one block of columns: the loop of `gradient` has one round and is unrolled
# to products that are not pipelined, and in bfloat16 these were wrong on an H100 (README).
NARROWEST_OWN_HEAD = 64


def tiles(kernel: Kernel, dtype: torch.dtype, head_size: int, chunk: int) -> tuple[Tile, ...]:
    """Every tile that `kernel` ships with for inputs of `dtype`, no wider than P."""
    listed = (FLOAT32_TILES if dtype == torch.float32 else TILES)[kernel]
    fitted = (replace(t, block_p=min(t.block_p, padded(head_size))) for t in listed)
    return tuple(dict.fromkeys(tile for tile in fitted if tile.chunk == chunk))


def choose_gradient(dtype: torch.dtype, head_size: int, heads: int, groups: int) -> Kernel:
    """The kernel of the gradients inside a chunk: `gradient` for b and c per head, where it is
    right; for narrow heads in bfloat16 the one for shared b and c, with groups of one head."""
    right = dtype == torch.float32 or head_size >= NARROWEST_OWN_HEAD
    return "gradient" if groups == heads and right else "group_gradient"


def choose_chunk(dtype: torch.dtype) -> int:
    """Tokens per chunk of one call with inputs of `dtype`."""
    return CHUNKS[dtype]


@functools.cache
def choose_tile(
    kernel: Kernel, dtype: torch.dtype, head_size: int, chunk: int, target: Target
) -> Tile:
    """The tile of `kernel`; the length of the sequence plays no part."""
    return tiles(kernel, dtype, head_size, chunk)[0 if target.capability >= (9, 0) else -1]


def count_segments(programs: int, chunks: int, multiprocessors: int) -> int:
    """Segments that each sequence is cut into, so that every multiprocessor has two programs.

    Args:
        programs: Programs with one segment.
        chunks: Chunks of a sequence.
        multiprocessors: Of the device.
    """
    return max(1, min(chunks, 2 * multiprocessors // programs))


def count_head_blocks(heads: int, programs: int, multiprocessors: int) -> int:
    """Blocks that the heads of a group are cut into for the gradients of b and c, a power of two.

    Few, because the sums of each block are written in float32; enough for `WAVES` rounds of two
    programs on every multiprocessor.

    Args:
        heads: Heads of a group.
        programs: Programs with one block.
        multiprocessors: Of the device.
    """
    blocks = 1
    while blocks * 2 <= heads and blocks * programs < WAVES * 2 * multiprocessors:
        blocks *= 2
    return blocks
