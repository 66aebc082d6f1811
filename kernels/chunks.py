"""Pieces that the chunked recurrences share: precision, layout, decay products, a solve.

Letters beyond those of `ham/model/mixer.py`: M number of chunks, C tokens per chunk.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

CPU_CHUNK = 32
DEVICE_CHUNK = 64


def resolve_chunk_size(chunk_size: int | None, device: torch.device) -> int:
    """The chunk size asked for, or a good one for the device.

    On two CPU cores 32 was the fastest of 32, 64 and 128 for the gated delta rule with head sizes
    32 and 64 at T = 1024, and within 10 % of 64 for Mamba-2 (`ham kernels bench`); accelerators
    prefer fewer, larger products.

    Raises:
        ValueError: If it is below 1.
    """
    if chunk_size is None:
        return CPU_CHUNK if device.type == "cpu" else DEVICE_CHUNK
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, not {chunk_size}")
    return chunk_size


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """Float64 if any tensor is float64, float32 otherwise: a recurrence adds up rounding errors."""
    given = [tensor.dtype for tensor in tensors if tensor is not None]
    return torch.float64 if torch.float64 in given else torch.float32


def full_precision(function: Callable[..., Any]) -> Callable[..., Any]:
    """Switch autocast off inside `function`, on the device of its first positional tensor.

    Without this a bfloat16 autocast region would turn every matrix product of a recurrence into
    bfloat16, state included.
    """

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        device = next(value.device for value in args if isinstance(value, Tensor))
        with torch.autocast(device.type, enabled=False):
            return function(*args, **kwargs)

    return wrapped


def split_chunks(x_BTHX: Tensor, chunk: int) -> Tensor:
    """Lay `[B, T, H, ...]` out as `[M, B, H, C, ...]`; the last chunk is filled with zeros."""
    padding = -x_BTHX.shape[1] % chunk
    if padding:
        x_BTHX = F.pad(x_BTHX, (0, 0) * (x_BTHX.ndim - 2) + (0, padding))
    x_BMCHX = x_BTHX.unflatten(1, (-1, chunk))
    return x_BMCHX.movedim((1, 3), (0, 2)).contiguous()


def merge_chunks(x_MBHCX: Tensor, length: int) -> Tensor:
    """Undo `split_chunks` and drop the fill: `[M, B, H, C, X]` to `[B, T, H, X]`."""
    return x_MBHCX.movedim((0, 2), (1, 3)).flatten(1, 2)[:, :length].contiguous()


def decay_products(cumulative_XC: Tensor, dtype: torch.dtype) -> Tensor:
    """`exp(c_i - c_j)` for i >= j and 0 above the diagonal; no gradient.

    Args:
        cumulative_XC: Float64 `[..., C]`; inclusive cumulative sum of the log decay in each
            chunk. In float32 its differences lose what strong decay adds up: at -10 a token, 64
            tokens deep, 3e-5 of every product.
        dtype: Of the result `[..., C, C]`.
    """
    size = cumulative_XC.shape[-1]
    future_CC = torch.ones(size, size, dtype=torch.bool, device=cumulative_XC.device).triu(1)
    difference = (cumulative_XC.unsqueeze(-1) - cumulative_XC.unsqueeze(-2)).to(dtype)
    # Masked before the exponential: above the diagonal the differences are positive and overflow.
    # Not in place: torch 2.11 compiles an autograd function whose forward changes its result in
    # place into one with gradient 0, without a word, on a CPU as on a GPU.
    return difference.masked_fill(future_CC, -torch.inf).exp()


class _DecayMatrix(torch.autograd.Function):
    """`decay_products` with its gradient; autograd would keep three matrices where one will do."""

    @staticmethod
    def forward(ctx: Any, cumulative_MBHC: Tensor, dtype: torch.dtype) -> Tensor:
        matrix = decay_products(cumulative_MBHC, dtype)
        ctx.save_for_backward(matrix)
        return matrix

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (matrix,) = ctx.saved_tensors
        # Both sums hold the same entries, which have to cancel: in float32 the gradient of the
        # decay rate of Mamba-2 was off by 1e-4 under strong decay, in float64 by 3e-7.
        flow = (grad * matrix).double()
        return flow.sum(-1) - flow.sum(-2), None


def decay_matrix(cumulative_MBHC: Tensor, dtype: torch.dtype) -> Tensor:
    """Differentiable `decay_products`."""
    return _DecayMatrix.apply(cumulative_MBHC, dtype)


def unit_triangular_inverse(lower: Tensor) -> Tensor:
    """`(I + tril(lower, -1))^-1`, batched; the diagonal and everything above it is ignored."""
    eye = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device)
    return torch.linalg.solve_triangular(
        lower, eye.expand_as(lower), upper=False, unitriangular=True
    )
