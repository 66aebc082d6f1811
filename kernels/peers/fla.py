"""flash-linear-attention (FLA, written for 0.6.0), with and without FlashQLA behind it.

FLA chooses among implementations at every call, by environment variables (`fla/backends.py`):
`FLA_FLASH_QLA` sends the whole gated delta rule to FlashQLA, `FLA_TILELANG` a part of the backward
to TileLang. Both are set here around every call, so that `fla` is FLA's own Triton code wherever
it runs and `flash_qla` is FlashQLA or nothing; speed manifests record all FLA_* variables.

On Triton 3.4 to 3.7.0 and Hopper, FLA refuses its gated backward (`chunk_bwd_dqkwg` in
`fla/ops/common/chunk_o.py`, FLA#640), since some tiles were miscompiled. `without_guard` lets that
check see a newer Triton; nothing else in that module reads the flag at run time. Results under it
are compared like any other, and marked.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from ham.kernels.gated_delta_rule.arguments import GatedDeltaRuleOutput
from ham.kernels.peers.packages import (
    environment,
    given,
    on_cuda_with,
    refuse_others,
    tensor,
    version_of,
)
from ham.kernels.registry import Provider
from ham.kernels.ssd.arguments import SsdOutput

FLASH_QLA_SIZE = 128
TRITON_PATH = {"FLA_FLASH_QLA": "0", "FLA_TILELANG": "0"}
FLASH_QLA_PATH = {"FLA_FLASH_QLA": "1", "FLA_TILELANG": "0"}
_GUARDED_MODULE = "fla.ops.common.chunk_o"


def triton_path() -> contextlib.AbstractContextManager:
    """FLA's own Triton kernels, whatever else is installed."""
    return environment(TRITON_PATH)


def flash_qla_path() -> contextlib.AbstractContextManager:
    """FlashQLA for the gated delta rule, forward and backward."""
    return environment(FLASH_QLA_PATH)


@contextlib.contextmanager
def without_guard() -> Iterator[None]:
    """Let FLA run the gated backward that it refuses on this Triton (FLA#640)."""
    import importlib

    guarded = importlib.import_module(_GUARDED_MODULE)
    with mock.patch.object(guarded, "TRITON_ABOVE_3_7_1", True):
        yield


def gated_delta_rule(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    log_decay_BTH: Tensor,
    beta_BTH: Tensor,
    *,
    initial_state_BHKV: Tensor | None = None,
    scale: float | None = None,
    **unused: Any,
) -> GatedDeltaRuleOutput:
    """FLA's chunked gated delta rule; there is no prediction and no score."""
    refuse_others(unused)
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    o_BTHV, final_state_BHKV = chunk_gated_delta_rule(
        q_BTHK,
        k_BTHK,
        v_BTHV,
        log_decay_BTH,
        beta_BTH,
        scale=scale,
        initial_state=initial_state_BHKV,
        output_final_state=True,
    )
    return GatedDeltaRuleOutput(o_BTHV, final_state_BHKV, None)


def ssd(
    x_BTHP: Tensor,
    dt_BTH: Tensor,
    a_H: Tensor,
    b: Tensor,
    c: Tensor,
    d_H: Tensor,
    *,
    initial_state_BHPS: Tensor | None = None,
    **unused: Any,
) -> SsdOutput:
    """Mamba-2's recurrence as simple gated linear attention, with its skip.

    That function knows no shared keys: b and c are repeated over the heads that share them. Making
    dt x, dt a, the repeats and the skip is part of the time, as it is for whoever uses it so.
    """
    refuse_others(unused)
    from fla.ops.simple_gla import chunk_simple_gla

    heads = x_BTHP.shape[2]
    b_BTHS, c_BTHS = (per_head(part, heads) for part in (b, c))
    o_BTHP, final_BHSP = chunk_simple_gla(
        c_BTHS.to(x_BTHP.dtype),
        b_BTHS.to(x_BTHP.dtype),
        (x_BTHP * dt_BTH.unsqueeze(-1)).to(x_BTHP.dtype),
        dt_BTH * a_H,
        scale=1.0,
        initial_state=None if initial_state_BHPS is None else initial_state_BHPS.mT.contiguous(),
        output_final_state=True,
    )
    y_BTHP = (o_BTHP + d_H.unsqueeze(-1) * x_BTHP).to(x_BTHP.dtype)
    return SsdOutput(y_BTHP, final_BHSP.mT)


def per_head(b: Tensor, heads: int) -> Tensor:
    """`[B, T, S]` or `[B, T, G, S]` as `[B, T, H, S]`."""
    grouped = b.unsqueeze(2) if b.ndim == 3 else b
    if grouped.shape[2] == heads:
        return grouped
    return grouped.repeat_interleave(heads // grouped.shape[2], dim=2)


def rule_limits(arguments: Mapping[str, Any]) -> str | None:
    """What this wrapper of FLA's gated delta rule does not do."""
    q, v = tensor(arguments, "q"), tensor(arguments, "v")
    extra = given(arguments, "cu_seqlens")
    if extra is not None:
        return f"not called with {extra} here"
    if q.dtype not in (torch.bfloat16, torch.float32):
        return f"not called in {q.dtype} here"
    return f"V = {v.shape[-1]} is above 256" if v.shape[-1] > 256 else None


def flash_qla_limits(arguments: Mapping[str, Any]) -> str | None:
    """FlashQLA's own conditions (`fla/ops/gated_delta_rule/backends/flash_qla.py`)."""
    q, v = tensor(arguments, "q"), tensor(arguments, "v")
    if q.dtype != torch.bfloat16:
        return f"takes bfloat16, not {q.dtype}"
    if (q.shape[-1], v.shape[-1]) != (FLASH_QLA_SIZE, FLASH_QLA_SIZE):
        return f"takes K = V = {FLASH_QLA_SIZE}, not K = {q.shape[-1]}, V = {v.shape[-1]}"
    return rule_limits(arguments) or (_rejected_by_dispatch(arguments) if q.is_cuda else None)


def _rejected_by_dispatch(arguments: Mapping[str, Any]) -> str | None:
    """Why FLA would not hand this call to FlashQLA but silently take its own kernels."""
    try:
        from fla.ops.gated_delta_rule.backends.flash_qla import FlashQLABackend

        names = ("q", "k", "v", "log_decay", "beta")
        inputs = (tensor(arguments, name) for name in names)
        accepted, reason = FlashQLABackend().verify("chunk_gated_delta_rule", *inputs)
    except Exception as error:
        return f"FLA's dispatch to it cannot be asked: {error}"
    return None if accepted else str(reason)


def _with_setting(setting: Any, function: Any) -> Any:
    """The forward under its setting also when nobody entered it; a backward needs the caller."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with setting():
            return function(*args, **kwargs)

    return wrapped


_VERSION = version_of("fla-core", "flash-linear-attention")

GATED_DELTA_RULE = (
    Provider(
        "fla",
        _with_setting(triton_path, gated_delta_rule),
        on_cuda_with("fla"),
        kind="peer",
        limits=rule_limits,
        version=_VERSION,
        setting=triton_path,
        unguarded=without_guard,
    ),
    Provider(
        "flash_qla",
        _with_setting(flash_qla_path, gated_delta_rule),
        on_cuda_with("fla", "flash_qla", "tilelang"),
        kind="peer",
        limits=flash_qla_limits,
        version=version_of("flash-qla"),
        setting=flash_qla_path,
    ),
)
SSD = Provider(
    "fla",
    _with_setting(triton_path, ssd),
    on_cuda_with("fla"),
    kind="peer",
    version=_VERSION,
    setting=triton_path,
    unguarded=without_guard,
)
