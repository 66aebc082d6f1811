"""What the static gate compiles of the gated delta rule: every kernel with every shipped tile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ham.kernels.compile_cases import CompileCase
from ham.kernels.gated_delta_rule import triton_tiles

SIZES = ((128, 128), (64, 64), (128, 64), (32, 32))
DEFAULT_SIZES = SIZES[:2]
TIME, HEADS, SEGMENTS = 256, 2, 4


class _Inputs(NamedTuple):
    """Small tensors for the launchers; nobody reads what is in them."""

    q_BTHK: Tensor
    v_BTHV: Tensor
    gate_BTH: Tensor
    states_XMKV: Tensor
    transitions_XSKK: Tensor
    gates: triton_tiles.Gates
    sequences: Any


def _inputs(dtype: torch.dtype, key_size: int, value_size: int) -> _Inputs:
    from ham.kernels.gated_delta_rule.triton_sequences import sequences_of

    def zeros(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return torch.zeros(shape, dtype=of)

    v_BTHV = zeros(1, TIME, HEADS, value_size)
    chunks = TIME // triton_tiles.CHUNK
    square = (triton_tiles.CHUNK, triton_tiles.CHUNK)
    gates = triton_tiles.Gates(
        zeros(HEADS, chunks, 3, square[0], of=torch.float32),
        zeros(HEADS, chunks, *square),
        zeros(HEADS, chunks, of=torch.float32),
    )
    return _Inputs(
        zeros(1, TIME, HEADS, key_size),
        v_BTHV,
        zeros(1, TIME, HEADS, of=torch.float32),
        zeros(HEADS, chunks, key_size, value_size),
        zeros(HEADS, SEGMENTS - 2, key_size, key_size, of=torch.float32),
        gates,
        sequences_of(v_BTHV, None),
    )


def _inverse(tile: Any, inputs: _Inputs) -> None:
    from ham.kernels.gated_delta_rule.triton_inverse import invert_chunks

    gate_BTH = inputs.gate_BTH
    invert_chunks(inputs.q_BTHK, gate_BTH, gate_BTH, inputs.sequences, tile, passing=True)


def _segment(tile: Any, inputs: _Inputs) -> None:
    from ham.kernels.gated_delta_rule.triton_segments import start_segments

    q_BTHK, v_BTHV = inputs.q_BTHK, inputs.v_BTHV
    start_segments(q_BTHK, v_BTHV, inputs.gates, inputs.sequences, None, SEGMENTS, tile)


def _walk(tile: Any, inputs: _Inputs, *, save: bool = False) -> None:
    from ham.kernels.gated_delta_rule.triton_forward import walk
    from ham.kernels.gated_delta_rule.triton_score import score_heads

    q_BTHK = inputs.q_BTHK
    made = walk(
        q_BTHK,
        q_BTHK,
        inputs.v_BTHV,
        inputs.gates,
        inputs.sequences,
        None,
        1.0,
        tile,
        1,
        prediction=False,
        score="cosine",
        save=save,
    )
    score_heads("cosine", "min", made.sums_N3HR, inputs.gate_BTH)


def _reverse(tile: Any, inputs: _Inputs) -> None:
    from ham.kernels.gated_delta_rule.triton_backward import walk_back

    q_BTHK, do_BTHV = inputs.q_BTHK, inputs.v_BTHV
    walk_back(
        q_BTHK,
        q_BTHK,
        do_BTHV,
        None,
        None,
        inputs.gates,
        inputs.transitions_XSKK,
        inputs.sequences,
        1.0,
        tile,
        SEGMENTS,
        initial=False,
    )


def _gradient(tile: Any, inputs: _Inputs) -> None:
    from ham.kernels.gated_delta_rule.triton_gradients import gradients

    q_BTHK, v_BTHV, states_XMKV = inputs.q_BTHK, inputs.v_BTHV, inputs.states_XMKV
    gradients(
        q_BTHK,
        q_BTHK,
        v_BTHV,
        v_BTHV,
        v_BTHV,
        states_XMKV,
        states_XMKV,
        inputs.gates,
        inputs.sequences,
        1.0,
        tile,
    )


LAUNCHES: dict[str, Callable[..., None]] = {
    "inverse": _inverse,
    "segment": _segment,
    "walk": _walk,
    "saving_walk": partial(_walk, save=True),
    "reverse": _reverse,
    "gradient": _gradient,
}


def _tile_name(tile: Any) -> str:
    return " ".join(f"{name}{value}" for name, value in vars(tile).items())


def _launch(kernel: str, tile: Any, dtype: torch.dtype, key_size: int, value_size: int) -> None:
    LAUNCHES[kernel](tile, _inputs(dtype, key_size, value_size))


def _cases() -> Iterator[CompileCase]:
    for dtype in (torch.bfloat16, torch.float32):
        for key_size, value_size in SIZES:
            for kernel in LAUNCHES:
                chosen = triton_tiles.choose_tile(kernel, dtype, key_size, value_size)
                for tile in triton_tiles.tiles(kernel, dtype, key_size, value_size):
                    yield CompileCase(
                        f"{kernel} K{key_size} V{value_size} {str(dtype).removeprefix('torch.')} "
                        + _tile_name(tile),
                        partial(_launch, kernel, tile, dtype, key_size, value_size),
                        default=(
                            dtype == torch.bfloat16
                            and (key_size, value_size) in DEFAULT_SIZES
                            and tile == chosen
                        ),
                    )


COMPILE_CASES: tuple[CompileCase, ...] = tuple(_cases())
