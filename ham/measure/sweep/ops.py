"""The small operations between matrix products of a decode step, plain or fused by torch.compile.

On a GPU each plain torch operation is a launch, and a step has hundreds; at small batches they
would cost more than the caches. Every architecture therefore gets the same fused forms, with the
batch as a dynamic size, so that they are compiled once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ham.model.blocks import NORM_EPSILON, split_heads
from ham.model.states import RecurrentState

RECOMPILE_LIMIT = 64
PLAIN, FUSED = "torch", "inductor"


def add_norm(x_BD: Tensor, y_BD: Tensor, gain_D: Tensor) -> tuple[Tensor, Tensor]:
    """Residual sum, and its root-mean-square norm."""
    sum_BD = x_BD + y_BD
    return sum_BD, F.rms_norm(sum_BD, gain_D.shape, gain_D, NORM_EPSILON)


def gated_unit(up_BF: Tensor) -> Tensor:
    """SiLU of the first half times the second half."""
    gate_BF, value_BF = up_BF.chunk(2, dim=-1)
    return F.silu(gate_BF) * value_BF


def rotate_append(
    qkv_BC: Tensor,
    cos_K: Tensor,
    sin_K: Tensor,
    k_BHK: Tensor,
    v_BHV: Tensor,
) -> Tensor:
    """Rotate queries and keys; write keys and values to one slot of a cache; returns `q_BHK`.

    Args:
        qkv_BC: Projection of one token per sequence.
        cos_K, sin_K: Row of the rotary table (half a head size, float32).
        k_BHK, v_BHV: Views of the slot, overwritten.
    """
    q, k, v = (split_heads(part, k_BHK.shape[1]) for part in qkv_BC.chunk(3, dim=-1))
    k_BHK.copy_(_rotated(k, cos_K, sin_K))
    v_BHV.copy_(v)
    return _rotated(q, cos_K, sin_K)


def _rotated(x_BHK: Tensor, cos_K: Tensor, sin_K: Tensor) -> Tensor:
    first, second = x_BHK.to(cos_K.dtype).chunk(2, dim=-1)
    turned = torch.cat((first * cos_K - second * sin_K, second * cos_K + first * sin_K), dim=-1)
    return turned.to(x_BHK.dtype)


def recur(mixer: nn.Module, x_BD: Tensor, recurrent: Tensor, history_BWC: Tensor) -> Tensor:
    """A recurrent mixer's step, its state updated in place; returns `y_BD`."""
    state = RecurrentState(recurrent, history_BWC)
    y_BD = mixer.step(x_BD, state)
    recurrent.copy_(state.recurrent)
    history_BWC.copy_(state.history_BWC)
    return y_BD


@dataclass(frozen=True)
class StepOps:
    """One form of the operations above, `torch` or `inductor` by name."""

    name: str
    add_norm: Callable[..., tuple[Tensor, Tensor]]
    gated_unit: Callable[[Tensor], Tensor]
    rotate_append: Callable[..., Tensor]
    recur: Callable[..., Tensor]


@functools.cache
def step_ops(name: str, backend: str = "inductor") -> StepOps:
    """The plain or the fused form; the fused one is made once in a process."""
    plain = StepOps(PLAIN, add_norm, gated_unit, rotate_append, recur)
    if name == PLAIN:
        return plain
    # One version each for a batch of 1 and for others, for every mixer and head size: more than
    # the 8 after which torch gives up.
    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    fuse = functools.partial(torch.compile, dynamic=True, fullgraph=True, backend=backend)
    return replace(
        plain,
        name=FUSED,
        add_norm=fuse(add_norm),
        gated_unit=fuse(gated_unit),
        rotate_append=fuse(rotate_append),
        recur=fuse(recur),
    )
