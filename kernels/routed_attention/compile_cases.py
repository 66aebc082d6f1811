"""Launches of routed attention that the static gate compiles, with the tile of its target."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ham.kernels.compile_cases import CompileCase
from ham.kernels.routed_attention.triton_forward import attend
from ham.kernels.routed_attention.triton_key_gradient import key_gradient
from ham.kernels.routed_attention.triton_pack import Index, pack, scan
from ham.kernels.routed_attention.triton_query_gradient import query_gradient
from ham.kernels.routed_attention.triton_tiles import KERNELS, Tile, choose_tile, packed_rows

TIME = 256
SCALE = 0.125
SHORT_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass(frozen=True)
class Problem:
    """One set of sizes: two query heads, one sequence of `TIME` tokens.

    Attributes:
        switches: With a window, a null key and routing scores.
    """

    key_size: int
    value_size: int
    dtype: torch.dtype
    switches: bool = False

    @property
    def name(self) -> str:
        """Readable and unique."""
        name = f"K{self.key_size} V{self.value_size} {SHORT_NAMES[self.dtype]}"
        return name + (" window sink score" if self.switches else "")

    def zeros(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor of this problem."""
        return torch.zeros(*shape, dtype=dtype or self.dtype)

    def launch(self, kernel: str, tile: Tile | None = None) -> None:
        """Launch one of `KERNELS`, with the tile of the target unless another is given."""
        rows = packed_rows(TIME)
        q, k = self.zeros(1, TIME, 2, self.key_size), self.zeros(1, TIME, 2, self.key_size)
        v, do = self.zeros(1, TIME, 2, self.value_size), self.zeros(1, TIME, 2, self.value_size)
        packed = self.zeros(1, 2, rows, self.key_size), self.zeros(1, 2, rows, self.value_size)
        index = Index(*(self.zeros(1, size, dtype=torch.int32) for size in (rows, TIME)))
        line = self.zeros(1, 2, rows, dtype=torch.float32)
        sink = self.zeros(2, self.key_size, dtype=torch.float32) if self.switches else None
        window = 16 if self.switches else 0
        tile = tile or choose_tile(kernel, q, v)
        if kernel == "forward":
            attend(q, k, v, *packed, index.counts_BT, sink, window, SCALE, tile)
            return
        tensors = (do, q, k, v) if window else (do, q, None, None)
        if kernel == "query_gradient":
            query_gradient(*tensors, *packed, do, line, index.counts_BT, sink, window, SCALE, tile)
        else:
            key_gradient(
                *tensors, *packed, line, line, index, window, SCALE, tile, score=self.switches
            )

    def launch_packing(self) -> None:
        """Launch the scan and the copy."""
        k, v = self.zeros(1, TIME, 2, self.key_size), self.zeros(1, TIME, 2, self.value_size)
        pack(k, v, scan(self.zeros(1, TIME, dtype=torch.bool)))


DEFAULT = (
    Problem(128, 128, torch.bfloat16),
    Problem(128, 128, torch.bfloat16, switches=True),
)
OTHERS = (
    Problem(64, 64, torch.bfloat16),
    Problem(32, 64, torch.bfloat16),
    Problem(72, 40, torch.bfloat16),
    Problem(128, 128, torch.float16),
    Problem(64, 64, torch.float32),
    Problem(128, 128, torch.float32, switches=True),
)


def _cases() -> tuple[CompileCase, ...]:
    cases = [CompileCase(f"pack {DEFAULT[0].name}", DEFAULT[0].launch_packing)]
    for problem in (*DEFAULT, *OTHERS):
        for kernel in KERNELS:
            cases.append(
                CompileCase(
                    f"{kernel} {problem.name}",
                    lambda problem=problem, kernel=kernel: problem.launch(kernel),
                    default=problem in DEFAULT,
                )
            )
    return tuple(cases)


COMPILE_CASES = _cases()
