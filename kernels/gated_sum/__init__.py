"""What a layer with two memories makes of their read-outs: norms, gates, sum."""

from __future__ import annotations

from torch import Tensor

from ham.kernels.gated_sum.reference import reference
from ham.kernels.gated_sum.triton_provider import check_limits, triton
from ham.kernels.registry import (
    REFERENCE,
    TORCH,
    TRITON,
    Operation,
    Provider,
    anywhere,
    find_provider,
    limits_of,
    register_operation,
)
from ham.kernels.runs import takes_runs
from ham.kernels.triton_target import triton_available

__all__ = ["gated_sum"]


@takes_runs("recurrent_gain_V", "attention_gain_V")
def gated_sum(
    recurrent_BTHV: Tensor,
    attended_BTHV: Tensor,
    gates_BTH: Tensor,
    recurrent_gain_V: Tensor,
    attention_gain_V: Tensor,
    *,
    provider: str = TORCH,
) -> Tensor:
    """sigmoid(gate) RMSNorm(read-out) of each branch, added (HAM, Eq. 12-13).

    Args:
        recurrent_BTHV, attended_BTHV: Read-outs, of one dtype.
        gates_BTH: Logits of the gates: those of the recurrent branch for all heads, then those of
            attention; `[B, T, 2 H]`.
        recurrent_gain_V, attention_gain_V: Gains of the norms.
        provider: A provider registered in `ham.kernels.registry`.

    Returns:
        `y_BTHV` in the dtype of the read-outs.

    Raises:
        ConfigError: If the provider is unknown, or lacks what is asked of it.
        DeviceError: If it cannot run on the device of the inputs.
        ValueError: If shapes or dtypes do not fit together.
    """
    batch, length, heads, size = recurrent_BTHV.shape
    if attended_BTHV.shape != recurrent_BTHV.shape or attended_BTHV.dtype != recurrent_BTHV.dtype:
        raise ValueError(
            f"read-outs must be alike, not {list(recurrent_BTHV.shape)} of {recurrent_BTHV.dtype} "
            f"and {list(attended_BTHV.shape)} of {attended_BTHV.dtype}"
        )
    if gates_BTH.shape != (batch, length, 2 * heads):
        raise ValueError(f"gates must be {[batch, length, 2 * heads]}, not {list(gates_BTH.shape)}")
    for gain_V in (recurrent_gain_V, attention_gain_V):
        if gain_V.shape != (size,):
            raise ValueError(f"gains must be [{size}], not {list(gain_V.shape)}")
    arguments = {"recurrent_BTHV": recurrent_BTHV}
    return find_provider("gated_sum", provider, recurrent_BTHV.device, arguments).function(
        recurrent_BTHV, attended_BTHV, gates_BTH, recurrent_gain_V, attention_gain_V
    )


register_operation(
    Operation("gated_sum", gated_sum),
    Provider(REFERENCE, reference, anywhere, kind="reference"),
    Provider(TORCH, reference, anywhere),
    Provider(TRITON, triton, triton_available, limits=limits_of(check_limits, "recurrent_BTHV")),
)
