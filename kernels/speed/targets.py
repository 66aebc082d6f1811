"""What the kernels must reach, and what they are after: times side by side with peers in one run.

Factors are "times faster than the peer": at most 1.2 times a peer's time is a factor of 1 / 1.2. A
target with a limit in milliseconds has no peer. Targets of decoding are measured by other commands
and stand here so that none is forgotten.
"""

from __future__ import annotations

from dataclasses import dataclass

OURS = "triton"
PREPACKED = "flex_prepacked"
RULE, LONG_RULE, SMALL_RULE = "B8_T4096_H16_D128", "B1_T32768_H16_D128", "B8_T4096_H16_D64"
SSD, LONG_SSD = "B8_T4096_H16_P128_S128_G16", "B1_T32768_H16_P128_S128_G16"
MAMBA_SSD = "B8_T4096_H32_P64_S128_G1"
SHORT, LONG = "B8_T4096_H16_D128", "B1_T32768_H16_D128"
FORWARD, BOTH = "forward", "forward_backward"
QUARTER, DENSE = 0.25, 1.0


@dataclass(frozen=True)
class Target:
    """One comparison.

    Attributes:
        what: In words.
        operation, shape, mode: What is timed.
        peer: Whom it is compared with, or None for a limit in milliseconds.
        must, stretch: Times faster than the peer, or milliseconds; None where nothing is asked.
        fraction: Routed share of our cell, or None.
        peer_fraction: Routed share of the peer's cell; `fraction` where None.
        measured_here: False for what `ham kernels bench` does not time.
    """

    what: str
    operation: str
    shape: str
    mode: str
    peer: str | None
    must: float | None
    stretch: float | None
    fraction: float | None = None
    peer_fraction: float | None = None
    measured_here: bool = True


_RULE = "gated delta rule with the score"
_PACKED = "routed attention at 25 %, packing included"
_DENSE = "the same against dense causal attention"

TARGETS = (
    Target(_RULE, "gated_delta_rule", RULE, FORWARD, "flash_qla", 1 / 1.2, 1.0),
    Target(_RULE, "gated_delta_rule", RULE, FORWARD, "fla", 2.4, None),
    Target(_RULE, "gated_delta_rule", LONG_RULE, FORWARD, "fla", 2.0, None),
    Target(_RULE, "gated_delta_rule", LONG_RULE, FORWARD, "flash_qla", None, 1.0),
    Target(_RULE, "gated_delta_rule", SMALL_RULE, FORWARD, "fla", 2.0, 2.5),
    Target(_RULE, "gated_delta_rule", RULE, BOTH, "fla", 2.0, None),
    Target(_RULE, "gated_delta_rule", RULE, BOTH, "flash_qla", None, 1 / 1.1),
    Target(_RULE, "gated_delta_rule", LONG_RULE, BOTH, "fla", 2.0, None),
    Target(_RULE, "gated_delta_rule", LONG_RULE, BOTH, "flash_qla", None, 1 / 1.1),
    Target("SSD, head size 128", "ssd", SSD, BOTH, "fla", 1.3, 1.8),
    Target("SSD, head size 128", "ssd", LONG_SSD, BOTH, "fla", 1.8, 2.5),
    Target("SSD, shape of Mamba-2", "ssd", MAMBA_SSD, BOTH, "fla", 1.3, 1.8),
    Target("SSD, shape of Mamba-2", "ssd", MAMBA_SSD, BOTH, "mamba_ssm", 1.3, 1.8),
    Target("index building", "route_index", LONG, FORWARD, None, 0.015, None, QUARTER),
    Target("index and gather at 25 %", "route_pack", SHORT, FORWARD, None, 0.07, None, QUARTER),
    Target(_PACKED, "routed_attention", SHORT, FORWARD, PREPACKED, 1.1, 1.3, QUARTER),
    Target(_PACKED, "routed_attention", LONG, FORWARD, PREPACKED, 1.05, 1.2, QUARTER),
    Target(_PACKED, "routed_attention", LONG, BOTH, PREPACKED, 1.0, 1.2, QUARTER),
    Target(_DENSE, "routed_attention", LONG, FORWARD, "sdpa_cudnn", 2.7, 3.2, QUARTER, DENSE),
    Target(_DENSE, "routed_attention", LONG, BOTH, "sdpa_cudnn", 2.7, 3.2, QUARTER, DENSE),
    Target(
        "HAM mixer decode step at 25 % routed, one CUDA graph, against cuDNN over the full cache",
        "decode",
        "B16_T32768",
        "step",
        "sdpa_cudnn",
        3.0,
        3.5,
        measured_here=False,
    ),
    Target(
        "whole-model decode, 12 layers of width 1024, 25 % routed, against the transformer",
        "decode",
        "B16_T32768",
        "model",
        "transformer",
        2.5,
        2.9,
        measured_here=False,
    ),
    Target(
        "whole-model decode, 12 layers of width 1024, 25 % routed, against the transformer",
        "decode",
        "B8_T131072",
        "model",
        "transformer",
        2.8,
        3.3,
        measured_here=False,
    ),
)
