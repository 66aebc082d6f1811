"""What the static gate compiles of the gated delta rule."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from ham.kernels.compile_cases import CompileCase

TIME, HEADS = 128, 2
SIZES = ((128, 128), (64, 64), (32, 32), (128, 64))
DTYPES = (torch.bfloat16, torch.float32)
KERNELS = ("walk", "saving_walk", "reverse", "gradient")


def _launch(kernel: str, dtype: torch.dtype, key_size: int, value_size: int, number: int) -> None:
    """Launch one kernel with one of its tiles."""
    from ham.kernels.gated_delta_rule import triton_backward, triton_forward, triton_tiles

    q_BTHK = torch.zeros(1, TIME, HEADS, key_size, dtype=dtype)
    v_BTHV = torch.zeros(1, TIME, HEADS, value_size, dtype=dtype)
    chunks = TIME // triton_tiles.CHUNK
    square = (HEADS, chunks, triton_tiles.CHUNK, triton_tiles.CHUNK)
    gates = triton_tiles.Gates(
        torch.zeros(HEADS, chunks, 3, triton_tiles.CHUNK), torch.zeros(square, dtype=dtype)
    )
    tile = triton_tiles.tiles(kernel, dtype, key_size, value_size)[number]
    if kernel == "reverse":
        inputs = (q_BTHK, q_BTHK, v_BTHV, None, None)
        triton_backward.walk_back(*inputs, gates, 1.0, tile, initial=False)
    elif kernel == "gradient":
        states = torch.zeros(HEADS, chunks, key_size, value_size, dtype=dtype)
        inputs = (q_BTHK, q_BTHK, v_BTHV, v_BTHV, v_BTHV, states, states)
        triton_backward.gradients(*inputs, gates, 1.0, tile)
    else:
        triton_forward.walk(
            *(q_BTHK, q_BTHK, v_BTHV, gates, None, 1.0, tile),
            prediction=False,
            score="cosine",
            save=kernel == "saving_walk",
        )


def _inverse(dtype: torch.dtype, key_size: int) -> None:
    from ham.kernels.gated_delta_rule.triton_inverse import invert_chunks

    gate_BTH = torch.zeros(1, TIME, HEADS)
    invert_chunks(torch.zeros(1, TIME, HEADS, key_size, dtype=dtype), gate_BTH, gate_BTH)


def _score() -> None:
    from ham.kernels.gated_delta_rule.triton_forward import score_heads

    score_heads("cosine", torch.zeros(2, 3, 1, HEADS, TIME), torch.zeros(1, TIME, HEADS))


def _cases() -> Iterator[CompileCase]:
    from ham.kernels.gated_delta_rule.triton_tiles import tiles

    yield CompileCase("score cosine", _score)
    for dtype in DTYPES:
        short = {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
        usual = dtype == torch.bfloat16
        for key_size in (128, 64, 32):
            name = f"inverse K{key_size} {short}"
            yield CompileCase(name, partial(_inverse, dtype, key_size), usual and key_size == 128)
        for key_size, value_size in SIZES:
            for kernel in KERNELS:
                for number, tile in enumerate(tiles(kernel, dtype, key_size, value_size)):
                    name = f"{kernel} K{key_size} V{value_size} {short}"
                    name += f" BV{tile.block_v} w{tile.warps} s{tile.stages}"
                    launch: Callable[[], object] = partial(
                        _launch, kernel, dtype, key_size, value_size, number
                    )
                    yield CompileCase(name, launch, usual and key_size == value_size == 128)


COMPILE_CASES = tuple(_cases())
