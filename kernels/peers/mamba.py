"""mamba-ssm: the authors' own Triton kernels of Mamba-2, where the package is installed."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ham.kernels.peers.packages import on_cuda_with, refuse_others, version_of
from ham.kernels.registry import Provider
from ham.kernels.ssd.arguments import SsdOutput

# The chunk of Mamba-2's reference configuration (`mamba_ssm/modules/mamba2.py`).
CHUNK = 256


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
    """`mamba_chunk_scan_combined`, which takes b and c shared over groups of heads."""
    refuse_others(unused)
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    b_BTGS, c_BTGS = (part.unsqueeze(2) if part.ndim == 3 else part for part in (b, c))
    y_BTHP, final_state_BHPS = mamba_chunk_scan_combined(
        x_BTHP,
        dt_BTH,
        a_H,
        b_BTGS,
        c_BTGS,
        CHUNK,
        D=d_H,
        initial_states=initial_state_BHPS,
        return_final_states=True,
    )
    return SsdOutput(y_BTHP, final_state_BHPS)


SSD = Provider(
    "mamba_ssm",
    ssd,
    on_cuda_with("mamba_ssm"),
    kind="peer",
    version=version_of("mamba-ssm"),
)
