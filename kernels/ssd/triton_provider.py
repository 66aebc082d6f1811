"""The recurrence of Mamba-2 through Triton: argument checks and PyTorch operators.

Importing this module does not import Triton; the kernels are imported when they are first called.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ham.errors import ConfigError
from ham.kernels.eager import direct, traced, traced_backward
from ham.kernels.ssd.arguments import SsdOutput
from ham.kernels.triton_target import interpreting, target_of

DTYPES = (torch.float32, torch.bfloat16)
LARGEST_SIZE = 128
ROW_BYTES = 16
LARGEST_GRID = 65535


def check_limits(x_BTHP: Tensor, b_BTS: Tensor, c_BTS: Tensor) -> None:
    """Raise `ConfigError` for what the kernels cannot do; shapes fit together already."""
    dtypes = {tensor.dtype for tensor in (x_BTHP, b_BTS, c_BTS)}
    legal = DTYPES[:1] if interpreting() else DTYPES
    if len(dtypes) != 1 or not dtypes <= set(legal):
        raise ConfigError(
            f"provider 'triton' takes x, b and c of one dtype out of {', '.join(map(str, legal))}, "
            f"not {x_BTHP.dtype}, {b_BTS.dtype}, {c_BTS.dtype}"
        )
    head_size, state_size = x_BTHP.shape[-1], b_BTS.shape[-1]
    step = ROW_BYTES // x_BTHP.dtype.itemsize
    if head_size % step or state_size % step or max(head_size, state_size) > LARGEST_SIZE:
        raise ConfigError(
            f"provider 'triton' takes head and state sizes up to {LARGEST_SIZE} that are, in "
            f"{x_BTHP.dtype}, multiples of {step}, not P = {head_size}, S = {state_size}"
        )
    rows = x_BTHP.shape[0] * x_BTHP.shape[2]
    if rows > LARGEST_GRID:
        raise ConfigError(f"provider 'triton' takes batch × heads up to {LARGEST_GRID}, not {rows}")


def forward(
    x_BTHP: Tensor,
    dt_BTH: Tensor,
    a_H: Tensor,
    b_BTGS: Tensor,
    c_BTGS: Tensor,
    d_H: Tensor,
    initial_state_BHPS: Tensor | None,
    save: bool,
) -> tuple[Tensor | None, ...]:
    """Read-outs, final state, and for the backward decays and states of chunks (else None)."""
    from ham.kernels.ssd import triton_tiles
    from ham.kernels.ssd.triton_forward import walk
    from ham.kernels.ssd.triton_states import chunk_gates, strided_rows, sum_segments

    x_BTHP, b_BTGS, c_BTGS = strided_rows(x_BTHP), strided_rows(b_BTGS), strided_rows(c_BTGS)
    state = None if initial_state_BHPS is None else initial_state_BHPS.contiguous()
    size, dtype = x_BTHP.shape[-1], x_BTHP.dtype
    target = target_of(x_BTHP.device)
    chunk = triton_tiles.choose_chunk(dtype)
    tile = triton_tiles.choose_tile("walk", dtype, size, chunk, target)
    gates_XM3C = chunk_gates(dt_BTH.contiguous(), a_H.contiguous(), chunk)
    rows, chunks = gates_XM3C.shape[:2]
    segments = triton_tiles.count_segments(
        rows * -(-size // tile.block_p), chunks, target.multiprocessors
    )
    before = sum_segments(
        b_BTGS,
        x_BTHP,
        gates_XM3C,
        segments,
        triton_tiles.choose_tile("accumulate", dtype, size, chunk, target),
        forward=True,
    )
    walked = walk(
        x_BTHP,
        b_BTGS,
        c_BTGS,
        d_H.contiguous(),
        gates_XM3C,
        state,
        before,
        segments,
        tile,
        save=save,
    )
    if not save:
        return walked.y_BTHP, walked.final_state_BHPS, None, None
    return walked.y_BTHP, walked.final_state_BHPS, gates_XM3C, walked.states_XMSP


@torch.library.custom_op("ham::ssd_forward", mutates_args=())
def ssd_forward(
    x_BTHP: Tensor,
    dt_BTH: Tensor,
    a_H: Tensor,
    b_BTGS: Tensor,
    c_BTGS: Tensor,
    d_H: Tensor,
    initial_state_BHPS: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`forward`, with empty tensors where it gives None."""
    y_BTHP, final_state_BHPS, gates_XM3C, states_XMSP = forward(
        x_BTHP, dt_BTH, a_H, b_BTGS, c_BTGS, d_H, initial_state_BHPS, save
    )
    if not save:
        return y_BTHP, final_state_BHPS, a_H.new_empty(0), x_BTHP.new_empty(0)
    return y_BTHP, final_state_BHPS, gates_XM3C, states_XMSP


@ssd_forward.register_fake
def _(
    x_BTHP: Tensor,
    dt_BTH: Tensor,
    a_H: Tensor,
    b_BTGS: Tensor,
    c_BTGS: Tensor,
    d_H: Tensor,
    initial_state_BHPS: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from ham.kernels.ssd import triton_tiles

    batch, time, heads, head_size = x_BTHP.shape
    state_size = b_BTGS.shape[-1]
    y_BTHP = x_BTHP.new_empty(x_BTHP.shape)
    final_state_BHPS = a_H.new_empty(batch, heads, head_size, state_size)
    if not save:
        return y_BTHP, final_state_BHPS, a_H.new_empty(0), x_BTHP.new_empty(0)
    chunk = triton_tiles.choose_chunk(x_BTHP.dtype)
    chunks = (time + chunk - 1) // chunk
    gates_XM3C = a_H.new_empty(batch * heads, chunks, 3, chunk)
    states_XMSP = x_BTHP.new_empty(batch * heads, chunks, state_size, head_size)
    return y_BTHP, final_state_BHPS, gates_XM3C, states_XMSP


def backward(
    dy_BTHP: Tensor,
    dfinal_BHPS: Tensor | None,
    x_BTHP: Tensor,
    a_H: Tensor,
    b_BTGS: Tensor,
    c_BTGS: Tensor,
    d_H: Tensor,
    gates_XM3C: Tensor,
    states_XMSP: Tensor,
    initial: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, dt, a, b, c, D and, if there is one, of the initial state (else empty)."""
    from ham.kernels.ssd import triton_tiles
    from ham.kernels.ssd.triton_backward import gradients
    from ham.kernels.ssd.triton_states import accumulate, strided_rows, sum_segments

    x_BTHP, dy_BTHP = strided_rows(x_BTHP), strided_rows(dy_BTHP)
    b_BTGS, c_BTGS = strided_rows(b_BTGS), strided_rows(c_BTGS)
    size, dtype = x_BTHP.shape[-1], x_BTHP.dtype
    rows, chunks, _, chunk = gates_XM3C.shape
    target = target_of(x_BTHP.device)
    tile = triton_tiles.choose_tile("accumulate", dtype, size, chunk, target)
    segments = triton_tiles.count_segments(
        rows * -(-size // tile.block_p), chunks, target.multiprocessors
    )
    before = sum_segments(c_BTGS, dy_BTHP, gates_XM3C, segments, tile, forward=False)
    dstates_XMSP = torch.empty_like(states_XMSP)
    shape = (x_BTHP.shape[0], x_BTHP.shape[2], size, b_BTGS.shape[-1])
    dinitial_BHPS = a_H.new_empty(shape if initial else 0)
    accumulate(
        c_BTGS,
        dy_BTHP,
        gates_XM3C,
        None if dfinal_BHPS is None else dfinal_BHPS.contiguous(),
        before,
        segments,
        tile,
        forward=False,
        states_XMSP=dstates_XMSP,
        last_BHPS=dinitial_BHPS if initial else None,
    )
    kernel = triton_tiles.choose_gradient(dtype, size, x_BTHP.shape[2], b_BTGS.shape[2])
    made = gradients(
        x_BTHP,
        dy_BTHP,
        b_BTGS,
        c_BTGS,
        a_H.contiguous(),
        d_H.contiguous(),
        gates_XM3C,
        states_XMSP,
        dstates_XMSP,
        kernel,
        triton_tiles.choose_tile(kernel, dtype, size, chunk, target),
    )
    return (*made, dinitial_BHPS)


ssd_backward = torch.library.custom_op("ham::ssd_backward", backward, mutates_args=())


@ssd_backward.register_fake
def _(
    dy_BTHP: Tensor,
    dfinal_BHPS: Tensor | None,
    x_BTHP: Tensor,
    a_H: Tensor,
    b_BTGS: Tensor,
    c_BTGS: Tensor,
    d_H: Tensor,
    gates_XM3C: Tensor,
    states_XMSP: Tensor,
    initial: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, time, heads, head_size = x_BTHP.shape
    shape = (batch, heads, head_size, b_BTGS.shape[-1])
    return (
        x_BTHP.new_empty(x_BTHP.shape),
        a_H.new_empty(batch, time, heads),
        a_H.new_empty(heads),
        b_BTGS.new_empty(b_BTGS.shape),
        c_BTGS.new_empty(c_BTGS.shape),
        d_H.new_empty(heads),
        a_H.new_empty(shape if initial else 0),
    )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x_BTHP, _, a_H, b_BTGS, c_BTGS, d_H, initial_state_BHPS, save = inputs
    if not save:
        raise ValueError("ham::ssd_forward needs save=True where a gradient is asked for")
    ctx.save_for_backward(x_BTHP, a_H, b_BTGS, c_BTGS, d_H, *output[2:])
    ctx.initial = initial_state_BHPS is not None
    # Else PyTorch would fill zeros for the states, twice the size of x.
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    x_BTHP = ctx.saved_tensors[0]
    dy_BTHP = torch.zeros_like(x_BTHP) if grads[0] is None else grads[0]
    function = ssd_backward if traced_backward(*grads, *ctx.saved_tensors) else backward
    *made, dinitial_BHPS = function(dy_BTHP, grads[1], *ctx.saved_tensors, ctx.initial)
    return (*made, dinitial_BHPS if ctx.initial else None, None)


ssd_forward.register_autograd(_differentiate, setup_context=_keep)
_direct = direct(forward, _keep, _differentiate, public=2)


def triton(
    x_BTHP: Tensor,
    dt_BTH: Tensor,
    a_H: Tensor,
    b_BTS: Tensor,
    c_BTS: Tensor,
    d_H: Tensor,
    *,
    initial_state_BHPS: Tensor | None,
    chunk_size: int,
) -> SsdOutput:
    """The recurrence in chunks of a fixed size; `chunk_size` has no effect.

    Raises:
        ConfigError: For dtypes and sizes that the kernels lack.
    """
    del chunk_size
    check_limits(x_BTHP, b_BTS, c_BTS)
    b_BTGS, c_BTGS = (each if each.ndim == 4 else each.unsqueeze(2) for each in (b_BTS, c_BTS))
    inputs = (x_BTHP, dt_BTH, a_H, b_BTS, c_BTS, d_H, initial_state_BHPS)
    needed = any(tensor is not None and tensor.requires_grad for tensor in inputs)
    save = needed and torch.is_grad_enabled()
    function = _direct if save else forward
    if traced(*inputs):
        function = ssd_forward
    y_BTHP, final_state_BHPS, *_ = function(
        x_BTHP,
        dt_BTH.float(),
        a_H.float(),
        b_BTGS,
        c_BTGS,
        d_H.float(),
        None if initial_state_BHPS is None else initial_state_BHPS.float(),
        save,
    )
    return SsdOutput(y_BTHP, final_state_BHPS)
