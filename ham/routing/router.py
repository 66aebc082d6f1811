"""The router of one HAM layer: from what a score needs to the decision.

Letters as in `ham.model.mixer`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ham.errors import ConfigError, RoutingError
from ham.model.mixer import MixerAux, MixerShape, RoutingHints
from ham.routing.controls import (
    EXPLORATION_STREAM,
    RANDOM_STREAM,
    TIE_STREAM,
    hash_key,
    hash_uniform,
    periodic_mask,
    positions,
)
from ham.routing.options import STATE_SCORES
from ham.routing.scores import ScoreName, post_update_from_l2, reduce_heads
from ham.routing.threshold import ThresholdController, WideBuffers

if TYPE_CHECKING:
    from ham.layer import HamOptions

STREAMS = (RANDOM_STREAM, TIE_STREAM, EXPLORATION_STREAM)

TIE_SCALE = 1e-3
"""By how much tied tokens are told apart: in nats (lexical), in standard deviations (learned)."""


@dataclass
class Routing:
    """The decision on T tokens.

    Attributes:
        routed: Boolean; `routed_BT`, or `routed_BTH` where every head decides alone.
        score: What was compared with the threshold, of the same shape, detached.
        graded_BT: The learned score in 0..1 with its gradient, for `router_score_BT` of
            `ham.kernels.routed_attention`; None for scores that do not learn.
    """

    routed: Tensor
    score: Tensor
    graded_BT: Tensor | None = None

    def aux(self, kept: Tensor | None = None) -> MixerAux:
        """The report of a layer; `kept` is what entered the cache where that differs."""
        kept = self.routed if kept is None else kept
        if self.score.ndim == 3:
            return MixerAux(routed_BTH=kept, score_BTH=self.score)
        return MixerAux(routed_BT=kept, score_BT=self.score)


class LearnedScore(nn.Module):
    """MLP(x): D -> D / 4 -> 1 with silu (Eq. 14), in float32 also under autocast."""

    def __init__(self, width: int):
        super().__init__()
        self.hidden = nn.Linear(width, max(1, width // 4))
        self.logit = nn.Linear(max(1, width // 4), 1)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """The logit of every token, `logit_BT`, float32 or wider."""
        wide = torch.float64 if x_BTD.dtype == torch.float64 else torch.float32
        with torch.autocast(x_BTD.device.type, enabled=False):
            hidden = F.silu(self._apply_linear(self.hidden, x_BTD.to(wide)))
            return self._apply_linear(self.logit, hidden)[..., 0]

    @staticmethod
    def _apply_linear(linear: nn.Linear, x: Tensor) -> Tensor:
        return F.linear(x, linear.weight.to(x.dtype), linear.bias.to(x.dtype))


class UnigramSurprise(WideBuffers):
    """-log p of every token id, from counts of the training text; NaN before they are known."""

    def __init__(self, vocabulary_size: int):
        super().__init__()
        self.register_buffer("surprise_V", torch.full((vocabulary_size,), torch.nan))

    @torch.no_grad()
    def set_counts(self, counts_V: Tensor) -> None:
        """Take -log of the add-one-smoothed frequencies.

        Raises:
            ValueError: If there is not one count for each token id.
        """
        if counts_V.shape != self.surprise_V.shape:
            raise ValueError(
                f"counts must be {tuple(self.surprise_V.shape)}, not {tuple(counts_V.shape)}"
            )
        smoothed_V = counts_V.double() + 1
        self.surprise_V.copy_(-(smoothed_V / smoothed_V.sum()).log())

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Surprise in nats, `[B, T]`."""
        return self.surprise_V[tokens_BT]


class Router(nn.Module):
    """Scores the tokens of one layer and decides which enter its cache.

    With a budget other than `threshold` every token is offered to the store, which decides itself;
    the controller then stands still.

    Args:
        shape: Where the layer sits.
        options: Of the HAM layer.

    Raises:
        ConfigError: For a lexical score without a vocabulary.
    """

    def __init__(self, shape: MixerShape, options: HamOptions):
        super().__init__()
        self.options = options
        self.layer = shape.layer
        self.heads = shape.heads
        self.seed = shape.seed if options.routing_seed is None else options.routing_seed
        # As a tensor, so that `torch.compile` makes one code for all layers.
        self.register_buffer("keys_S", torch.zeros(len(STREAMS), dtype=torch.int64), False)
        self.fill_tables()
        self.per_head = options.reduction == "per_head"
        self.controller = _make_controller(shape, options)
        self.learned = LearnedScore(shape.width) if options.score == "learned" else None
        self.surprise = None
        if options.score == "lexical":
            if shape.vocabulary_size < 1:
                raise ConfigError(
                    "score 'lexical' needs the size of the vocabulary; this layer was built with "
                    f"vocabulary_size {shape.vocabulary_size}"
                )
            self.surprise = UnigramSurprise(shape.vocabulary_size)

    def fill_tables(self) -> None:
        """Compute the keys of the hash, which are not stored with the weights."""
        for row, stream in enumerate(STREAMS):
            self.keys_S[row] = hash_key((stream, self.seed, self.layer))

    @property
    def kernel_score(self) -> ScoreName | None:
        """The score that the recurrence has to give, per head; None if routing needs none."""
        score = self.options.score
        if score == "post_update":
            return "l2"
        return score if score in STATE_SCORES else None  # type: ignore[return-value]

    def state_score(self, kernel_BTH: Tensor, value_BTHV: Tensor, beta_BTH: Tensor) -> Tensor:
        """`score_BTH` from what the kernel gave for `kernel_score`."""
        if self.options.score == "post_update":
            return post_update_from_l2(kernel_BTH, value_BTHV, beta_BTH)
        return kernel_BTH

    def forward(
        self,
        x_BTD: Tensor,
        state_BTH: Tensor | None,
        start: int | Tensor = 0,
        hints: RoutingHints | None = None,
    ) -> Routing:
        """Decide on T tokens.

        Args:
            x_BTD: Input of the layer.
            state_BTH: `state_score`, or None where `kernel_score` is.
            start: Position of the first token, the same for all sequences or int64 `[B]`.
            hints: The tokens, and those wanted, where the score needs them.

        Raises:
            RoutingError: If hints are missing.
        """
        position_BT = positions(start, x_BTD.shape[1], x_BTD.device)
        score = self.score(x_BTD, state_BTH, position_BT, hints)
        detached = score.detach()
        # Counted per head: a minimum or maximum need not carry a NaN on.
        self.controller.count_bad(detached if state_BTH is None else state_BTH)
        if self.controller.control == "none":
            routed = torch.ones_like(detached, dtype=torch.bool)
        else:
            routed = self.controller.route(detached, self._explored(detached, position_BT))
        return Routing(routed, detached, None if self.learned is None else score.sigmoid())

    def score(
        self,
        x_BTD: Tensor,
        state_BTH: Tensor | None,
        position_BT: Tensor,
        hints: RoutingHints | None = None,
    ) -> Tensor:
        """What is compared with the threshold: `score_BT`, or `score_BTH` per head."""
        name, shape = self.options.score, x_BTD.shape[:2]
        if state_BTH is not None:
            return state_BTH if self.per_head else reduce_heads(state_BTH, self.options.reduction)
        if self.learned is not None:
            return self._told_apart(self.learned(x_BTD), position_BT)
        if name == "random":
            return self._random(position_BT, shape)
        if name == "periodic":
            chosen_BT = periodic_mask(self.controller.fraction, position_BT)
            return chosen_BT.float().expand(shape)
        if name == "recency":
            return position_BT.float().expand(shape)
        if name == "prefix":
            return -position_BT.float().expand(shape)
        if self.surprise is not None:
            surprise_BT = self.surprise(self._hints(hints).tokens_BT)
            return surprise_BT + TIE_SCALE * self._tie(position_BT)
        wanted_BT = self._hints(hints).wanted_BT
        if wanted_BT is None:
            raise RoutingError(
                "score 'oracle' needs to be told which tokens are wanted: pass wanted_BT, as the "
                "recall tasks do; on plain text there is no oracle"
            )
        # Wanted tokens lie in [1, 2), the others in [0, 1), in random order.
        return wanted_BT.float() + self._tie(position_BT)

    def _random(self, position_BT: Tensor, shape: torch.Size) -> Tensor:
        key = self._key(RANDOM_STREAM)
        if not self.per_head:
            return hash_uniform(key, position_BT).expand(shape)
        head_H = torch.arange(self.heads, device=position_BT.device)
        return hash_uniform(key, position_BT[..., None], head_H).expand(*shape, self.heads)

    def _tie(self, position_BT: Tensor) -> Tensor:
        return hash_uniform(self._key(TIE_STREAM), position_BT)

    def _key(self, stream: int) -> Tensor:
        return self.keys_S[STREAMS.index(stream)]

    def _told_apart(self, logit_BT: Tensor, position_BT: Tensor) -> Tensor:
        """Break ties: in the first layer equal tokens have equal logits, a tenth of a text each."""
        spread = self.controller.spread.nan_to_num(0.0)
        return logit_BT + TIE_SCALE * spread * self._tie(position_BT)

    def _explored(self, score_BT: Tensor, position_BT: Tensor) -> Tensor | None:
        """Tokens that a learned router is to try whatever it thinks of them, in training only."""
        if self.learned is None or not self.training or self.options.exploration == 0:
            return None
        row_B1 = torch.arange(score_BT.shape[0], device=score_BT.device)[:, None]
        chance_BT = hash_uniform(
            self._key(EXPLORATION_STREAM), self.controller.steps, row_B1, position_BT
        )
        return chance_BT < self.options.exploration

    def _hints(self, hints: RoutingHints | None) -> RoutingHints:
        if hints is None:
            raise RoutingError(f"score {self.options.score!r} needs hints: the tokens of the input")
        return hints


def _make_controller(shape: MixerShape, options: HamOptions) -> ThresholdController:
    control = "share" if options.score == "periodic" else options.control
    return ThresholdController(
        options.target,
        options.gain,
        control=control if options.budget == "threshold" else "none",
        scope=options.scope,
        threshold=options.threshold,
        name=f"layer {shape.layer} (score {options.score})",
    )
