"""What the static gate compiles of the Triton Mamba-2 recurrence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ham.kernels.compile_cases import CompileCase
from ham.kernels.ssd.triton_backward import gradients
from ham.kernels.ssd.triton_forward import walk
from ham.kernels.ssd.triton_states import Segments, accumulate, chunk_gates
from ham.kernels.ssd.triton_tiles import (
    Kernel,
    Tile,
    choose_chunk,
    choose_gradient,
    choose_tile,
    tiles,
)
from ham.kernels.triton_target import target_of

HEADS = 4
CHUNKS = 2
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class Sizes:
    """Sizes of one compile case; `groups` is 1 or `HEADS`."""

    head: int
    state: int
    groups: int
    dtype: torch.dtype = torch.bfloat16

    @property
    def name(self) -> str:
        """For names of cases."""
        return f"P{self.head} S{self.state} G{self.groups} {NAMES[self.dtype]}"

    def sequence(self, chunk: int, *tail: int) -> Tensor:
        """Zeros over a sequence of `CHUNKS` chunks."""
        return torch.zeros(1, CHUNKS * chunk, *tail, dtype=self.dtype)

    def states(self) -> Tensor:
        """States of every chunk."""
        return torch.zeros(HEADS, CHUNKS, self.state, self.head, dtype=self.dtype)

    @property
    def gradient(self) -> Kernel:
        """The kernel of the gradients."""
        return choose_gradient(self.dtype, self.head, HEADS, self.groups)

    def segments(self) -> Segments:
        """Two segments."""
        return Segments(torch.zeros(HEADS, 2, self.state, self.head), torch.zeros(HEADS, 2))


def _gates(chunk: int) -> Tensor:
    return torch.zeros(HEADS, CHUNKS, 3, chunk)


def _chunk_gates(chunk: int) -> None:
    chunk_gates(torch.zeros(1, CHUNKS * chunk, HEADS), torch.zeros(HEADS), chunk)


def _walk(sizes: Sizes, tile: Tile, *, save: bool, several: bool) -> None:
    projection = sizes.sequence(tile.chunk, sizes.groups, sizes.state)
    walk(
        sizes.sequence(tile.chunk, HEADS, sizes.head),
        projection,
        projection,
        torch.zeros(HEADS),
        _gates(tile.chunk),
        None,
        sizes.segments() if several else None,
        2 if several else 1,
        tile,
        save=save,
    )


def _accumulate(sizes: Sizes, tile: Tile, *, forward: bool) -> None:
    """Forward the sums over segments, backward the reverse walk."""
    accumulate(
        sizes.sequence(tile.chunk, sizes.groups, sizes.state),
        sizes.sequence(tile.chunk, HEADS, sizes.head),
        _gates(tile.chunk),
        None,
        None,
        2 if forward else 1,
        tile,
        forward=forward,
        sums=sizes.segments() if forward else None,
        states_XMSP=None if forward else sizes.states(),
    )


def _gradients(sizes: Sizes, tile: Tile) -> None:
    x_BTHP = sizes.sequence(tile.chunk, HEADS, sizes.head)
    projection = sizes.sequence(tile.chunk, sizes.groups, sizes.state)
    states = sizes.states()
    rates = torch.zeros(HEADS)
    gates = _gates(tile.chunk)
    gradients(
        x_BTHP,
        x_BTHP,
        projection,
        projection,
        rates,
        rates,
        gates,
        states,
        states,
        sizes.gradient,
        tile,
    )


def _launch(launch: Callable[..., None], kernel: Kernel, sizes: Sizes, tile: Tile | None) -> None:
    """With the tile of the target unless another is given."""
    chunk, target = choose_chunk(sizes.dtype), target_of(torch.device("cpu"))
    launch(sizes, tile or choose_tile(kernel, sizes.dtype, sizes.head, chunk, target))


def _cases(sizes: Sizes, default: tuple[str, ...] = ()) -> tuple[CompileCase, ...]:
    """Every kernel with the tile of the target and with every tile that it may be given.

    Args:
        sizes: Sizes of all cases.
        default: What the default set has with the tile of the target.
    """
    launches: dict[str, tuple[Kernel, Callable[..., None]]] = {
        "saving walk": ("walk", partial(_walk, save=True, several=False)),
        "walk over segments": ("walk", partial(_walk, save=False, several=True)),
        "reverse walk": ("accumulate", partial(_accumulate, forward=False)),
        "segment sums": ("accumulate", partial(_accumulate, forward=True)),
        sizes.gradient.replace("_", " "): (sizes.gradient, _gradients),
    }
    cases = []
    for name, (kernel, launch) in launches.items():
        call = partial(_launch, launch, kernel, sizes)
        cases.append(CompileCase(f"{name} {sizes.name}", partial(call, None), name in default))
        cases += [
            CompileCase(f"{name} {sizes.name} {tile.name}", partial(call, tile), default=False)
            for tile in tiles(kernel, sizes.dtype, sizes.head, choose_chunk(sizes.dtype))
        ]
    return tuple(cases)


COMPILE_CASES: tuple[CompileCase, ...] = (
    CompileCase("chunk gates C64", partial(_chunk_gates, 64)),
    *_cases(
        Sizes(128, 128, HEADS),
        ("saving walk", "walk over segments", "reverse walk", "segment sums", "gradient"),
    ),
    *_cases(Sizes(64, 128, 1), ("group gradient",)),
    *_cases(Sizes(64, 64, 1)),
    *_cases(Sizes(64, 64, HEADS)),
    *_cases(Sizes(32, 128, HEADS), ("group gradient",)),
    *_cases(Sizes(32, 16, HEADS)),
    *_cases(Sizes(128, 128, 1)),
    *_cases(Sizes(64, 64, 1, torch.float32)),
    *_cases(Sizes(128, 128, HEADS, torch.float32)),
)
