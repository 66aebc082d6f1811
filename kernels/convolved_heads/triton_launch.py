"""Launches of the Triton kernels: contiguous tensors in, new tensors out."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ham.kernels.convolved_heads.arguments import EPSILON
from ham.kernels.convolved_heads.triton_kernels import (
    forward_kernel,
    input_gradient_kernel,
    map_gradient_kernel,
)
from ham.kernels.triton_launch import launch

# Elements of half a head that a program holds at a time: 8 a thread of 4 warps, 4 in the gradient,
# which holds 2 W + 2 sums over them as well and would spill 464 bytes with 8.
HALF_BLOCK = 1024
GRADIENT_HALF_BLOCK = 512
SEGMENT_TOKENS = 512
INPUT_BLOCK = (16, 128)
WARPS = 4


class Layout(NamedTuple):
    """Where the heads lie among the channels.

    Attributes:
        heads, key_size, value_size: H, K, V.
    """

    heads: int
    key_size: int
    value_size: int

    @property
    def parts(self) -> tuple[tuple[int, int, bool], ...]:
        """Of q, k and v: first channel, size of a head, whether it becomes a unit vector."""
        width = self.heads * self.key_size
        return (
            (0, self.key_size, True),
            (width, self.key_size, True),
            (2 * width, self.value_size, False),
        )


class Tables(NamedTuple):
    """Rotary tables and the elements from one sequence to the next, 0 where they share."""

    cos: Tensor | None
    sin: Tensor | None
    stride: int


def tables(cos: Tensor | None, sin: Tensor | None) -> Tables:
    """Contiguous tables `[T, K / 2]` or `[B, T, K / 2]`."""
    if cos is None:
        return Tables(None, None, 0)
    return Tables(cos.contiguous(), sin.contiguous(), cos[0].numel() if cos.ndim == 3 else 0)


def block_sizes(size: int, elements: int) -> tuple[int, int]:
    """Tokens of a block of so many elements, and padded half of a head of this size."""
    half = max(triton.next_power_of_2(triton.cdiv(size, 2)), 8)
    return elements // half, half


def maps(
    x_BTC: Tensor,
    weight_WC: Tensor,
    gains: tuple[Tensor | None, Tensor | None],
    rotation: Tables,
    history_BWC: Tensor | None,
    layout: Layout,
) -> tuple[list[Tensor], list[Tensor | None]]:
    """q, k and v of the recurrent branch, and q and k of attention or None."""
    batch, length, channels = x_BTC.shape
    recurrent: list[Tensor] = []
    attention: list[Tensor | None] = []
    for (first, size, unit), gain_K in zip(layout.parts, (*gains, None), strict=True):
        tokens, half = block_sizes(size, HALF_BLOCK)
        shape = (batch, length, layout.heads, size)
        recurrent.append(x_BTC.new_empty(shape))
        attention.append(None if gain_K is None else x_BTC.new_empty(shape))
        launch(
            forward_kernel,
            (triton.cdiv(length, tokens), batch, layout.heads),
            x_BTC,
            history_BWC,
            weight_WC,
            gain_K,
            rotation.cos if unit else None,
            rotation.sin if unit else None,
            recurrent[-1],
            attention[-1],
            length,
            rotation.stride,
            FIRST=first,
            C=channels,
            H=layout.heads,
            D=size,
            W=weight_WC.shape[0],
            BT=tokens,
            BD=half,
            EPSILON=EPSILON,
            UNIT=unit,
            num_warps=WARPS,
        )
    return recurrent, attention[:2]


class Gradients(NamedTuple):
    """Of everything that can have one."""

    dx_BTC: Tensor
    dweight_WC: Tensor
    dgains: tuple[Tensor | None, Tensor | None]


def gradients(
    drecurrent: list[Tensor],
    dattention: list[Tensor | None],
    x_BTC: Tensor,
    weight_WC: Tensor,
    gains: tuple[Tensor | None, Tensor | None],
    rotation: Tables,
    layout: Layout,
) -> Gradients:
    """Back through the maps, then through the convolution; weights in float32."""
    batch, length, channels = x_BTC.shape
    width = weight_WC.shape[0]
    dy_BTC = torch.empty_like(x_BTC)
    segments = triton.cdiv(length, SEGMENT_TOKENS)
    wide = {"device": x_BTC.device, "dtype": torch.float32}
    dweight_SWC = torch.empty(batch * segments, width, channels, **wide)
    dgains: list[Tensor | None] = []
    per_part = zip(layout.parts, (*gains, None), drecurrent, (*dattention, None), strict=True)
    for (first, size, unit), gain_K, dr_BTHD, da_BTHD in per_part:
        tokens, half = block_sizes(size, GRADIENT_HALF_BLOCK)
        dgain_SHK = None
        if gain_K is not None:
            dgain_SHK = torch.empty(batch * segments, layout.heads, size, **wide)
        launch(
            map_gradient_kernel,
            (segments, batch, layout.heads),
            x_BTC,
            weight_WC,
            gain_K,
            rotation.cos if unit else None,
            rotation.sin if unit else None,
            dr_BTHD,
            da_BTHD,
            dy_BTC,
            dweight_SWC,
            dgain_SHK,
            length,
            segments,
            rotation.stride,
            FIRST=first,
            C=channels,
            H=layout.heads,
            D=size,
            W=width,
            BT=tokens,
            BD=half,
            STEPS=SEGMENT_TOKENS // tokens,
            EPSILON=EPSILON,
            UNIT=unit,
            num_warps=WARPS,
        )
        dgains.append(None if dgain_SHK is None else dgain_SHK.sum((0, 1)))
    dx_BTC = torch.empty_like(x_BTC)
    tokens, block = INPUT_BLOCK
    launch(
        input_gradient_kernel,
        (triton.cdiv(length, tokens), triton.cdiv(channels, block), batch),
        dy_BTC,
        weight_WC,
        dx_BTC,
        length,
        C=channels,
        W=width,
        BT=tokens,
        BC=block,
        num_warps=WARPS,
    )
    return Gradients(dx_BTC, dweight_SWC.sum(0), (dgains[0], dgains[1]))
