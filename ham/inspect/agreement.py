"""Whether every way to read a text makes the same decisions: how many flip, and how near they were.

A token is kept if its score reaches the threshold. A whole text at once, pieces of it and single
steps add the same numbers in other orders, so a score that lies within rounding of the threshold
may fall on either side: in float32 hardly ever, in bfloat16 now and then. A flip far from the
threshold is not rounding but a defect.

What a reading decided is taken from the cache that it left, by the positions of the tokens in it,
so this compares cache content, not what a router said. G is the number of caches of a layer: 1, or
H where every head decides alone. Other letters as in `ham.model.mixer`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ham.decoding.stepper import make_stepper
from ham.errors import ConfigError
from ham.inspect.trace import routing_layers
from ham.kernels.triton_target import triton_available
from ham.model.decoder import DecoderLM
from ham.model.decoder_state import DecoderState
from ham.model.mixer import MixerAux
from ham.model.precision import precision_context

PIECE_TOKENS = 64
NEAR = 1e-2
"""A score at most this far from the threshold counts as near it."""

_ROWS_AT_ONCE = 256


@dataclass(frozen=True)
class Reading:
    """What one way of reading a text gave.

    Attributes:
        name: `parallel in float32`, `pieces of 64`, `steps`, `fused steps`.
        precision: `float32` or `bfloat16`.
        launch_mode: As in `ham.report.rows.Row`.
        logits_TV: After every token, in the dtype that the model gave.
        kept: By layer, boolean `kept_TG`.
        scores: By layer, float32 `score_TG`; those of the parallel reading in the same precision
            where a reading reports none, as single steps.
    """

    name: str
    precision: str
    launch_mode: str
    logits_TV: Tensor
    kept: dict[int, Tensor]
    scores: dict[int, Tensor]


@dataclass(frozen=True)
class LayerFlips:
    """Decisions of one layer that two readings made differently.

    Attributes:
        layer: Index of the layer, from 0.
        flips: Number of them.
        distance: Largest |score - threshold| among them, by the scores of the first reading; 0
            without flips.
        fraction: Share of decisions by which the second reading kept a token.
    """

    layer: int
    flips: int
    distance: float
    fraction: float


@dataclass(frozen=True)
class Pair:
    """Two readings side by side.

    Attributes:
        first, second: The readings; the first is the one nearer to the parallel form in float32.
        layers: One entry for each layer compared.
        logit_difference: Largest absolute one over all tokens and the vocabulary. A flip has a
            part in it: later tokens attend to other tokens then.
    """

    first: Reading
    second: Reading
    layers: list[LayerFlips]
    logit_difference: float


@dataclass(frozen=True)
class Agreement:
    """All readings of one text, compared.

    Attributes:
        tokens: Length T of the text.
        readings: First the parallel one in float32.
        pairs: Every two of them.
        thresholds: By layer.
        near: By layer, decisions whose float32 score lies within `NEAR` of the threshold.
        decisions: By layer, their number T x G.
        fused_refusal: Why there is no reading by fused steps; None if there is one.
    """

    tokens: int
    readings: list[Reading]
    pairs: list[Pair]
    thresholds: dict[int, float]
    near: dict[int, int]
    decisions: dict[int, int]
    fused_refusal: str | None


@torch.no_grad()
def agreement(
    model: DecoderLM,
    ids: Sequence[int],
    layers: Sequence[int] | None = None,
    *,
    pieces: int = PIECE_TOKENS,
    precision: str = "auto",
) -> Agreement:
    """Read a text in every way and compare decisions and logits.

    The ways: at once in float32, which the others are measured against; then, in `precision`, at
    once, in pieces, step by step by the model's own step, and by the fused steps of
    `ham.decoding` where they can do this model on this device. All logits are held until the end.

    Args:
        model: In evaluation mode.
        ids: Token numbers, at least one and at most `max_positions` of them.
        layers: Layers to compare; all that route when None.
        pieces: Tokens of a piece.
        precision: As in `precision_context`.

    Raises:
        ConfigError: If no layer routes, one of `layers` does not or decides without a threshold, or
            `pieces` is less than 1.
        RoutingError: If a score is NaN or infinite.
    """
    if pieces < 1:
        raise ConfigError(f"pieces must be of at least 1 token, received {pieces}")
    chosen = routing_layers(model, layers)
    _check_budgets(model, chosen)
    tokens_T = torch.tensor(list(ids), device=model.device)
    refusal = fused_refusal(model)
    readings = list(_readings(model, tokens_T, chosen, pieces, precision, refusal is None))
    model.check_scores()
    thresholds = {layer: float(model.blocks[layer].mixer.controller.threshold) for layer in chosen}
    margins = {layer: abs(readings[0].scores[layer] - thresholds[layer]) for layer in chosen}
    return Agreement(
        tokens=len(ids),
        readings=readings,
        pairs=[compare(*pair, thresholds) for pair in itertools.combinations(readings, 2)],
        thresholds=thresholds,
        near={layer: int((margin_TG <= NEAR).sum()) for layer, margin_TG in margins.items()},
        decisions={layer: margin_TG.numel() for layer, margin_TG in margins.items()},
        fused_refusal=refusal,
    )


def compare(first: Reading, second: Reading, thresholds: dict[int, float]) -> Pair:
    """Count what two readings decided differently in the layers of `thresholds`."""
    layers = []
    for layer, threshold in thresholds.items():
        flipped_TG = first.kept[layer] != second.kept[layer]
        margin_N = abs(first.scores[layer] - threshold)[flipped_TG]
        distance = float(margin_N.max()) if len(margin_N) else 0.0
        fraction = float(second.kept[layer].double().mean())
        layers.append(LayerFlips(layer, len(margin_N), distance, fraction))
    return Pair(first, second, layers, _largest_difference(first.logits_TV, second.logits_TV))


def fused_refusal(model: DecoderLM) -> str | None:
    """Why a model cannot be read by fused steps, in a few words, or None if it can."""
    if not triton_available(model.device):
        return f"Triton cannot run on {model.device}"
    # Loads Triton.
    from ham.decoding.graph import unsupported

    return unsupported(model)


def _check_budgets(model: DecoderLM, layers: Sequence[int]) -> None:
    for layer in layers:
        budget = model.blocks[layer].mixer.options.budget
        if budget != "threshold":
            raise ConfigError(
                f"layer {layer} has budget {budget!r}: its cache drops tokens again, so there is "
                "no decision per token to compare; legal: 'threshold'"
            )


def _readings(
    model: DecoderLM,
    tokens_T: Tensor,
    layers: Sequence[int],
    pieces: int,
    precision: str,
    fused: bool,
) -> Iterator[Reading]:
    reference = _parallel(model, tokens_T, layers, "float32")
    yield reference
    with precision_context(model.device, precision):
        used = "bfloat16" if torch.is_autocast_enabled(model.device.type) else "float32"
        same = reference
        if used != "float32":
            same = _parallel(model, tokens_T, layers, used)
            yield same
        yield _in_pieces(model, tokens_T, layers, pieces, used)
        yield _by_steps(model, tokens_T, same, fused=False)
        if fused:
            yield _by_steps(model, tokens_T, same, fused=True)


def _parallel(model: DecoderLM, tokens_T: Tensor, layers: Sequence[int], precision: str) -> Reading:
    with precision_context(model.device, precision):
        output = model(tokens_T[None])
    kept, scores = {}, {}
    for layer in layers:
        aux = output.aux[layer]
        kept_T = aux.routed_BT if aux.routed_BTH is None else aux.routed_BTH
        kept[layer], scores[layer] = _with_caches(kept_T[0]), _scores(aux)
    name = f"parallel in {precision}"
    return Reading(name, precision, "eager", output.logits_BTV[0], kept, scores)


def _in_pieces(
    model: DecoderLM, tokens_T: Tensor, layers: Sequence[int], pieces: int, precision: str
) -> Reading:
    state = model.init_state(1)
    outputs = [model.prefill(part_T[None], state) for part_T in tokens_T.split(pieces)]
    scores = {
        layer: torch.cat([_scores(output.aux[layer]) for output in outputs]) for layer in layers
    }
    logits_TV = torch.cat([output.logits_BTV[0] for output in outputs])
    kept = _cached(state, layers, len(tokens_T))
    return Reading(f"pieces of {pieces}", precision, "eager", logits_TV, kept, scores)


def _by_steps(model: DecoderLM, tokens_T: Tensor, parallel: Reading, *, fused: bool) -> Reading:
    stepper = make_stepper(model, model.init_state(1), fused=fused)
    # A stepper's logits are overwritten by its next step.
    logits_TV = torch.cat([stepper.step(token_1).clone() for token_1 in tokens_T.split(1)])
    stepper.check()
    kept = _cached(stepper.release(), parallel.scores, len(tokens_T))
    graph = fused and model.device.type == "cuda"
    return Reading(
        "fused steps" if fused else "steps",
        parallel.precision,
        "cuda_graph" if graph else "eager",
        logits_TV,
        kept,
        parallel.scores,
    )


def _cached(state: DecoderState, layers: Sequence[int], tokens: int) -> dict[int, Tensor]:
    """By layer, which positions are in the cache of the only sequence."""
    kept = {}
    for layer in layers:
        packed = state.layers[layer].cache.paged.packed()
        kept_GT = packed.positions_BN.new_zeros(len(packed.counts_B), tokens, dtype=torch.bool)
        for row_T, positions_N, count in zip(
            kept_GT, packed.positions_BN, packed.counts_B.tolist(), strict=True
        ):
            row_T[positions_N[:count].long()] = True
        kept[layer] = kept_GT.T
    return kept


def _scores(aux: MixerAux) -> Tensor:
    score_BT = aux.score_BT if aux.score_BTH is None else aux.score_BTH
    return _with_caches(score_BT[0].float())


def _with_caches(x: Tensor) -> Tensor:
    """`x_TG` of `x_T` or `x_TG`."""
    return x if x.ndim == 2 else x[:, None]


def _largest_difference(first_TV: Tensor, second_TV: Tensor) -> float:
    """Largest absolute one, in float32, without a copy of everything."""
    parts = zip(first_TV.split(_ROWS_AT_ONCE), second_TV.split(_ROWS_AT_ONCE), strict=True)
    return max(float((first.float() - second.float()).abs().max()) for first, second in parts)
