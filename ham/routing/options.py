"""Options of routing: which score, how heads agree, how the threshold is controlled.

Their own module, because the options are checked before any layer is built.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

from pydantic import Field, model_validator

from ham.config import Fraction, NonNegative, PositiveFloat
from ham.model.mixer import MixerOptions
from ham.routing.scores import StateScore
from ham.routing.threshold import ControlName, ScopeName

RoutingScore = Literal[
    "cosine",
    "committed",
    "l2",
    "post_update",
    "learned",
    "random",
    "periodic",
    "recency",
    "prefix",
    "lexical",
    "oracle",
]
RoutingReduction = Literal["min", "mean", "max", "per_head"]

STATE_SCORES: tuple[str, ...] = get_args(StateScore)
HEAD_SCORES = (*STATE_SCORES, "random")
"""Scores that differ between the heads of a token, so that heads can decide alone."""


class RoutingOptions(MixerOptions):
    """Which tokens a HAM layer asks its store to keep; README.md has a table of the scores.

    Attributes:
        score: Routing score.
        reduction: How heads agree on one score per token; `per_head`: they do not, each decides
            alone and has a cache of its own.
        target: Share of tokens to route to the cache.
        control: `loop`: the threshold follows the target; `fixed`: it stays at `threshold`.
        threshold: The threshold of `fixed`.
        scope: One threshold per `layer`, or one for all layers of the model (`global`).
        gain: Step of the threshold's closed loop, in standard deviations of the score.
        exploration: Share of tokens that a learned router routes at random while its threshold
            still moves.
        routing_seed: Seed of the hashes behind random scores, ties and exploration; that of the
            training when None.
    """

    score: RoutingScore = "cosine"
    reduction: RoutingReduction = "min"
    target: Fraction = Field(default=0.25)
    control: ControlName = "loop"
    threshold: float | None = None
    scope: ScopeName = "layer"
    gain: PositiveFloat = 0.1
    exploration: Fraction = 0.02
    routing_seed: NonNegative | None = None

    @model_validator(mode="after")
    def _routing_is_consistent(self) -> RoutingOptions:
        if (self.control == "fixed") != (self.threshold is not None):
            raise ValueError(
                "threshold must be given exactly when control is 'fixed'; received control "
                f"{self.control!r} with threshold {self.threshold}"
            )
        if self.threshold is not None and not math.isfinite(self.threshold):
            raise ValueError(
                f"threshold must be finite, not {self.threshold}; target 0 or 1 with control "
                "'loop' routes nothing or everything"
            )
        if self.reduction == "per_head" and self.score not in HEAD_SCORES:
            raise ValueError(
                f"reduction 'per_head' needs a score that differs between heads "
                f"({', '.join(HEAD_SCORES)}), not {self.score!r}"
            )
        return self
