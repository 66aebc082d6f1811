"""Who enters the KV cache: routing scores and the threshold that turns them into a decision.

`scores` measures how badly the recurrent state predicted a token, `controls` holds scores that do
not look at the state, `threshold` keeps a target share, and `router` joins them for one layer.
`router` is not imported here: the kernels import this package and need none of it.
"""

from __future__ import annotations

from ham.routing.scores import (
    PREDICTION_FLOOR,
    VALUE_FLOOR,
    ReductionName,
    ScoreName,
    StateScore,
    head_scores,
    post_update_from_l2,
    reduce_heads,
)
from ham.routing.threshold import ThresholdController, follow, raise_on_bad_scores, upper_quantile

__all__ = [
    "PREDICTION_FLOOR",
    "VALUE_FLOOR",
    "ReductionName",
    "ScoreName",
    "StateScore",
    "ThresholdController",
    "follow",
    "head_scores",
    "post_update_from_l2",
    "raise_on_bad_scores",
    "reduce_heads",
    "upper_quantile",
]
