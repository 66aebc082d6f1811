"""From one projection to the inputs of both branches: short convolution, SiLU, norms, rotation.

Under `torch.compile` these maps are a tenth of the layer's arithmetic and half of its time on a
GPU, forward and backward (kernels/LOG.md, 2026-11-25); one kernel reads the projection once.
"""

from __future__ import annotations

from torch import Tensor

from ham.kernels.convolved_heads.arguments import ConvolvedHeads, Rotation, check_arguments
from ham.kernels.convolved_heads.reference import reference
from ham.kernels.convolved_heads.triton_provider import check_limits, triton
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

__all__ = ["ConvolvedHeads", "Rotation", "convolved_heads"]


@takes_runs("weight_WC", "q_gain_K", "k_gain_K", "rotation")
def convolved_heads(
    x_BTC: Tensor,
    weight_WC: Tensor,
    *,
    heads: int,
    key_size: int,
    q_gain_K: Tensor | None = None,
    k_gain_K: Tensor | None = None,
    rotation: Rotation | None = None,
    history_BWC: Tensor | None = None,
    provider: str = TORCH,
) -> ConvolvedHeads:
    """Depthwise causal convolution of q, k and v, and what each branch makes of them.

    y = conv(x); recurrent q and k are silu(y) / |silu(y)|, values silu(y), attention's q and k
    RMSNorm(y) times a gain, rotated (Lufkin et al. 2026, arXiv 2603.22325; the order of the maps
    is that of Gated DeltaNet, arXiv 2412.06464).

    Args:
        x_BTC: Projections: q of all heads, then k, then v; C = H (2 K + V).
        weight_WC: Weights; the last of the W belongs to the token itself.
        heads: H.
        key_size: K, even with a rotation.
        q_gain_K, k_gain_K: Gains of attention's norms. Default: no q and k for attention.
        rotation: Rotary tables for attention's q and k. Default: none.
        history_BWC: The W - 1 inputs before the first token. Default: zeros.
        provider: A provider registered in `ham.kernels.registry`.

    Returns:
        `ConvolvedHeads`, contiguous, in the dtype of `x_BTC`.

    Raises:
        ConfigError: If the provider is unknown, or lacks what is asked of it.
        DeviceError: If it cannot run on the device of the inputs.
        ValueError: If shapes do not fit together.
    """
    check_arguments(x_BTC, weight_WC, heads, key_size, q_gain_K, k_gain_K, rotation, history_BWC)
    arguments = {
        "x_BTC": x_BTC,
        "weight_WC": weight_WC,
        "heads": heads,
        "key_size": key_size,
        "rotation": rotation,
        "history_BWC": history_BWC,
    }
    return find_provider("convolved_heads", provider, x_BTC.device, arguments).function(
        x_BTC,
        weight_WC,
        heads=heads,
        key_size=key_size,
        q_gain_K=q_gain_K,
        k_gain_K=k_gain_K,
        rotation=rotation,
        history_BWC=history_BWC,
    )


register_operation(
    Operation("convolved_heads", convolved_heads),
    Provider(REFERENCE, reference, anywhere, kind="reference"),
    Provider(TORCH, reference, anywhere),
    Provider(
        TRITON,
        triton,
        triton_available,
        limits=limits_of(
            check_limits, "x_BTC", "weight_WC", "heads", "key_size", "rotation", "history_BWC"
        ),
    ),
)
