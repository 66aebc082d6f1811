"""State-space duality, the recurrence of Mamba-2 (Dao and Gu 2024, arXiv 2405.21060)."""

from __future__ import annotations

from torch import Tensor

from ham.kernels.chunks import resolve_chunk_size
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
from ham.kernels.ssd.arguments import SsdOutput, check_arguments
from ham.kernels.ssd.chunked import chunked
from ham.kernels.ssd.cost import chunked_flops, cost
from ham.kernels.ssd.reference import reference, ssd_step
from ham.kernels.ssd.triton_provider import check_limits, triton
from ham.kernels.triton_target import triton_available

__all__ = ["SsdOutput", "chunked_flops", "cost", "ssd", "ssd_step"]


@takes_runs("a_H", "d_H")
def ssd(
    x_BTHP: Tensor,
    dt_BTH: Tensor,
    a_H: Tensor,
    b_BTS: Tensor,
    c_BTS: Tensor,
    d_H: Tensor,
    *,
    initial_state_BHPS: Tensor | None = None,
    chunk_size: int | None = None,
    provider: str = "torch",
) -> SsdOutput:
    """Run the recurrence of Mamba-2 over a sequence (arXiv 2405.21060, equation 2).

        h_t = exp(dt_t a) h_{t-1} + dt_t x_t b_t^T,   y_t = h_t c_t + D x_t

    Everything is computed in float32, or in float64 if any input is float64, also under autocast.

    Args:
        x_BTHP: Inputs.
        dt_BTH: Step sizes, positive already.
        a_H: Decay rate of each head, negative.
        b_BTS: Input projections, shared by all heads, or `[B, T, G, S]`: one for each of G groups
            of H / G neighbouring heads.
        c_BTS: Output projections, of the same shape as `b_BTS`.
        d_H: Skip weight of each head.
        initial_state_BHPS: State before the first token. Default: zeros.
        chunk_size: Tokens per chunk of provider `torch`, at least 1. Default: 32 on a CPU, 64
            elsewhere.
        provider: A provider registered in `ham.kernels.registry`.

    Returns:
        Outputs and final state, both differentiable.

    Raises:
        ConfigError: If the provider is unknown.
        DeviceError: If it cannot run on the device of the inputs.
        ValueError: If shapes do not fit together.
    """
    check_arguments(x_BTHP, dt_BTH, a_H, b_BTS, c_BTS, d_H, initial_state_BHPS)
    arguments = {"x_BTHP": x_BTHP, "b_BTS": b_BTS, "c_BTS": c_BTS}
    return find_provider("ssd", provider, x_BTHP.device, arguments).function(
        x_BTHP,
        dt_BTH,
        a_H,
        b_BTS,
        c_BTS,
        d_H,
        initial_state_BHPS=initial_state_BHPS,
        chunk_size=resolve_chunk_size(chunk_size, x_BTHP.device),
    )


register_operation(
    Operation("ssd", ssd),
    Provider(REFERENCE, reference, anywhere, kind="reference"),
    Provider("torch", chunked, anywhere),
    Provider(
        "triton",
        triton,
        triton_available,
        limits=limits_of(check_limits, "x_BTHP", "b_BTS", "c_BTS"),
    ),
)
