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


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """Float64 if any tensor is float64, float32 otherwise: a recurrence adds up rounding errors."""
    given = [tensor.dtype for tensor in tensors if tensor is not None]
    return torch.float64 if torch.float64 in given else torch.float32


def full_precision(function: Callable[..., Any]) -> Callable[..., Any]:
    """Switch autocast off inside `function`, whose first argument is a tensor.

    Without this a bfloat16 autocast region would turn every matrix product of a recurrence into
    bfloat16, state included.
    """

    @functools.wraps(function)
    def wrapped(first: Tensor, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(first.device.type, enabled=False):
            return function(first, *args, **kwargs)

    return wrapped


def split_chunks(x_BTHX: Tensor, chunk: int) -> Tensor:
    """Lay `[B, T, H, ...]` out as `[B, H, M, C, ...]`; the last chunk is filled with zeros."""
    padding = -x_BTHX.shape[1] % chunk
    if padding:
        x_BTHX = F.pad(x_BTHX, (0, 0) * (x_BTHX.ndim - 2) + (0, padding))
    x_BMCHX = x_BTHX.unflatten(1, (-1, chunk))
    return x_BMCHX.movedim(3, 1).contiguous()


def merge_chunks(x_BHMCX: Tensor, length: int) -> Tensor:
    """Undo `split_chunks` and drop the fill: `[B, H, M, C, X]` to `[B, T, H, X]`."""
    return x_BHMCX.movedim(1, 3).flatten(1, 2)[:, :length].contiguous()


class _DecayMatrix(torch.autograd.Function):
    """`exp(c_i - c_j)` for i >= j, else 0; differences in float64, result in `dtype`.

    In float32 the differences of cumulative sums lose what strong decay adds up: at -10 a token,
    64 tokens deep, 3e-5 of every entry. Written by hand because autograd would keep three
    `[C, C]` matrices where one suffices, and memory traffic is what the CPU path spends.
    """

    @staticmethod
    def forward(ctx: Any, cumulative_X: Tensor, dtype: torch.dtype) -> Tensor:
        size = cumulative_X.shape[-1]
        future_CC = torch.ones(size, size, dtype=torch.bool, device=cumulative_X.device).triu(1)
        difference = (cumulative_X.unsqueeze(-1) - cumulative_X.unsqueeze(-2)).to(dtype)
        # Masked before the exponential: above the diagonal the differences are positive and would
        # overflow.
        matrix = difference.masked_fill_(future_CC, -torch.inf).exp_()
        ctx.save_for_backward(matrix)
        return matrix

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (matrix,) = ctx.saved_tensors
        flow = grad * matrix
        return flow.sum(-1).double() - flow.sum(-2).double(), None


def decay_matrix(cumulative_BHMC: Tensor, dtype: torch.dtype) -> Tensor:
    """Decay from token j to token i of a chunk, `[B, H, M, C, C]`, zero for j > i.

    Args:
        cumulative_BHMC: Float64; inclusive cumulative sum of the log decay within each chunk.
        dtype: Of the result.
    """
    return _DecayMatrix.apply(cumulative_BHMC, dtype)


class _UnitTriangularSolve(torch.autograd.Function):
    """`(I + tril(L, -1))^-1 B`; keeps the inverse, so that backward needs no second solve."""

    @staticmethod
    def forward(ctx: Any, lower: Tensor, right: Tensor) -> Tensor:
        eye = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device)
        inverse = torch.linalg.solve_triangular(
            lower, eye.expand_as(lower), upper=False, unitriangular=True
        )
        solution = inverse @ right
        ctx.save_for_backward(inverse, solution)
        return solution

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        inverse, solution = ctx.saved_tensors
        with torch.autocast(grad.device.type, enabled=False):
            grad_right = inverse.mT @ grad
            grad_lower = (grad_right @ solution.mT).tril_(-1).neg_()
        return grad_lower, grad_right


def unit_triangular_solve(lower: Tensor, right: Tensor) -> Tensor:
    """Solve `(I + tril(lower, -1)) X = right`, batched.

    Args:
        lower: `[..., C, C]`; the diagonal and everything above it is ignored.
        right: `[..., C, X]`.
    """
    return _UnitTriangularSolve.apply(lower, right)
