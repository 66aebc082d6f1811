"""Launches of the gated sum that the static gate compiles."""

from __future__ import annotations

from functools import partial

import torch

from ham.kernels.compile_cases import CompileCase
from ham.kernels.gated_sum.triton_kernels import add, gradients

TIME, HEADS = 256, 2
SHORT_NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32"}


def _launch(size: int, dtype: torch.dtype, backward: bool) -> None:
    x_BTHV = torch.zeros(1, TIME, HEADS, size, dtype=dtype)
    gates_BTH = torch.zeros(1, TIME, 2 * HEADS, dtype=dtype)
    gain_V = torch.zeros(size)
    inputs = (x_BTHV, x_BTHV, gates_BTH, gain_V, gain_V)
    if backward:
        gradients(x_BTHV, *inputs)
    else:
        add(*inputs)


COMPILE_CASES = tuple(
    CompileCase(
        f"{'backward' if backward else 'forward'} V{size} {SHORT_NAMES[dtype]}",
        partial(_launch, size, dtype, backward),
        default=size == 64 and dtype == torch.bfloat16,
    )
    for size, dtype in ((64, torch.bfloat16), (128, torch.bfloat16), (64, torch.float32))
    for backward in (False, True)
)
