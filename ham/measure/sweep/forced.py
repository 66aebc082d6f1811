"""Routing that is forced: a hash decides which tokens are kept, whatever their score.

The same layer, sequence and position give the same decision in prefill, training and decoding.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ham.measure.sweep.grid import CLUSTERED
from ham.routing import ThresholdController

CLUSTER_TOKENS = 64
"""Length of a run of tokens that clustered routing keeps or drops together."""

_LOW_32 = 0xFFFFFFFF


def forced_mask(
    layer: int,
    batch: int,
    length: int,
    fraction: float,
    routing: str,
    device: torch.device,
    start: int = 0,
) -> Tensor:
    """Which tokens are kept: boolean `routed_BT` for positions from `start`.

    Each token is kept with probability `fraction`, independently of the others (unstructured) or
    together with the `CLUSTER_TOKENS` of its run (clustered). Counts therefore differ between
    sequences as they do in use: the cache is ragged.
    """
    position_T = torch.arange(start, start + length, device=device)
    if routing == CLUSTERED:
        position_T = position_T // CLUSTER_TOKENS
    row_B1 = torch.arange(batch, device=device)[:, None]
    return _hash(position_T * 0x9E3779B1 + row_B1 * 0x85EBCA77 + layer * 0xC2B2AE3D) < round(
        fraction * 2**32
    )


def _hash(value: Tensor) -> Tensor:
    """Uniform integers below 2^32 (the finaliser `lowbias32` of C. Wellons); int64 in and out."""
    value = value & _LOW_32
    value = ((value ^ (value >> 16)) * 0x7FEB352D) & _LOW_32
    value = ((value ^ (value >> 15)) * 0x846CA68B) & _LOW_32
    return value ^ (value >> 16)


class ForcedController(ThresholdController):
    """Stands in for a layer's threshold controller and keeps what the hash says.

    The masks are made once for each shape, so that a timed call reads one that exists.
    """

    def __init__(self, layer: int, fraction: float, routing: str):
        super().__init__(fraction, control="fixed", threshold=0.0, name=f"layer {layer} (forced)")
        self.layer = layer
        self.share = fraction
        self.routing = routing
        self._masks: dict[tuple[int, int], Tensor] = {}

    def settle(self) -> bool:
        """False before the first mask: the hash that makes it is not to be compiled."""
        return bool(self._masks)

    def route(self, score: Tensor, explored: Tensor | None = None) -> Tensor:
        """The mask for scores of this shape, `score_BT`."""
        batch, length = score.shape
        if (batch, length) not in self._masks:
            self._masks[batch, length] = forced_mask(
                self.layer, batch, length, self.share, self.routing, score.device
            )
        return self._masks[batch, length]


def force_routing(model: nn.Module, fraction: float, routing: str) -> None:
    """Replace the controller of every layer of a decoder."""
    for layer, block in enumerate(model.blocks):
        forced = ForcedController(layer, fraction, routing).to(
            block.mixer.controller.threshold.device
        )
        block.mixer.router.controller = forced
