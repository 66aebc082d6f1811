"""What each layer of a model decided about each token of one text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ham.errors import ConfigError
from ham.model.decoder import DecoderLM
from ham.model.finite import check_finite
from ham.model.mixer import MixerAux
from ham.model.precision import precision_context


@dataclass(frozen=True)
class LayerTrace:
    """Decisions of one layer.

    Attributes:
        layer: Index of the layer, from 0.
        kept_T: Float32 share of the layer's caches that keep each token, 0..1.
        score_T: Float32 routing score of each token.
        threshold: A token is routed if its score reaches it; may be infinite.
        target: Share of tokens that the layer was trained to keep.
    """

    layer: int
    kept_T: np.ndarray
    score_T: np.ndarray
    threshold: float
    target: float

    @property
    def fraction(self) -> float:
        """Realised share of tokens kept."""
        return float(self.kept_T.mean(dtype=np.float64))


def decision(aux: MixerAux) -> tuple[np.ndarray, np.ndarray]:
    """`kept_T` and `score_T` of the only sequence of a batch, from a layer that routes.

    Where heads decide alone: the share of heads that keep a token, and their mean score.
    """
    score_BT = aux.score_BT if aux.score_BTH is None else aux.score_BTH.mean(-1)
    return aux.kept_share_BT()[0].cpu().numpy(), score_BT[0].float().cpu().numpy()


@torch.no_grad()
def trace_layers(
    model: DecoderLM,
    ids: Sequence[int],
    layers: Sequence[int] | None = None,
    precision: str = "auto",
) -> list[LayerTrace]:
    """Read a text from an empty memory and report every layer that routes.

    Args:
        model: In evaluation mode.
        ids: Token numbers, at most `max_positions` of them.
        layers: Layers to report; all that route when None.
        precision: As in `precision_context`.

    Raises:
        ConfigError: If no layer routes or one of `layers` does not.
        RoutingError, NotFiniteError: If scores or logits are not finite.
    """
    routing = routing_layers(model, layers)
    with precision_context(model.device, precision):
        output = model(torch.tensor([list(ids)], device=model.device))
    check_finite(model, output.logits_BTV)
    traces = []
    for layer in routing:
        controller = model.blocks[layer].mixer.controller
        kept_T, score_T = decision(output.aux[layer])
        traces.append(
            LayerTrace(layer, kept_T, score_T, float(controller.threshold), controller.target)
        )
    return traces


def routing_layers(model: DecoderLM, layers: Sequence[int] | None = None) -> list[int]:
    """The layers to report, in order; all that route when `layers` is None.

    Raises:
        ConfigError: If no layer routes or one of `layers` does not.
    """
    routing = list(model.routing_layers)
    if not routing:
        raise ConfigError(
            f"model {model.config.arm!r} (mixer {model.config.mixer!r}) routes no tokens, so there "
            "is nothing to inspect; give the checkpoint of a HAM arm"
        )
    return choose_layers(routing, layers)


def choose_layers(legal: Sequence[int], layers: Sequence[int] | None = None) -> list[int]:
    """`layers` in order, or all that choose their tokens.

    Raises:
        ConfigError: If one of `layers` is not among them.
    """
    wrong = sorted(set(layers or ()) - set(legal))
    if wrong:
        raise ConfigError(
            f"--layer {wrong[0]} is not a layer that routes; legal: {', '.join(map(str, legal))}"
        )
    return sorted(set(layers)) if layers else list(legal)
