"""Which decode layer stands for a mixer, on a GPU and elsewhere."""

from __future__ import annotations

from ham.measure.sweep.bounded import EvictedLayer, PaddedWindowLayer, WindowLayer
from ham.measure.sweep.grid import EVICTED, HAM, RULE, RULE_WINDOW, TRANSFORMER, WINDOW
from ham.measure.sweep.layers import (
    DecodeLayer,
    DenseLayer,
    LayerSettings,
    PaddedHamLayer,
    RecurrentLayer,
)
from ham.model.mixer import SequenceMixer

LAYERS: dict[str, type[DecodeLayer]] = {
    HAM: PaddedHamLayer,
    TRANSFORMER: DenseLayer,
    WINDOW: WindowLayer,
    RULE_WINDOW: PaddedWindowLayer,
    EVICTED: EvictedLayer,
}


def make_layer(mixer: SequenceMixer, index: int, settings: LayerSettings) -> DecodeLayer:
    """The layer of a mixer; one that is not listed is recurrent and steps by itself."""
    kind = _fused_layers() if settings.device.type == "cuda" else LAYERS
    chosen = kind.get(mixer.registered_name, RecurrentLayer)
    return chosen(mixer, index, settings)


def _fused_layers() -> dict[str, type[DecodeLayer]]:
    """With fused kernels, whose modules load Triton."""
    from ham.measure.sweep.paged import FusedRuleLayer, PagedHamLayer, PagedWindowLayer

    fused = {HAM: PagedHamLayer, RULE: FusedRuleLayer, RULE_WINDOW: PagedWindowLayer}
    return {**LAYERS, **fused}
