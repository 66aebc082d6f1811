"""The gated sum through Triton: limits, custom operators, autograd.

Importing this module does not import Triton; the kernels are imported when they are first called.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ham.errors import ConfigError
from ham.kernels.eager import direct, traced, traced_backward
from ham.kernels.triton_target import interpreting

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LARGEST_HEAD = 256


def check_limits(recurrent_BTHV: Tensor) -> None:
    """Raise `ConfigError` for what the kernels cannot do; shapes fit together already."""
    legal = DTYPES[1:] if interpreting() else DTYPES
    if recurrent_BTHV.dtype not in legal or recurrent_BTHV.shape[-1] > LARGEST_HEAD:
        raise ConfigError(
            f"provider 'triton' takes read-outs of {', '.join(map(str, legal))} and head sizes up "
            f"to {LARGEST_HEAD}, not {recurrent_BTHV.dtype} and {recurrent_BTHV.shape[-1]}"
        )


def forward(
    recurrent: Tensor,
    attended: Tensor,
    gates: Tensor,
    recurrent_gain: Tensor,
    attention_gain: Tensor,
) -> tuple[Tensor]:
    """The sum."""
    from ham.kernels.gated_sum.triton_kernels import add

    tensors = (recurrent, attended, gates, recurrent_gain, attention_gain)
    return (add(*(each.contiguous() for each in tensors)),)


@torch.library.custom_op("ham::gated_sum_forward", mutates_args=())
def forward_op(
    recurrent: Tensor,
    attended: Tensor,
    gates: Tensor,
    recurrent_gain: Tensor,
    attention_gain: Tensor,
) -> Tensor:
    """`forward` without the tuple."""
    return forward(recurrent, attended, gates, recurrent_gain, attention_gain)[0]


@forward_op.register_fake
def _(recurrent, attended, gates, recurrent_gain, attention_gain):
    return torch.empty_like(recurrent, memory_format=torch.contiguous_format)


def backward(
    dy: Tensor,
    recurrent: Tensor,
    attended: Tensor,
    gates: Tensor,
    recurrent_gain: Tensor,
    attention_gain: Tensor,
) -> tuple[Tensor, ...]:
    """Gradients of all five inputs; those of the gains in float32."""
    from ham.kernels.gated_sum.triton_kernels import gradients

    tensors = (dy, recurrent, attended, gates, recurrent_gain, attention_gain)
    return tuple(gradients(*(each.contiguous() for each in tensors)))


backward_op = torch.library.custom_op(
    "ham::gated_sum_backward",
    mutates_args=(),
    schema="(Tensor dy, Tensor recurrent, Tensor attended, Tensor gates, Tensor recurrent_gain, "
    "Tensor attention_gain) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)(backward)


@backward_op.register_fake
def _(dy, recurrent, attended, gates, recurrent_gain, attention_gain):
    dgains = [dy.new_empty(dy.shape[-1], dtype=torch.float32) for _ in range(2)]
    contiguous = torch.contiguous_format
    branches = (recurrent, attended, gates)
    return (*(torch.empty_like(x, memory_format=contiguous) for x in branches), *dgains)


def _save(ctx: Any, inputs: tuple, output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
    tensors = (dy, *ctx.saved_tensors)
    function = backward_op if traced_backward(*tensors) else backward
    made = function(*tensors)
    return tuple(grad.to(given.dtype) for grad, given in zip(made, ctx.saved_tensors, strict=True))


forward_op.register_autograd(_differentiate, setup_context=_save)
_direct = direct(forward, _save, _differentiate, public=1)


def triton(
    recurrent_BTHV: Tensor,
    attended_BTHV: Tensor,
    gates_BTH: Tensor,
    recurrent_gain_V: Tensor,
    attention_gain_V: Tensor,
) -> Tensor:
    """The gated sum in one Triton kernel each way.

    Raises:
        ConfigError: For dtypes and sizes that the kernels lack.
    """
    check_limits(recurrent_BTHV)
    tensors = (recurrent_BTHV, attended_BTHV, gates_BTH, recurrent_gain_V, attention_gain_V)
    if traced(*tensors):
        return forward_op(*tensors)
    needed = any(each.requires_grad for each in tensors)
    function = _direct if needed and torch.is_grad_enabled() else forward
    return function(*tensors)[0]
