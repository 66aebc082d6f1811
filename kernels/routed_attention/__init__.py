"""Attention over routed tokens only: what a HAM layer reads from its cache."""

from __future__ import annotations

from torch import Tensor

from ham.kernels.registry import (
    REFERENCE,
    Operation,
    Provider,
    anywhere,
    find_provider,
    limits_of,
    register_operation,
)
from ham.kernels.routed_attention.arguments import check_arguments
from ham.kernels.routed_attention.cached import routed_attention_cached
from ham.kernels.routed_attention.cost import cached_cost, cost, count_pairs
from ham.kernels.routed_attention.packed import packed
from ham.kernels.routed_attention.reference import reference
from ham.kernels.routed_attention.triton_provider import check_limits, triton
from ham.kernels.runs import takes_runs
from ham.kernels.triton_target import triton_available

__all__ = ["cached_cost", "cost", "count_pairs", "routed_attention", "routed_attention_cached"]


@takes_runs("sink_HK")
def routed_attention(
    q_BTHK: Tensor,
    k_BTGK: Tensor,
    v_BTGV: Tensor,
    routed_BT: Tensor,
    *,
    window: int = 0,
    sink_HK: Tensor | None = None,
    router_score_BT: Tensor | None = None,
    scale: float | None = None,
    provider: str = "torch",
) -> Tensor:
    """Causal softmax attention in which a token is a key only if it is routed or recent.

    Query t sees the tokens j <= t with `routed_BT[:, j]`, and the `window` most recent ones. Every
    query is answered; one that sees nothing gets exactly 0 and passes no gradient.

    Args:
        q_BTHK: Queries.
        k_BTGK: Keys of all tokens. H must be a multiple of G; query head h reads key head
            `h // (H // G)`.
        v_BTGV: Values of all tokens; V may differ from K.
        routed_BT: Boolean.
        window: How many of the most recent tokens are visible, routed or not; the first of them is
            the query's own. Default: 0, so that a token sees itself only if it is routed.
        sink_HK: A null key per query head, whose value is zero: it takes part in the softmax only.
            Default: none.
        router_score_BT: Routing scores through which the router learns. Outputs do not depend on
            them; the gradient of score j is `dL/dv_j . v_j` summed over heads, as far as v_j was
            read as a routed token outside the window, as if it were `v_j (1 + s_j - stop(s_j))`.
        scale: Multiplies the scores. Default: K ** -0.5.
        provider: A provider registered in `ham.kernels.registry`.

    Returns:
        `o_BTHV` in the dtype of the values.

    Raises:
        ConfigError: If the provider is unknown, or lacks what is asked of it.
        DeviceError: If it cannot run on the device of the inputs.
        ValueError: If shapes or dtypes do not fit together.
    """
    check_arguments(q_BTHK, k_BTGK, v_BTGV, routed_BT, window, sink_HK, router_score_BT)
    scale = q_BTHK.shape[-1] ** -0.5 if scale is None else scale
    arguments = {"q_BTHK": q_BTHK, "k_BTGK": k_BTGK, "v_BTGV": v_BTGV, "scale": scale}
    return find_provider("routed_attention", provider, q_BTHK.device, arguments).function(
        q_BTHK,
        k_BTGK,
        v_BTGV,
        routed_BT,
        window=window,
        sink_HK=sink_HK,
        router_score_BT=router_score_BT,
        scale=scale,
    )


register_operation(
    Operation("routed_attention", routed_attention),
    Provider(REFERENCE, reference, anywhere, kind="reference"),
    Provider("torch", packed, anywhere),
    Provider(
        "triton",
        triton,
        triton_available,
        limits=limits_of(check_limits, "q_BTHK", "k_BTGK", "v_BTGV", "scale"),
    ),
)
