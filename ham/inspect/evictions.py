"""Which tokens of one text are still held at its end by a model whose caches are cut down."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ham.errors import ConfigError
from ham.eviction.cache import EvictingKVCache, EvictingState
from ham.inspect.trace import LayerTrace, choose_layers
from ham.model.decoder import DecoderLM
from ham.model.finite import check_finite
from ham.model.precision import precision_context

SCORE_NOTE = "score: share of the evictions after it that a token survived"


def evicting_layers(model: DecoderLM) -> list[int]:
    """The layers whose caches are cut down, from the bottom up."""
    states = model.init_state(1).layers
    return [layer for layer, state in enumerate(states) if isinstance(state, EvictingState)]


@torch.no_grad()
def trace_evictions(
    model: DecoderLM,
    ids: Sequence[int],
    layers: Sequence[int] | None = None,
    precision: str = "auto",
) -> list[LayerTrace]:
    """Read a text from an empty memory and report what each cache holds after each eviction.

    A token's score is the share of the evictions after it that it survived, 1 if there was none,
    mean over the caches of a layer. So it is held at the end by all of them if the score reaches 1,
    the threshold.

    Args:
        model: In evaluation mode.
        ids: Token numbers, at most `max_positions` of them.
        layers: Layers to report; all whose caches are cut down when None.
        precision: As in `precision_context`.

    Raises:
        ConfigError: If no layer's cache is cut down or that of one of `layers` is not.
        RoutingError, NotFiniteError: If scores or logits are not finite.
    """
    legal = evicting_layers(model)
    if not legal:
        raise ConfigError(f"model {model.config.arm!r} evicts no tokens")
    chosen = choose_layers(legal, layers)
    tokens_1T = torch.tensor([list(ids)], device=model.device)
    survived = {layer: np.zeros(len(ids)) for layer in chosen}
    evictions_T = np.zeros(len(ids))
    with precision_context(model.device, precision):
        state = model.init_state(1)
        caches: dict[int, EvictingKVCache] = {layer: state.layers[layer].cache for layer in chosen}
        interval = caches[chosen[0]].policy.schedule.interval
        for piece_1T in tokens_1T.split(interval, dim=1):
            output = model.prefill(piece_1T, state, last_only=True)
            check_finite(model, output.logits_BTV)
            read = state.longest
            if read % interval == 0:
                evictions_T[:read] += 1
                for layer, cache in caches.items():
                    survived[layer] += held_share_T(cache, len(ids))
    return [_trace(layer, caches[layer], survived[layer], evictions_T) for layer in chosen]


def held_share_T(cache: EvictingKVCache, tokens: int) -> np.ndarray:
    """Share of the caches of the only sequence that hold each of the first `tokens` tokens."""
    position_NC: Tensor = cache.slots.position_BNC[0, : cache.filled.longest]
    count_T = np.bincount(position_NC.flatten().cpu().numpy(), minlength=tokens)
    return count_T / position_NC.shape[1]


def _trace(
    layer: int, cache: EvictingKVCache, survived_T: np.ndarray, evictions_T: np.ndarray
) -> LayerTrace:
    tokens = len(evictions_T)
    score_T = np.where(evictions_T > 0, survived_T / np.maximum(evictions_T, 1), 1.0)
    return LayerTrace(
        layer,
        held_share_T(cache, tokens).astype(np.float32),
        score_T.astype(np.float32),
        threshold=1.0,
        target=cache.policy.schedule.budget(tokens) / tokens,
    )
