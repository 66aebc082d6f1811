"""The Triton gated delta rule as custom operators, which `torch.compile` takes as they are.

`ham::gated_delta_rule` and `ham::gated_delta_rule_backward` take contiguous tensors. Outputs that
were not asked for come back empty. Importing this module does not import Triton; the kernels are
imported when they are first called.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ham.kernels.eager import direct, traced, traced_backward


class Forward(NamedTuple):
    """Outputs of `ham::gated_delta_rule`; those from `residual_BTHV` on are for the backward.

    Attributes:
        o_BTHV: Read-outs in the dtype of the values.
        final_state_NHKV: State after the last token of every sequence, float32.
        prediction_BTHV: Predictions, float32.
        score_BTH: Scores, float32.
        score_BT: Their reduction over heads, float32.
        residual_BTHV: v - p in the dtype of the values.
        states_XMKV: State before every chunk, in the dtype of the values; X = B × H.
        gates_XM3C: See `triton_tiles.Gates`, like the next two.
        inverse_XMCC: Inverted triangles.
        passing_XM: Bounds on what is left of a state.
        transitions_XSKK: Transitions of segments 1..S-2, float32.
    """

    o_BTHV: Tensor
    final_state_NHKV: Tensor
    prediction_BTHV: Tensor
    score_BTH: Tensor
    score_BT: Tensor
    residual_BTHV: Tensor
    states_XMKV: Tensor
    gates_XM3C: Tensor
    inverse_XMCC: Tensor
    passing_XM: Tensor
    transitions_XSKK: Tensor


PUBLIC = Forward._fields.index("residual_BTHV")
TENSORS = 7
FORWARD = (
    "(Tensor q, Tensor k, Tensor v, Tensor log_decay, Tensor beta, Tensor? initial_state, "
    "Tensor? cu_seqlens, float scale, str score, str reduction, bool prediction, bool save) -> ("
    + ", ".join(["Tensor"] * len(Forward._fields))
    + ")"
)
BACKWARD = (
    "(Tensor? do, Tensor? dfinal, Tensor? dprediction, Tensor q, Tensor k, Tensor residual, "
    "Tensor states, Tensor gates, Tensor inverse, Tensor passing, Tensor transitions, "
    "Tensor? cu_seqlens, float scale, bool initial) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def forward(
    q_BTGK: Tensor,
    k_BTGK: Tensor,
    v_BTHV: Tensor,
    log_decay_BTH: Tensor,
    beta_BTH: Tensor,
    initial_NHKV: Tensor | None,
    cu_seqlens_N1: Tensor | None,
    scale: float,
    score: str,
    reduction: str,
    prediction: bool,
    save: bool,
) -> Forward:
    """Launches 1 to 3, and those of segments where sequences are few and long.

    Outputs that were not asked for are None. Takes what `ham::gated_delta_rule` takes.
    """
    from ham.kernels.gated_delta_rule import triton_segments, triton_sequences, triton_tiles
    from ham.kernels.gated_delta_rule.triton_forward import walk
    from ham.kernels.gated_delta_rule.triton_inverse import invert_chunks
    from ham.kernels.gated_delta_rule.triton_score import score_heads

    heads, value_size = v_BTHV.shape[2:]
    key_size = k_BTGK.shape[-1]

    def tile_of(kernel: str) -> Any:
        return triton_tiles.choose_tile(kernel, v_BTHV.dtype, key_size, value_size)

    sequences = triton_sequences.sequences_of(v_BTHV, cu_seqlens_N1)
    segments = triton_sequences.segments_of(
        sequences.count, sequences.chunks, heads, value_size, v_BTHV.device
    )
    gates = invert_chunks(
        k_BTGK,
        log_decay_BTH,
        beta_BTH,
        sequences,
        tile_of("inverse"),
        passing=segments > 1,
    )
    starts_XSKV, transitions_XSKK = initial_NHKV, None
    if segments > 1:
        starts_XSKV, transitions_XSKK = triton_segments.start_segments(
            k_BTGK, v_BTHV, gates, sequences, initial_NHKV, segments, tile_of("segment")
        )
    inputs = (q_BTGK, k_BTGK, v_BTHV, gates, sequences, starts_XSKV, scale)
    if not prediction and triton_tiles.use_gluon(v_BTHV, key_size, value_size):
        from ham.kernels.gated_delta_rule.hopper_walk import hopper_walk

        walked = hopper_walk(*inputs, segments, score=score, save=save)
    else:
        tile = tile_of("saving_walk" if save else "walk")
        walked = walk(*inputs, tile, segments, prediction=prediction, score=score, save=save)
    scores = (None, None)
    if score:
        scores = score_heads(score, reduction, walked.sums_N3HR, beta_BTH)
    if not save:
        walked = walked._replace(residual_BTHV=None, states_XMKV=None)
        gates = (None,) * len(gates)
    return Forward(
        walked.o_BTHV,
        walked.final_state_NHKV,
        walked.prediction_BTHV,
        *scores,
        walked.residual_BTHV,
        walked.states_XMKV,
        *gates,
        transitions_XSKK if save else None,
    )


@torch.library.custom_op("ham::gated_delta_rule", mutates_args=(), schema=FORWARD)
def forward_op(
    q_BTGK: Tensor,
    k_BTGK: Tensor,
    v_BTHV: Tensor,
    log_decay_BTH: Tensor,
    beta_BTH: Tensor,
    initial_NHKV: Tensor | None,
    cu_seqlens_N1: Tensor | None,
    scale: float,
    score: str,
    reduction: str,
    prediction: bool,
    save: bool,
) -> tuple[Tensor, ...]:
    """`forward`, with empty tensors for what was not asked for."""
    made = forward(
        q_BTGK,
        k_BTGK,
        v_BTHV,
        log_decay_BTH,
        beta_BTH,
        initial_NHKV,
        cu_seqlens_N1,
        scale,
        score,
        reduction,
        prediction,
        save,
    )
    if save and made.transitions_XSKK is None:
        rows, key_size = made.final_state_NHKV.shape[:2].numel(), k_BTGK.shape[-1]
        empty_XSKK = made.final_state_NHKV.new_empty(rows, 0, key_size, key_size)
        made = made._replace(transitions_XSKK=empty_XSKK)
    return tuple(v_BTHV.new_empty(0) if part is None else part for part in made)


@forward_op.register_fake
def _forward_shapes(
    q_BTGK: Tensor,
    k_BTGK: Tensor,
    v_BTHV: Tensor,
    log_decay_BTH: Tensor,
    beta_BTH: Tensor,
    initial_NHKV: Tensor | None,
    cu_seqlens_N1: Tensor | None,
    scale: float,
    score: str,
    reduction: str,
    prediction: bool,
    save: bool,
) -> tuple[Tensor, ...]:
    from ham.kernels.gated_delta_rule.triton_sequences import chunk_bound, segments_of
    from ham.kernels.gated_delta_rule.triton_tiles import CHUNK

    batch, time, heads, value_size = v_BTHV.shape
    key_size = k_BTGK.shape[-1]
    count = None if cu_seqlens_N1 is None else cu_seqlens_N1.shape[0] - 1
    chunks = chunk_bound(time, count)
    count = batch if count is None else count
    segments = segments_of(count, chunks, heads, value_size, v_BTHV.device)
    rows, states = batch * heads, count * heads
    middle = torch.sym_max(segments - 2, 0)

    def made(*shape: int, wide: bool = True, when: bool = True) -> Tensor:
        dtype = torch.float32 if wide else v_BTHV.dtype
        return v_BTHV.new_empty(shape, dtype=dtype) if when else v_BTHV.new_empty(0)

    return (
        torch.empty_like(v_BTHV),
        made(count, heads, key_size, value_size),
        made(*v_BTHV.shape, when=prediction),
        made(batch, time, heads, when=score != ""),
        made(batch, time, when=reduction != ""),
        made(*v_BTHV.shape, wide=False, when=save),
        made(rows, chunks, key_size, value_size, wide=False, when=save),
        made(rows, chunks, 3, CHUNK, when=save),
        made(rows, chunks, CHUNK, CHUNK, wide=False, when=save),
        made(rows, chunks if segments > 1 else 0, when=save),
        made(states, middle, key_size, key_size, when=save),
    )


def backward(
    do_BTHV: Tensor | None,
    dfinal_NHKV: Tensor | None,
    dprediction_BTHV: Tensor | None,
    q_BTGK: Tensor,
    k_BTGK: Tensor,
    residual_BTHV: Tensor,
    states_XMKV: Tensor,
    gates_XM3C: Tensor,
    inverse_XMCC: Tensor,
    passing_XM: Tensor | None,
    transitions_XSKK: Tensor | None,
    cu_seqlens_N1: Tensor | None,
    scale: float,
    initial: bool,
) -> tuple[Tensor | None, ...]:
    """Launches 4 and 5: gradients of q, k, v, log decay, beta and, if asked, the initial state."""
    from ham.kernels.gated_delta_rule import triton_sequences, triton_tiles
    from ham.kernels.gated_delta_rule.triton_backward import walk_back
    from ham.kernels.gated_delta_rule.triton_gradients import gradients

    heads, value_size = residual_BTHV.shape[2:]
    key_size = k_BTGK.shape[-1]

    def tile_of(kernel: str) -> Any:
        return triton_tiles.choose_tile(kernel, residual_BTHV.dtype, key_size, value_size)

    sequences = triton_sequences.sequences_of(residual_BTHV, cu_seqlens_N1)
    segments = triton_sequences.segments_of(
        sequences.count, sequences.chunks, heads, value_size, residual_BTHV.device
    )
    gates = triton_tiles.Gates(gates_XM3C, inverse_XMCC, passing_XM)
    do_BTHV = torch.zeros_like(residual_BTHV) if do_BTHV is None else do_BTHV.contiguous()
    back = walk_back(
        q_BTGK,
        k_BTGK,
        do_BTHV,
        None if dprediction_BTHV is None else dprediction_BTHV.contiguous(),
        None if dfinal_NHKV is None else dfinal_NHKV.contiguous(),
        gates,
        transitions_XSKK,
        sequences,
        scale,
        tile_of("reverse"),
        segments,
        initial=initial,
    )
    made = (back.w_BTHV, states_XMKV, back.dstates_XMKV, gates, sequences, scale)
    inputs = (q_BTGK, k_BTGK, do_BTHV, residual_BTHV, *made)
    plain = cu_seqlens_N1 is None
    if plain and triton_tiles.use_gluon(residual_BTHV, key_size, value_size):
        from ham.kernels.gated_delta_rule.hopper_gradients import hopper_gradients

        local = hopper_gradients(*inputs)
    else:
        local = gradients(*inputs, tile_of("gradient"))
    return (
        local.dq_BTGK,
        local.dk_BTGK,
        back.dv_BTHV,
        local.dlog_decay_BTH,
        local.dbeta_BTH,
        back.dinitial_NHKV,
    )


@torch.library.custom_op("ham::gated_delta_rule_backward", mutates_args=(), schema=BACKWARD)
def backward_op(
    do_BTHV: Tensor | None,
    dfinal_NHKV: Tensor | None,
    dprediction_BTHV: Tensor | None,
    q_BTGK: Tensor,
    k_BTGK: Tensor,
    residual_BTHV: Tensor,
    states_XMKV: Tensor,
    gates_XM3C: Tensor,
    inverse_XMCC: Tensor,
    passing_XM: Tensor,
    transitions_XSKK: Tensor,
    cu_seqlens_N1: Tensor | None,
    scale: float,
    initial: bool,
) -> tuple[Tensor, ...]:
    """`backward`, with an empty tensor for a gradient that was not asked for."""
    *made, dinitial_NHKV = backward(
        do_BTHV,
        dfinal_NHKV,
        dprediction_BTHV,
        q_BTGK,
        k_BTGK,
        residual_BTHV,
        states_XMKV,
        gates_XM3C,
        inverse_XMCC,
        passing_XM,
        transitions_XSKK,
        cu_seqlens_N1,
        scale,
        initial,
    )
    return (*made, q_BTGK.new_empty(0) if dinitial_NHKV is None else dinitial_NHKV)


@backward_op.register_fake
def _backward_shapes(
    do_BTHV: Tensor | None,
    dfinal_NHKV: Tensor | None,
    dprediction_BTHV: Tensor | None,
    q_BTGK: Tensor,
    k_BTGK: Tensor,
    residual_BTHV: Tensor,
    states_XMKV: Tensor,
    gates_XM3C: Tensor,
    inverse_XMCC: Tensor,
    passing_XM: Tensor,
    transitions_XSKK: Tensor,
    cu_seqlens_N1: Tensor | None,
    scale: float,
    initial: bool,
) -> tuple[Tensor, ...]:
    batch, time, heads, value_size = residual_BTHV.shape
    count = batch if cu_seqlens_N1 is None else cu_seqlens_N1.shape[0] - 1
    gate_BTH = residual_BTHV.new_empty((batch, time, heads), dtype=torch.float32)
    shape = (count, heads, k_BTGK.shape[-1], value_size) if initial else (0,)
    return (
        torch.empty_like(q_BTGK),
        torch.empty_like(k_BTGK),
        torch.empty_like(residual_BTHV),
        gate_BTH,
        torch.empty_like(gate_BTH),
        residual_BTHV.new_empty(shape, dtype=torch.float32 if initial else residual_BTHV.dtype),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
    q, k, _, log_decay, beta, initial_state, cu_seqlens, scale, *_ = inputs
    saved = output[PUBLIC:]
    scores = output[Forward._fields.index("score_BTH") : PUBLIC]
    fixed = (part for part in (*scores, *saved) if part is not None)
    ctx.mark_non_differentiable(*fixed)
    ctx.save_for_backward(q, k, *saved, cu_seqlens)
    ctx.scale = scale
    ctx.gate_dtypes = (log_decay.dtype, beta.dtype)
    ctx.initial = initial_state is not None
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    function = backward_op if traced_backward(*grads, *ctx.saved_tensors) else backward
    dq, dk, dv, dlog_decay, dbeta, dinitial = function(
        *grads[:3], *ctx.saved_tensors, ctx.scale, ctx.initial
    )
    decay_dtype, beta_dtype = ctx.gate_dtypes
    gates = (dlog_decay.to(decay_dtype), dbeta.to(beta_dtype))
    return (dq, dk, dv, *gates, dinitial if ctx.initial else None, *[None] * 6)


forward_op.register_autograd(_differentiate, setup_context=_save)
_direct = direct(forward, _save, _differentiate, PUBLIC)


def call(*arguments: Any) -> tuple[Tensor | None, ...]:
    """Read-outs, final state, predictions and scores; arguments as of `ham::gated_delta_rule`."""
    if traced(*arguments[:TENSORS]):
        return forward_op(*arguments)[:PUBLIC]
    *_, save = arguments
    return _direct(*arguments) if save else forward(*arguments)[:PUBLIC]
