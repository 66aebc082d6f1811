"""Routed attention through Triton: limits, custom operators, autograd.

Importing this module does not import Triton; the kernels are imported when they are first called.
Both passes are custom operators of torch, so that `torch.compile` keeps them whole.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ham.errors import ConfigError
from ham.kernels.eager import direct, traced, traced_backward
from ham.kernels.triton_target import interpreting

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LARGEST_HEAD = 128


def check_limits(q_BTHK: Tensor, k_BTGK: Tensor, v_BTGV: Tensor, scale: float | None) -> None:
    """Raise `ConfigError` for what the kernels cannot do; shapes fit together already."""
    dtypes = {tensor.dtype for tensor in (q_BTHK, k_BTGK, v_BTGV)}
    legal = DTYPES[1:] if interpreting() else DTYPES
    if len(dtypes) != 1 or not dtypes <= set(legal):
        raise ConfigError(
            f"provider 'triton' takes q, k and v of one dtype out of {', '.join(map(str, legal))}, "
            f"not {q_BTHK.dtype}, {k_BTGK.dtype}, {v_BTGV.dtype}"
        )
    key_size, value_size = q_BTHK.shape[-1], v_BTGV.shape[-1]
    if max(key_size, value_size) > LARGEST_HEAD:
        raise ConfigError(
            f"provider 'triton' takes head sizes up to {LARGEST_HEAD}, "
            f"not K = {key_size}, V = {value_size}"
        )
    if scale is not None and scale <= 0:
        raise ConfigError(f"provider 'triton' takes a positive scale, not {scale}")


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    routed: Tensor,
    sink: Tensor | None,
    score: Tensor | None,
    window: int,
    scale: float,
) -> tuple[Tensor, ...]:
    """Read-outs, and what the backward reads: lse, positions, counts, packed keys and values."""
    from ham.kernels.routed_attention.triton_forward import attend
    from ham.kernels.routed_attention.triton_pack import pack, scan
    from ham.kernels.routed_attention.triton_tiles import choose_tile

    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    index = scan(routed.contiguous())
    packed_k, packed_v = pack(k, v, index)
    o, lse = attend(
        q,
        k,
        v,
        packed_k,
        packed_v,
        index.counts_BT,
        None if sink is None else sink.contiguous(),
        window,
        scale,
        choose_tile("forward", q, v),
    )
    return o, lse, *index, packed_k, packed_v


forward_op = torch.library.custom_op(
    "ham::routed_attention_forward",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor routed, Tensor? sink, Tensor? score, int window, "
    "float scale) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)(forward)


@forward_op.register_fake
def _(q, k, v, routed, sink, score, window, scale):
    from ham.kernels.routed_attention.triton_tiles import packed_rows

    batch, time, heads, _ = q.shape
    groups, value_size = v.shape[2:]
    rows = packed_rows(time)
    return (
        v.new_empty(batch, time, heads, value_size),
        q.new_empty(batch, heads, rows, dtype=torch.float32),
        q.new_empty(batch, rows, dtype=torch.int32),
        q.new_empty(batch, time, dtype=torch.int32),
        k.new_empty(batch, groups, rows, k.shape[-1]),
        v.new_empty(batch, groups, rows, value_size),
    )


def backward(
    do: Tensor,
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    packed_k: Tensor,
    packed_v: Tensor,
    o: Tensor,
    lse: Tensor,
    positions: Tensor,
    counts: Tensor,
    sink: Tensor | None,
    window: int,
    scale: float,
    score: bool,
) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v, the null key and the scores; the last two None if not asked for."""
    from ham.kernels.routed_attention.triton_key_gradient import key_gradient
    from ham.kernels.routed_attention.triton_pack import Index
    from ham.kernels.routed_attention.triton_query_gradient import query_gradient
    from ham.kernels.routed_attention.triton_tiles import choose_tile

    do, q = do.contiguous(), q.contiguous()
    if k is not None:
        k, v = k.contiguous(), v.contiguous()
    inputs = (do, q, k, v, packed_k, packed_v)
    of_queries = query_gradient(
        *inputs,
        o,
        lse,
        counts,
        None if sink is None else sink.contiguous(),
        window,
        scale,
        choose_tile("query_gradient", q, packed_v),
    )
    of_keys = key_gradient(
        *inputs,
        lse,
        of_queries.delta_BHN,
        Index(positions, counts),
        window,
        scale,
        choose_tile("key_gradient", q, packed_v),
        score=score,
    )
    return (
        of_queries.dq_BTHK,
        of_keys.dk_BTGK,
        of_keys.dv_BTGV,
        of_queries.dsink_HK,
        of_keys.dscore_BT,
    )


@torch.library.custom_op(
    "ham::routed_attention_backward",
    mutates_args=(),
    schema="(Tensor do, Tensor q, Tensor? k, Tensor? v, Tensor packed_k, Tensor packed_v, "
    "Tensor o, Tensor lse, Tensor positions, Tensor counts, Tensor? sink, int window, float scale, "
    "bool score) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def backward_op(
    do: Tensor,
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    packed_k: Tensor,
    packed_v: Tensor,
    o: Tensor,
    lse: Tensor,
    positions: Tensor,
    counts: Tensor,
    sink: Tensor | None,
    window: int,
    scale: float,
    score: bool,
) -> tuple[Tensor, ...]:
    """`backward`, with empty tensors for what was not asked for."""
    made = backward(
        do,
        q,
        k,
        v,
        packed_k,
        packed_v,
        o,
        lse,
        positions,
        counts,
        sink,
        window,
        scale,
        score,
    )
    return tuple(lse.new_empty(0) if part is None else part for part in made)


@backward_op.register_fake
def _(do, q, k, v, packed_k, packed_v, o, lse, positions, counts, sink, window, scale, score):
    batch, time, heads, key_size = q.shape
    groups, value_size = packed_v.shape[1], packed_v.shape[-1]
    return (
        torch.empty_like(q, memory_format=torch.contiguous_format),
        q.new_empty(batch, time, groups, key_size),
        q.new_empty(batch, time, groups, value_size),
        lse.new_empty(0) if sink is None else lse.new_empty(heads, key_size),
        lse.new_empty(batch, time) if score else lse.new_empty(0),
    )


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    q, k, v, _, sink, score, window, scale = inputs
    o, lse, positions, counts, packed_k, packed_v = output
    ctx.mark_non_differentiable(lse, positions, counts, packed_k, packed_v)
    ctx.set_materialize_grads(False)
    window_inputs = (k, v) if window else (None, None)
    ctx.save_for_backward(q, *window_inputs, packed_k, packed_v, o, lse, positions, counts, sink)
    ctx.window, ctx.scale = window, scale
    ctx.score_dtype = None if score is None else score.dtype
    ctx.sink_dtype = None if sink is None else sink.dtype


def _differentiate(ctx: Any, do: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if do is None:
        return (None,) * 8
    with_score = ctx.score_dtype is not None and ctx.needs_input_grad[5]
    function = backward_op if traced_backward(do, *ctx.saved_tensors) else backward
    dq, dk, dv, dsink, dscore = function(do, *ctx.saved_tensors, ctx.window, ctx.scale, with_score)
    return (
        dq,
        dk,
        dv,
        None,
        None if ctx.sink_dtype is None else dsink.to(ctx.sink_dtype),
        dscore.to(ctx.score_dtype) if with_score else None,
        None,
        None,
    )


forward_op.register_autograd(_differentiate, setup_context=_save)
_direct = direct(forward, _save, _differentiate, public=1)


def triton(
    q_BTHK: Tensor,
    k_BTGK: Tensor,
    v_BTGV: Tensor,
    routed_BT: Tensor,
    *,
    window: int,
    sink_HK: Tensor | None,
    router_score_BT: Tensor | None,
    scale: float,
) -> Tensor:
    """Routed attention in Triton kernels.

    Raises:
        ConfigError: For dtypes, sizes and scales that the kernels lack.
    """
    check_limits(q_BTHK, k_BTGK, v_BTGV, scale)
    tensors = (q_BTHK, k_BTGK, v_BTGV, routed_BT, sink_HK, router_score_BT)
    if traced(*tensors):
        return forward_op(*tensors, window, scale)[0]
    needed = any(each is not None and each.requires_grad for each in tensors)
    function = _direct if needed and torch.is_grad_enabled() else forward
    return function(*tensors, window, scale)[0]
