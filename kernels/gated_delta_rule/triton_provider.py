"""The gated delta rule through Triton: what it can do, and its call.

Importing this module does not import Triton; the kernels are imported when they are first called.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ham.errors import ConfigError, unknown_choice
from ham.kernels.gated_delta_rule.arguments import GatedDeltaRuleOutput
from ham.kernels.gated_delta_rule.triton_ops import call
from ham.kernels.triton_target import interpreting

DTYPES = (torch.float32, torch.bfloat16)
SCORES = ("cosine", "l2", "committed")
REDUCTIONS = ("min", "mean", "max")
LARGEST_KEY = 128
ROW_BYTES = 16
LARGEST_GRID = 65535


class Run(NamedTuple):
    """What a forward gives; None for what was not asked for."""

    o_BTHV: Tensor
    final_state_NHKV: Tensor
    prediction_BTHV: Tensor | None
    score_BTH: Tensor | None
    score_BT: Tensor | None


def check_limits(
    q_BTGK: Tensor, k_BTGK: Tensor, v_BTHV: Tensor, sequences: int | None = None
) -> None:
    """Raise `ConfigError` for what the kernels cannot do; shapes fit together already.

    `sequences` is their number where it is not the size of the batch.
    """
    dtypes = {tensor.dtype for tensor in (q_BTGK, k_BTGK, v_BTHV)}
    legal = DTYPES[:1] if interpreting() else DTYPES
    if len(dtypes) != 1 or not dtypes <= set(legal):
        raise ConfigError(
            f"provider 'triton' takes q, k and v of one dtype out of {', '.join(map(str, legal))}, "
            f"not {q_BTGK.dtype}, {k_BTGK.dtype}, {v_BTHV.dtype}"
        )
    key_size, value_size = q_BTGK.shape[-1], v_BTHV.shape[-1]
    step = ROW_BYTES // q_BTGK.dtype.itemsize
    if key_size % step or value_size % step or key_size > LARGEST_KEY:
        raise ConfigError(
            f"provider 'triton' takes key sizes up to {LARGEST_KEY} and, in {q_BTGK.dtype}, key "
            f"and value sizes that are multiples of {step}, not K = {key_size}, V = {value_size}"
        )
    rows = (sequences or v_BTHV.shape[0]) * v_BTHV.shape[2]
    if rows > LARGEST_GRID:
        raise ConfigError(
            f"provider 'triton' takes sequences × heads up to {LARGEST_GRID}, not {rows}"
        )


def run(
    q_BTGK: Tensor,
    k_BTGK: Tensor,
    v_BTHV: Tensor,
    log_decay_BTH: Tensor,
    beta_BTH: Tensor,
    *,
    initial_state_NHKV: Tensor | None,
    cu_seqlens_N1: Tensor | None,
    scale: float,
    prediction: bool = True,
    score: str | None = None,
    reduction: str | None = None,
) -> Run:
    """Read-outs and final state; predictions or the scores called `score`, if wanted.

    Raises:
        ConfigError: If there is no such score, or for dtypes and sizes that the kernels lack.
    """
    if score is not None and score not in SCORES:
        raise unknown_choice("score", score, SCORES)
    if reduction is not None and reduction not in REDUCTIONS:
        raise unknown_choice("reduction", reduction, REDUCTIONS)
    count = q_BTGK.shape[0] if cu_seqlens_N1 is None else cu_seqlens_N1.shape[0] - 1
    check_limits(q_BTGK, k_BTGK, v_BTHV, count)
    state = initial_state_NHKV
    inputs = (q_BTGK, k_BTGK, v_BTHV, log_decay_BTH, beta_BTH)
    needed = any(part is not None and part.requires_grad for part in (*inputs, state))
    o_BTHV, final_state_NHKV, prediction_BTHV, score_BTH, score_BT = call(
        *(part.contiguous() for part in inputs),
        None if state is None else state.float().contiguous(),
        cu_seqlens_N1,
        scale,
        score or "",
        reduction or "",
        prediction,
        needed and torch.is_grad_enabled(),
    )
    return Run(
        o_BTHV,
        final_state_NHKV,
        prediction_BTHV if prediction else None,
        score_BTH if score else None,
        score_BT if reduction else None,
    )


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
    cu_seqlens_N1: Tensor | None = None,
) -> GatedDeltaRuleOutput:
    """The gated delta rule in chunks of 64 tokens; `chunk_size` has no effect."""
    del chunk_size
    made = run(
        q_BTHK,
        k_BTHK,
        v_BTHV,
        log_decay_BTH,
        beta_BTH,
        initial_state_NHKV=initial_state_BHKV,
        cu_seqlens_N1=cu_seqlens_N1,
        scale=scale,
    )
    return GatedDeltaRuleOutput(made.o_BTHV, made.final_state_NHKV, made.prediction_BTHV)
