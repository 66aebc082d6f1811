"""Tile sizes of Triton routed attention, and how its kernels get at their rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ham.kernels.triton_target import interpreting, target_of

# Packed rows come in multiples of this; the rows beyond the count, up to the next multiple, are
# zero, so that a block of keys needs no mask. Every block of keys divides it.
PACK_ROWS = 128
KERNELS = ("forward", "query_gradient", "key_gradient")


@dataclass(frozen=True)
class Tile:
    """How a kernel is cut.

    Attributes:
        queries: Queries of a block.
        keys: Packed keys of a block.
        warps: Warps per program.
        stages: Depth of the software pipeline; at least 2, see `use_descriptors`.
        registers: Most registers a thread may use; at 128 two programs of 8 warps share a
            multiprocessor. Default: what the compiler takes.
    """

    queries: int
    keys: int
    warps: int
    stages: int
    registers: int | None = None

    @property
    def name(self) -> str:
        """Readable and unique."""
        name = f"{self.queries}x{self.keys} w{self.warps} s{self.stages}"
        return name + (f" r{self.registers}" if self.registers else "")

    @property
    def options(self) -> dict[str, int | None]:
        """Options of a launch."""
        return {"num_warps": self.warps, "maxnreg": self.registers}


def padded(size: int) -> int:
    """Head size as a tile holds it: a power of two, at least the 16 that a matrix unit takes."""
    return max(16, 1 << (size - 1).bit_length())


def packed_rows(time: int) -> int:
    """Capacity of the packed tensors."""
    return (time + PACK_ROWS - 1) // PACK_ROWS * PACK_ROWS


def precision(dtype: torch.dtype) -> str:
    """How products treat float32 operands; three products in the 10-bit tf32 are good to 1e-6."""
    return "tf32x3" if dtype == torch.float32 else "tf32"


# By kernel and whether a padded head size exceeds 64. Spilled registers, where there are any, lie
# outside the loops (Triton 3.6); the numbers are in the README.
HOPPER = {
    ("forward", True): Tile(128, 64, 8, 2, 128),
    ("forward", False): Tile(128, 64, 8, 2, 128),
    ("query_gradient", True): Tile(128, 64, 8, 3),
    ("query_gradient", False): Tile(128, 64, 8, 2),
    ("key_gradient", True): Tile(64, 64, 4, 2),
    ("key_gradient", False): Tile(64, 128, 8, 2),
}
AMPERE = {
    ("forward", True): Tile(128, 64, 8, 2),
    ("forward", False): Tile(128, 64, 8, 2),
    ("query_gradient", True): Tile(64, 64, 8, 2),
    ("query_gradient", False): Tile(64, 64, 4, 2),
    ("key_gradient", True): Tile(64, 64, 8, 2),
    ("key_gradient", False): Tile(32, 64, 4, 2),
}
FLOAT32 = {
    ("forward", True): Tile(32, 32, 8, 2),
    ("forward", False): Tile(32, 32, 4, 2),
    ("query_gradient", True): Tile(32, 32, 8, 2),
    ("query_gradient", False): Tile(32, 32, 4, 2),
    ("key_gradient", True): Tile(16, 32, 8, 2),
    ("key_gradient", False): Tile(32, 32, 4, 2),
}

# What is worth timing on Hopper in 16-bit types.
CANDIDATES = {
    "forward": (
        Tile(128, 128, 8, 2),
        Tile(128, 64, 8, 2),
        Tile(128, 64, 8, 3),
        Tile(128, 64, 8, 2, 128),
        Tile(128, 64, 4, 2),
        Tile(64, 64, 4, 2),
        Tile(64, 64, 4, 2, 128),
        Tile(64, 128, 4, 2),
    ),
    "query_gradient": (
        Tile(128, 64, 8, 2),
        Tile(128, 64, 8, 3),
        Tile(128, 128, 8, 2),
        Tile(64, 64, 4, 2),
        Tile(64, 64, 4, 2, 168),
        Tile(64, 128, 8, 2),
        Tile(64, 128, 4, 2),
    ),
    "key_gradient": (
        Tile(64, 128, 8, 2),
        Tile(64, 128, 8, 3),
        Tile(64, 64, 4, 2),
        Tile(64, 64, 8, 2),
        Tile(128, 64, 8, 2),
        Tile(32, 128, 8, 2),
    ),
}


def choose_tile(kernel: str, q_BTHK: Tensor, v_BTGV: Tensor) -> Tile:
    """The tile of one of `KERNELS` for these tensors; the length of the sequence plays no part."""
    wide = max(padded(q_BTHK.shape[-1]), padded(v_BTGV.shape[-1])) > 64
    if q_BTHK.dtype == torch.float32:
        return FLOAT32[kernel, wide]
    capability = target_of(q_BTHK.device).capability
    return (HOPPER if capability >= (9, 0) else AMPERE)[kernel, wide]


def use_descriptors(*tensors: Tensor) -> bool:
    """Whether rows are loaded through tensor descriptors, for which Hopper has hardware (TMA).

    Not in float32 on a GPU, and never in a loop with one pipeline stage: under Triton 3.6 on an
    H100 both gave wrong results. Head sizes that are no power of two go through pointers and masks.
    """
    if any(x.shape[-1] != padded(x.shape[-1]) or x.data_ptr() % 16 for x in tensors):
        return False
    if tensors[0].dtype == torch.float32:
        return interpreting()
    return target_of(tensors[0].device).capability >= (9, 0)


def lines(x_BHN: Tensor, length: int, descriptors: bool) -> Tensor | TensorDescriptor:
    """A number per query as the key gradient takes it: aligned pieces of `length` numbers.

    As pointers, every thread would fetch its 16 numbers one by one: 32 more loads in the inner loop
    and 90 bytes of spilled registers at head size 128 (sm_90, Triton 3.6).
    """
    if not descriptors:
        return x_BHN
    return TensorDescriptor.from_tensor(x_BHN.flatten(), [length])


def token_rows(x_BTHD: Tensor, rows: int, descriptors: bool) -> Tensor | TensorDescriptor:
    """A contiguous tensor as `load_tokens` takes it: blocks of `rows` tokens of one head.

    Heads go before tokens: only leading unit axes vanish from a load, any other one costs a trip
    through registers.
    """
    if not descriptors:
        return x_BTHD
    return TensorDescriptor.from_tensor(x_BTHD.transpose(1, 2), [1, 1, rows, x_BTHD.shape[-1]])


def packed_blocks(x_BGND: Tensor, rows: int, descriptors: bool) -> Tensor | TensorDescriptor:
    """Packed rows as `load_packed` takes them: blocks of `rows` rows."""
    if not descriptors:
        return x_BGND
    return TensorDescriptor.from_tensor(x_BGND.flatten(0, 2), [rows, x_BGND.shape[-1]])
