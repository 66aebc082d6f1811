"""The short convolution with its maps through Triton: limits, custom operators, autograd.

Importing this module does not import Triton; the kernels are imported when they are first called.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ham.errors import ConfigError
from ham.kernels.convolved_heads.arguments import ConvolvedHeads, Rotation
from ham.kernels.eager import direct, traced, traced_backward
from ham.kernels.triton_target import interpreting

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LARGEST_HEAD = 256
LARGEST_WIDTH = 4
LARGEST_GRID = 65535


def check_limits(
    x_BTC: Tensor,
    weight_WC: Tensor,
    heads: int,
    key_size: int,
    rotation: Rotation | None = None,
    history_BWC: Tensor | None = None,
) -> None:
    """Raise `ConfigError` for what the kernels cannot do; shapes fit together already."""
    legal = DTYPES[1:] if interpreting() else DTYPES
    if x_BTC.dtype not in legal:
        raise ConfigError(
            f"provider 'triton' takes x of {', '.join(map(str, legal))}, not {x_BTC.dtype}"
        )
    value_size = x_BTC.shape[-1] // heads - 2 * key_size
    if key_size % 2 or value_size % 2 or max(key_size, value_size) > LARGEST_HEAD:
        raise ConfigError(
            f"provider 'triton' takes even head sizes up to {LARGEST_HEAD}, not K = {key_size}, "
            f"V = {value_size}"
        )
    if weight_WC.shape[0] > LARGEST_WIDTH:
        raise ConfigError(
            f"provider 'triton' takes convolutions of up to {LARGEST_WIDTH} tokens, not "
            f"{weight_WC.shape[0]}"
        )
    if max(x_BTC.shape[0], heads) > LARGEST_GRID or x_BTC[0].numel() >= 2**31:
        raise ConfigError(
            f"provider 'triton' takes up to {LARGEST_GRID} sequences of 2^31 numbers, not "
            f"{list(x_BTC.shape)}"
        )
    if rotation is not None and rotation.cos.dtype != torch.float32:
        raise ConfigError(
            f"provider 'triton' takes rotary tables of torch.float32, not {rotation.cos.dtype}"
        )
    if history_BWC is not None and torch.is_grad_enabled() and x_BTC.requires_grad:
        raise ConfigError("provider 'triton' has no gradient with a history")


def forward(
    x: Tensor,
    weight: Tensor,
    q_gain: Tensor | None,
    k_gain: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    history: Tensor | None,
    heads: int,
    key_size: int,
) -> tuple[Tensor, ...]:
    """q, k, v of the recurrent branch, then q and k of attention, empty if not asked for."""
    from ham.kernels.convolved_heads.triton_launch import Layout, maps, tables

    layout = Layout(heads, key_size, x.shape[-1] // heads - 2 * key_size)
    recurrent, attention = maps(
        x.contiguous(),
        weight.contiguous(),
        (q_gain, k_gain),
        tables(cos, sin),
        None if history is None else history.contiguous(),
        layout,
    )
    return (*recurrent, *(x.new_empty(0) if part is None else part for part in attention))


forward_op = torch.library.custom_op(
    "ham::convolved_heads_forward",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? q_gain, Tensor? k_gain, Tensor? cos, Tensor? sin, "
    "Tensor? history, int heads, int key_size) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)(forward)


@forward_op.register_fake
def _(x, weight, q_gain, k_gain, cos, sin, history, heads, key_size):
    batch, length, channels = x.shape
    value_size = channels // heads - 2 * key_size
    keys, values = (
        (batch, length, heads, key_size),
        (batch, length, heads, value_size),
    )
    attention = (0,) if q_gain is None else keys
    return tuple(x.new_empty(shape) for shape in (keys, keys, values, attention, attention))


def backward(
    drq: Tensor,
    drk: Tensor,
    dv: Tensor,
    daq: Tensor | None,
    dak: Tensor | None,
    x: Tensor,
    weight: Tensor,
    q_gain: Tensor | None,
    k_gain: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    heads: int,
    key_size: int,
) -> tuple[Tensor | None, ...]:
    """Gradients of x, weights and both gains; weights in float32."""
    from ham.kernels.convolved_heads.triton_launch import Layout, gradients, tables

    layout = Layout(heads, key_size, x.shape[-1] // heads - 2 * key_size)
    made = gradients(
        [part.contiguous() for part in (drq, drk, dv)],
        [None if part is None else part.contiguous() for part in (daq, dak)],
        x.contiguous(),
        weight.contiguous(),
        (q_gain, k_gain),
        tables(cos, sin),
        layout,
    )
    return (made.dx_BTC, made.dweight_WC, *made.dgains)


@torch.library.custom_op(
    "ham::convolved_heads_backward",
    mutates_args=(),
    schema="(Tensor drq, Tensor drk, Tensor dv, Tensor? daq, Tensor? dak, Tensor x, Tensor weight, "
    "Tensor? q_gain, Tensor? k_gain, Tensor? cos, Tensor? sin, int heads, int key_size) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)
def backward_op(
    drq: Tensor,
    drk: Tensor,
    dv: Tensor,
    daq: Tensor | None,
    dak: Tensor | None,
    x: Tensor,
    weight: Tensor,
    q_gain: Tensor | None,
    k_gain: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    heads: int,
    key_size: int,
) -> tuple[Tensor, ...]:
    """`backward`, with empty tensors for what was not asked for."""
    made = backward(drq, drk, dv, daq, dak, x, weight, q_gain, k_gain, cos, sin, heads, key_size)
    return tuple(weight.new_empty(0) if part is None else part for part in made)


@backward_op.register_fake
def _(drq, drk, dv, daq, dak, x, weight, q_gain, k_gain, cos, sin, heads, key_size):
    wide = torch.float32
    gain = (0,) if q_gain is None else (key_size,)
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        weight.new_empty(weight.shape, dtype=wide),
        weight.new_empty(gain, dtype=wide),
        weight.new_empty(gain, dtype=wide),
    )


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, weight, q_gain, k_gain, cos, sin, _, heads, key_size = inputs
    ctx.save_for_backward(x, weight, q_gain, k_gain, cos, sin)
    ctx.heads, ctx.key_size = heads, key_size


def _differentiate(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, q_gain, k_gain, cos, sin = ctx.saved_tensors
    attention = (None, None) if q_gain is None else grads[3:]
    tensors = (*grads[:3], *attention, x, weight, q_gain, k_gain, cos, sin)
    function = backward_op if traced_backward(*tensors) else backward
    dx, dweight, dq_gain, dk_gain = function(*tensors, ctx.heads, ctx.key_size)
    dgains = (None, None)
    if q_gain is not None:
        dgains = (dq_gain.to(q_gain.dtype), dk_gain.to(k_gain.dtype))
    return dx, dweight.to(weight.dtype), *dgains, None, None, None, None, None


forward_op.register_autograd(_differentiate, setup_context=_save)
_direct = direct(forward, _save, _differentiate, public=5)


def triton(
    x_BTC: Tensor,
    weight_WC: Tensor,
    *,
    heads: int,
    key_size: int,
    q_gain_K: Tensor | None,
    k_gain_K: Tensor | None,
    rotation: Rotation | None,
    history_BWC: Tensor | None,
) -> ConvolvedHeads:
    """The short convolution with its maps in Triton kernels.

    Raises:
        ConfigError: For dtypes, sizes and gradients that the kernels lack.
    """
    check_limits(x_BTC, weight_WC, heads, key_size, rotation, history_BWC)
    cos, sin = (None, None) if rotation is None else rotation
    tensors = (x_BTC, weight_WC, q_gain_K, k_gain_K, cos, sin, history_BWC)
    if traced(*tensors):
        function = forward_op
    else:
        needed = any(each is not None and each.requires_grad for each in tensors)
        function = _direct if needed and torch.is_grad_enabled() else forward
    made = function(*tensors, heads, key_size)
    return ConvolvedHeads(*made) if q_gain_K is not None else ConvolvedHeads(*made[:3])
