"""Custom operators without the dispatcher where nobody looks.

A custom operator is what `torch.compile`, fake tensors and other tracers need. Called from eager
code it costs tens of microseconds of the host's time per call, more than the launches inside; there
the same functions are called directly, under a plain `torch.autograd.Function`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

PLAIN = (Tensor, Parameter)


def traced(*tensors: Tensor | None) -> bool:
    """Whether somebody other than autograd follows what is done with these tensors."""
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
        return True
    # The question that torch.autograd.Function.apply asks, too.
    if torch._C._are_functorch_transforms_active():
        return True
    return not all(each is None or type(each) in PLAIN for each in tensors)


def traced_backward(*tensors: Tensor | None) -> bool:
    """`traced` for a backward; with `create_graph` the operator says that it has no second one."""
    return torch.is_grad_enabled() or traced(*tensors)


def direct(
    forward: Callable[..., tuple[Tensor | None, ...]],
    keep: Callable[..., None],
    differentiate: Callable[..., tuple[Tensor | None, ...]],
    public: int,
) -> Callable[..., tuple[Tensor | None, ...]]:
    """An operator's functions as an autograd function.

    Args:
        forward: Gives the outputs.
        keep: `setup_context` of the operator.
        differentiate: Its backward.
        public: How many outputs the caller gets; the others are for the backward only.
    """

    class Direct(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> tuple[Tensor | None, ...]:
            made = forward(*inputs)
            keep(ctx, inputs, made)
            return tuple(made[:public])

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            return differentiate(ctx, *grads)

    return Direct.apply
