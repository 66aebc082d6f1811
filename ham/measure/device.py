"""Peak rates from data sheets, for percentages of peak on devices that are listed here only.

A device that is not listed has no percentage: a guess would be wrong by up to an order of
magnitude (pytorch/torchtitan#4779 reports 152 % from such a guess).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DevicePeak:
    """Data-sheet rates.

    Attributes:
        flops_bf16: Dense bfloat16 matrix FLOP/s, without sparsity.
        bytes_per_second: Memory bandwidth.
        source: Where the figures stand.
    """

    flops_bf16: float
    bytes_per_second: float
    source: str


PEAKS = {
    "NVIDIA H100 80GB HBM3": DevicePeak(989e12, 3.35e12, "NVIDIA H100 data sheet, SXM column"),
    "NVIDIA H200": DevicePeak(989e12, 4.8e12, "NVIDIA H200 data sheet, SXM column"),
    "NVIDIA A100-SXM4-80GB": DevicePeak(312e12, 2.039e12, "NVIDIA A100 data sheet, SXM 80GB"),
}


def model_flops_utilisation(flops: float, seconds: float, device_name: str) -> float | None:
    """Share of the device's bfloat16 peak that `flops` in `seconds` amount to.

    Returns:
        A share in 0..1, or None for a device without a listed peak.

    Raises:
        ValueError: If the share exceeds 1, which means that the count or the clock is wrong.
    """
    peak = PEAKS.get(device_name)
    if peak is None:
        return None
    share = flops / seconds / peak.flops_bf16
    if share > 1:
        raise ValueError(
            f"{flops:.3g} FLOPs in {seconds:.3g} s is {share:.0%} of the peak of {device_name}"
        )
    return share
