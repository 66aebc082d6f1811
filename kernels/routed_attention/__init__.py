"""Attention over routed tokens only: what a HAM layer reads from its cache."""

from __future__ import annotations

from torch import Tensor

from ham.kernels.registry import (
    REFERENCE,
    Operation,
    Provider,
    anywhere,
    find_provider,
    register_operation,
)
from ham.kernels.routed_attention.arguments import check_arguments
from ham.kernels.routed_attention.cached import routed_attention_cached
from ham.kernels.routed_attention.cost import cached_cost, cost, count_pairs
from ham.kernels.routed_attention.packed import packed
from ham.kernels.routed_attention.reference import reference

__all__ = ["cached_cost", "cost", "count_pairs", "routed_attention", "routed_attention_cached"]


def routed_attention(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    routed_BT: Tensor,
    *,
    scale: float | None = None,
    provider: str = "torch",
) -> Tensor:
    """Causal softmax attention in which a token is a key only if it is routed.

    Query t sees the tokens j <= t with `routed_BT[:, j]`; itself only if routed. Every query is
    answered; one that sees nothing gets exactly 0 and passes no gradient.

    Args:
        q_BTHK: Queries.
        k_BTHK: Keys of all tokens.
        v_BTHV: Values of all tokens; V may differ from K.
        routed_BT: Boolean.
        scale: Multiplies the scores. Default: K ** -0.5.
        provider: A provider registered in `ham.kernels.registry`.

    Returns:
        `o_BTHV` in the dtype of the values.

    Raises:
        ConfigError: If the provider is unknown.
        DeviceError: If it cannot run on the device of the inputs.
        ValueError: If shapes or dtypes do not fit together.
    """
    check_arguments(q_BTHK, k_BTHK, v_BTHV, routed_BT)
    return find_provider("routed_attention", provider, q_BTHK.device).function(
        q_BTHK,
        k_BTHK,
        v_BTHV,
        routed_BT,
        scale=q_BTHK.shape[-1] ** -0.5 if scale is None else scale,
    )


register_operation(
    Operation("routed_attention", routed_attention),
    Provider(REFERENCE, reference, anywhere, kind="reference"),
    Provider("torch", packed, anywhere),
)
