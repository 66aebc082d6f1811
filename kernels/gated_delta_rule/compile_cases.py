"""What the static gate compiles of the gated delta rule: every kernel with every shipped tile.

Cases named `given` are cut as the operator cuts them for the target: on Hopper the kernels written
in Gluon, elsewhere the plain ones. The others are the plain kernels, which on Hopper serve float32,
predictions, ragged gradients, and versions of Triton whose Gluon is not known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ham.kernels.compile_cases import CompileCase
from ham.kernels.gated_delta_rule import triton_tiles

SIZES = ((128, 128), (64, 64), (128, 64), (32, 32))
GIVEN_SIZES = SIZES[:3]
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


def _walk(tile: Any, inputs: _Inputs, *, save: bool = False, prediction: bool = False) -> None:
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
        prediction=prediction,
        score="cosine",
        save=save,
    )
    score_heads("cosine", "min", made.sums_N3HR, inputs.gate_BTH)


def _reverse(
    tile: Any, inputs: _Inputs, *, segments: int = SEGMENTS, prediction: bool = False
) -> None:
    from ham.kernels.gated_delta_rule.triton_backward import walk_back

    q_BTHK, do_BTHV = inputs.q_BTHK, inputs.v_BTHV
    walk_back(
        q_BTHK,
        q_BTHK,
        do_BTHV,
        do_BTHV.float() if prediction else None,
        None,
        inputs.gates,
        inputs.transitions_XSKK,
        inputs.sequences,
        1.0,
        tile,
        segments,
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


def _given_walk(inputs: _Inputs, *, save: bool) -> None:
    from ham.kernels.gated_delta_rule.hopper_walk import hopper_walk
    from ham.kernels.gated_delta_rule.triton_score import score_heads

    q_BTHK, v_BTHV = inputs.q_BTHK, inputs.v_BTHV
    if not _use_gluon(inputs):
        _walk(_choose("saving_walk" if save else "walk", inputs), inputs, save=save)
        return
    made = hopper_walk(
        q_BTHK,
        q_BTHK,
        v_BTHV,
        inputs.gates,
        inputs.sequences,
        None,
        1.0,
        1,
        score="cosine",
        save=save,
    )
    score_heads("cosine", "min", made.sums_N3HR, inputs.gate_BTH)


def _given_reverse(inputs: _Inputs) -> None:
    # `walk_back` chooses by itself.
    _reverse(_choose("reverse", inputs), inputs, segments=1)


def _given_gradient(inputs: _Inputs) -> None:
    from ham.kernels.gated_delta_rule.hopper_gradients import hopper_gradients

    q_BTHK, v_BTHV, states_XMKV = inputs.q_BTHK, inputs.v_BTHV, inputs.states_XMKV
    if not _use_gluon(inputs):
        _gradient(_choose("gradient", inputs), inputs)
        return
    hopper_gradients(
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
    )


def _use_gluon(inputs: _Inputs) -> bool:
    sizes = (inputs.q_BTHK.shape[-1], inputs.v_BTHV.shape[-1])
    return triton_tiles.use_gluon(inputs.v_BTHV, *sizes)


def _choose(kernel: str, inputs: _Inputs) -> Any:
    v_BTHV = inputs.v_BTHV
    sizes = (inputs.q_BTHK.shape[-1], v_BTHV.shape[-1])
    return triton_tiles.choose_tile(kernel, v_BTHV.dtype, *sizes)


# Kernel, and whether the default set has its chosen tile at K = V = 128.
LAUNCHES: dict[str, tuple[Callable[..., None], bool]] = {
    "inverse": (_inverse, True),
    "segment": (_segment, True),
    "walk": (_walk, True),
    "saving_walk": (partial(_walk, save=True), False),
    "reverse": (_reverse, True),
    "gradient": (_gradient, True),
}
PREDICTING: dict[str, Callable[..., None]] = {
    "saving_walk": partial(_walk, save=True, prediction=True),
    "reverse": partial(_reverse, prediction=True),
}
GIVEN: dict[str, Callable[[_Inputs], None]] = {
    "walk": partial(_given_walk, save=False),
    "saving_walk": partial(_given_walk, save=True),
    "reverse": _given_reverse,
    "gradient": _given_gradient,
}


def _tile_name(tile: Any) -> str:
    return " ".join(f"{name}{value}" for name, value in vars(tile).items())


def _case(
    name: str,
    launch: Callable[..., None],
    dtype: torch.dtype,
    sizes: tuple[int, int],
    tile: Any = None,
    *,
    default: bool = False,
) -> CompileCase:
    tiles = () if tile is None else (tile,)
    key_size, value_size = sizes
    words = [name, f"K{key_size} V{value_size} {str(dtype).removeprefix('torch.')}"]
    words += [_tile_name(each) for each in tiles]
    return CompileCase(
        " ".join(words), lambda: launch(*tiles, _inputs(dtype, *sizes)), default=default
    )


def _cases() -> Iterator[CompileCase]:
    for sizes in GIVEN_SIZES:
        for kernel, launch in GIVEN.items():
            default = sizes in DEFAULT_SIZES
            yield _case(f"given {kernel}", launch, torch.bfloat16, sizes, default=default)
    for dtype in (torch.bfloat16, torch.float32):
        for sizes in SIZES:
            usual = dtype == torch.bfloat16 and sizes == SIZES[0]
            for kernel, (launch, listed) in LAUNCHES.items():
                chosen = triton_tiles.choose_tile(kernel, dtype, *sizes)
                for tile in triton_tiles.tiles(kernel, dtype, *sizes):
                    default = usual and listed and tile == chosen
                    yield _case(kernel, launch, dtype, sizes, tile, default=default)
            for kernel, launch in PREDICTING.items():
                chosen = triton_tiles.choose_tile(kernel, dtype, *sizes)
                yield _case(f"predicting {kernel}", launch, dtype, sizes, chosen)


COMPILE_CASES: tuple[CompileCase, ...] = tuple(_cases())
