"""Launches of the short convolution with its maps that the static gate compiles."""

from __future__ import annotations

from functools import partial

import torch

from ham.kernels.compile_cases import CompileCase
from ham.kernels.convolved_heads.triton_launch import Layout, gradients, maps, tables

TIME, HEADS, WIDTH = 256, 2, 4
SHORT_NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32"}


def _launch(size: int, dtype: torch.dtype, attention: bool, backward: bool) -> None:
    layout = Layout(HEADS, size, size)
    x_BTC = torch.zeros(1, TIME, 3 * HEADS * size, dtype=dtype)
    weight_WC = torch.zeros(WIDTH, 3 * HEADS * size)
    gain_K = torch.zeros(size) if attention else None
    table = torch.zeros(TIME, size // 2) if attention else None
    rotation = tables(table, table)
    if not backward:
        maps(x_BTC, weight_WC, (gain_K, gain_K), rotation, None, layout)
        return
    part = x_BTC.new_zeros(1, TIME, HEADS, size)
    of_attention = [part if attention else None] * 2
    gradients([part] * 3, of_attention, x_BTC, weight_WC, (gain_K, gain_K), rotation, layout)


def _cases() -> tuple[CompileCase, ...]:
    sizes = [
        (64, torch.bfloat16, True, True),
        (128, torch.bfloat16, True, False),
        (64, torch.bfloat16, False, False),
        (64, torch.float32, True, False),
    ]
    return tuple(
        CompileCase(
            f"{'backward' if backward else 'forward'} D{size} {SHORT_NAMES[dtype]}"
            + (" attention" if attention else ""),
            partial(_launch, size, dtype, attention, backward),
            default=default,
        )
        for size, dtype, attention, default in sizes
        for backward in (False, True)
    )


COMPILE_CASES = _cases()
