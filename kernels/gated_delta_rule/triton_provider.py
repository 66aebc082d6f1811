"""The gated delta rule through Triton: argument checks, autograd, availability.

Importing this module does not import Triton; the kernels are imported when they are first called.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ham.errors import ConfigError, unknown_choice
from ham.kernels.gated_delta_rule.arguments import GatedDeltaRuleOutput

DTYPES = (torch.float32, torch.bfloat16)
SCORES = ("cosine", "l2", "committed")
LARGEST_KEY = 128
ROW_BYTES = 16
LARGEST_GRID = 65535


def interpreting() -> bool:
    """Whether Triton runs kernels on the CPU, as asked for by `TRITON_INTERPRET=1`."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def available(device: torch.device) -> bool:
    """An NVIDIA GPU from Ampere on, or a CPU in Triton's interpreter."""
    if importlib.util.find_spec("triton") is None:
        return False
    if device.type == "cuda":
        modern = torch.cuda.is_available() and torch.version.cuda is not None
        return modern and torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and interpreting()


def check_limits(q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor) -> None:
    """Raise `ConfigError` for what the kernels cannot do; shapes fit together already."""
    dtypes = {tensor.dtype for tensor in (q_BTHK, k_BTHK, v_BTHV)}
    legal = DTYPES[:1] if interpreting() else DTYPES
    if len(dtypes) != 1 or not dtypes <= set(legal):
        raise ConfigError(
            f"provider 'triton' takes q, k and v of one dtype out of {', '.join(map(str, legal))}, "
            f"not {q_BTHK.dtype}, {k_BTHK.dtype}, {v_BTHV.dtype}"
        )
    key_size, value_size = q_BTHK.shape[-1], v_BTHV.shape[-1]
    step = ROW_BYTES // q_BTHK.dtype.itemsize
    if key_size % step or value_size % step or key_size > LARGEST_KEY:
        raise ConfigError(
            f"provider 'triton' takes key sizes up to {LARGEST_KEY} and, in {q_BTHK.dtype}, key "
            f"and value sizes that are multiples of {step}, not K = {key_size}, V = {value_size}"
        )
    rows = q_BTHK.shape[0] * q_BTHK.shape[2]
    if rows > LARGEST_GRID:
        raise ConfigError(f"provider 'triton' takes batch × heads up to {LARGEST_GRID}, not {rows}")


class _Request(NamedTuple):
    """What the forward writes besides read-outs and the final state."""

    scale: float
    prediction: bool
    score: str | None
    save: bool


class _GatedDeltaRule(torch.autograd.Function):
    """Read-outs, final state, predictions or nothing, scores or nothing."""

    @staticmethod
    def forward(
        ctx: Any,
        q_BTHK: Tensor,
        k_BTHK: Tensor,
        v_BTHV: Tensor,
        log_decay_BTH: Tensor,
        beta_BTH: Tensor,
        initial_state_BHKV: Tensor | None,
        request: _Request,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        from ham.kernels.gated_delta_rule import triton_tiles
        from ham.kernels.gated_delta_rule.triton_forward import score_heads, walk
        from ham.kernels.gated_delta_rule.triton_inverse import invert_chunks

        q_BTHK, k_BTHK, v_BTHV = q_BTHK.contiguous(), k_BTHK.contiguous(), v_BTHV.contiguous()
        beta_BTH = beta_BTH.contiguous()
        state = initial_state_BHKV
        gates = invert_chunks(k_BTHK, log_decay_BTH.contiguous(), beta_BTH)
        walked = walk(
            q_BTHK,
            k_BTHK,
            v_BTHV,
            gates,
            None if state is None else state.float().contiguous(),
            request.scale,
            triton_tiles.choose_tile("saving_walk" if request.save else "walk", q_BTHK, v_BTHV),
            prediction=request.prediction,
            score=request.score,
            save=request.save,
        )
        score_BTH = None
        if request.score is not None:
            score_BTH = score_heads(request.score, walked.sums_N3BHT, beta_BTH)
            ctx.mark_non_differentiable(score_BTH)
        if request.save:
            saved = (q_BTHK, k_BTHK, walked.residual_BTHV, walked.states_XMKV)
            ctx.save_for_backward(*saved, *gates)
            ctx.scale = request.scale
            ctx.gate_dtypes = (log_decay_BTH.dtype, beta_BTH.dtype)
            ctx.state_dtype = None if state is None else state.dtype
        ctx.set_materialize_grads(False)
        return walked.o_BTHV, walked.final_state_BHKV, walked.prediction_BTHV, score_BTH

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,
        do_BTHV: Tensor | None,
        dfinal_BHKV: Tensor | None,
        dprediction_BTHV: Tensor | None,
        dscore_BTH: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        from ham.kernels.gated_delta_rule import triton_tiles
        from ham.kernels.gated_delta_rule.triton_backward import gradients, walk_back

        del dscore_BTH
        q_BTHK, k_BTHK, residual_BTHV, states_XMKV, *gates = ctx.saved_tensors
        gates = triton_tiles.Gates(*gates)
        do_BTHV = torch.zeros_like(residual_BTHV) if do_BTHV is None else do_BTHV.contiguous()
        back = walk_back(
            q_BTHK,
            k_BTHK,
            do_BTHV,
            None if dprediction_BTHV is None else dprediction_BTHV.contiguous(),
            None if dfinal_BHKV is None else dfinal_BHKV.contiguous(),
            gates,
            ctx.scale,
            triton_tiles.choose_tile("reverse", q_BTHK, residual_BTHV),
            initial=ctx.state_dtype is not None,
        )
        made = gradients(
            q_BTHK,
            k_BTHK,
            do_BTHV,
            residual_BTHV,
            back.w_BTHV,
            states_XMKV,
            back.dstates_XMKV,
            gates,
            ctx.scale,
            triton_tiles.choose_tile("gradient", q_BTHK, residual_BTHV),
        )
        decay_dtype, beta_dtype = ctx.gate_dtypes
        dinitial_BHKV = back.dinitial_BHKV
        if dinitial_BHKV is not None:
            dinitial_BHKV = dinitial_BHKV.to(ctx.state_dtype)
        return (
            made.dq_BTHK,
            made.dk_BTHK,
            back.dv_BTHV,
            made.dlog_decay_BTH.to(decay_dtype),
            made.dbeta_BTH.to(beta_dtype),
            dinitial_BHKV,
            None,
        )


def run(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    log_decay_BTH: Tensor,
    beta_BTH: Tensor,
    *,
    initial_state_BHKV: Tensor | None,
    scale: float,
    score: str | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Read-outs, final state, and the scores called `score`, or predictions if that is None.

    Raises:
        ConfigError: If there is no such score, or for dtypes and sizes that the kernels lack.
    """
    if score is not None and score not in SCORES:
        raise unknown_choice("score", score, SCORES)
    check_limits(q_BTHK, k_BTHK, v_BTHV)
    inputs = (q_BTHK, k_BTHK, v_BTHV, log_decay_BTH, beta_BTH, initial_state_BHKV)
    needed = any(tensor is not None and tensor.requires_grad for tensor in inputs)
    request = _Request(scale, score is None, score, needed and torch.is_grad_enabled())
    return _GatedDeltaRule.apply(*inputs, request)


def triton(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    log_decay_BTH: Tensor,
    beta_BTH: Tensor,
    *,
    initial_state_BHKV: Tensor | None,
    scale: float,
    chunk_size: int,
) -> GatedDeltaRuleOutput:
    """The gated delta rule in chunks of 64 tokens; `chunk_size` has no effect."""
    del chunk_size
    o_BTHV, final_state_BHKV, prediction_BTHV, _ = run(
        q_BTHK,
        k_BTHK,
        v_BTHV,
        log_decay_BTH,
        beta_BTH,
        initial_state_BHKV=initial_state_BHKV,
        scale=scale,
    )
    return GatedDeltaRuleOutput(o_BTHV, final_state_BHKV, prediction_BTHV)
