"""The gated delta rule (Yang et al. 2024, arXiv 2412.06464)."""

from __future__ import annotations

from torch import Tensor

from ham.kernels.chunks import resolve_chunk_size
from ham.kernels.gated_delta_rule.arguments import (
    GatedDeltaRuleOutput,
    ScoredOutput,
    check_arguments,
)
from ham.kernels.gated_delta_rule.chunked import chunked
from ham.kernels.gated_delta_rule.cost import chunked_flops, cost
from ham.kernels.gated_delta_rule.reference import gated_delta_rule_step, reference
from ham.kernels.gated_delta_rule.triton_provider import check_limits, run, triton
from ham.kernels.registry import (
    REFERENCE,
    Operation,
    Provider,
    anywhere,
    find_provider,
    limits_of,
    register_operation,
)
from ham.kernels.runs import takes_runs
from ham.kernels.triton_target import triton_available
from ham.routing import ReductionName, ScoreName, head_scores, reduce_heads

__all__ = [
    "GatedDeltaRuleOutput",
    "ScoredOutput",
    "chunked_flops",
    "cost",
    "gated_delta_rule",
    "gated_delta_rule_scored",
    "gated_delta_rule_step",
]


@takes_runs("cu_seqlens_N1")
def gated_delta_rule(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    log_decay_BTH: Tensor,
    beta_BTH: Tensor,
    *,
    initial_state_BHKV: Tensor | None = None,
    cu_seqlens_N1: Tensor | None = None,
    scale: float | None = None,
    chunk_size: int | None = None,
    provider: str = "torch",
) -> GatedDeltaRuleOutput:
    """Run the gated delta rule over a sequence (arXiv 2412.06464, equation 10).

        p_t = a_t S_{t-1}^T k_t,   S_t = a_t S_{t-1} + k_t (beta_t (v_t - p_t))^T,   o_t = S_t^T q_t

    Everything is computed in float32, or in float64 if any input is float64, also under autocast.

    Args:
        q_BTHK: Queries `[B, T, G, K]`. G divides H: value head h reads key head h // (H // G).
        k_BTHK: Keys `[B, T, G, K]`; unit length keeps the rule stable, but nothing here requires
            it.
        v_BTHV: Values; V may differ from K.
        log_decay_BTH: Finite logarithm of the decay a_t, at most 0.
        beta_BTH: Write strength in 0..1.
        initial_state_BHKV: State before the first token. Default: zeros.
        cu_seqlens_N1: First token of each of N sequences that share the one row of a batch of 1,
            and T; never decreasing, int32. States are then `[N, H, K, V]`. Default: every row is
            a sequence.
        scale: Multiplies the queries. Default: K ** -0.5.
        chunk_size: Tokens per chunk of the chunked providers, at least 1. Default: 32 on a CPU,
            64 elsewhere.
        provider: A provider registered in `ham.kernels.registry`.

    Returns:
        Read-outs, final state and predictions, all differentiable.

    Raises:
        ConfigError: If the provider is unknown.
        DeviceError: If it cannot run on the device of the inputs.
        ValueError: If shapes do not fit together.
    """
    inputs = (q_BTHK, k_BTHK, v_BTHV, log_decay_BTH, beta_BTH)
    check_arguments(*inputs, initial_state_BHKV, cu_seqlens_N1)
    return _find(provider, *inputs[:3]).function(
        *inputs,
        initial_state_BHKV=initial_state_BHKV,
        cu_seqlens_N1=cu_seqlens_N1,
        scale=q_BTHK.shape[-1] ** -0.5 if scale is None else scale,
        chunk_size=resolve_chunk_size(chunk_size, q_BTHK.device),
    )


@takes_runs("cu_seqlens_N1")
def gated_delta_rule_scored(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    log_decay_BTH: Tensor,
    beta_BTH: Tensor,
    *,
    score: ScoreName | None = "cosine",
    reduction: ReductionName | None = None,
    initial_state_BHKV: Tensor | None = None,
    cu_seqlens_N1: Tensor | None = None,
    scale: float | None = None,
    chunk_size: int | None = None,
    provider: str = "torch",
) -> ScoredOutput:
    """`gated_delta_rule` with the score of every token and head instead of its prediction.

    A prediction is as large as the values in float32; a score is one number. A provider that makes
    scores while it has the predictions at hand, as `triton` does, saves that traffic.

    Args:
        q_BTHK: As in `gated_delta_rule`, like all arguments but `score` and `reduction`.
        k_BTHK: Keys.
        v_BTHV: Values.
        log_decay_BTH: Logarithm of the decay.
        beta_BTH: Write strength.
        score: As defined by `ham.routing.head_scores`; None for read-outs alone.
        reduction: Also give one score per token, as defined by `ham.routing.reduce_heads`.
        initial_state_BHKV: State before the first token. Default: zeros.
        cu_seqlens_N1: Where sequences begin in the one row of a batch of 1. Default: no sequences.
        scale: Multiplies the queries. Default: K ** -0.5.
        chunk_size: Tokens per chunk of the provider `torch`.
        provider: A provider registered in `ham.kernels.registry`.

    Raises:
        ConfigError: If the provider or the score is unknown.
        DeviceError: If the provider cannot run on the device of the inputs.
        ValueError: If shapes do not fit together.
    """
    inputs = (q_BTHK, k_BTHK, v_BTHV, log_decay_BTH, beta_BTH)
    provider = _find(provider, *inputs[:3]).name
    if provider == "triton":
        check_arguments(*inputs, initial_state_BHKV, cu_seqlens_N1)
        made = run(
            *inputs,
            initial_state_NHKV=initial_state_BHKV,
            cu_seqlens_N1=cu_seqlens_N1,
            scale=q_BTHK.shape[-1] ** -0.5 if scale is None else scale,
            prediction=False,
            score=score,
            reduction=reduction if score else None,
        )
        return ScoredOutput(made.o_BTHV, made.final_state_NHKV, made.score_BTH, made.score_BT)
    output = gated_delta_rule(
        *inputs,
        initial_state_BHKV=initial_state_BHKV,
        cu_seqlens_N1=cu_seqlens_N1,
        scale=scale,
        chunk_size=chunk_size,
        provider=provider,
    )
    if score is None:
        return ScoredOutput(output.o_BTHV, output.final_state_BHKV, None, None)
    score_BTH = head_scores(score, output.prediction_BTHV, v_BTHV, beta_BTH)
    score_BT = None if reduction is None else reduce_heads(score_BTH, reduction)
    return ScoredOutput(output.o_BTHV, output.final_state_BHKV, score_BTH, score_BT)


def _find(provider: str, q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor) -> Provider:
    arguments = {"q_BTHK": q_BTHK, "k_BTHK": k_BTHK, "v_BTHV": v_BTHV}
    return find_provider("gated_delta_rule", provider, q_BTHK.device, arguments)


register_operation(
    Operation("gated_delta_rule", gated_delta_rule),
    Provider(REFERENCE, reference, anywhere, kind="reference"),
    Provider("torch", chunked, anywhere),
    Provider(
        "triton",
        triton,
        triton_available,
        limits=limits_of(check_limits, "q_BTHK", "k_BTHK", "v_BTHV"),
    ),
)
