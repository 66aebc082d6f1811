"""What the metrics of result rows mean for a comparison: which way is better, and the unit.

Both follow from the unit that ends a metric's name.
"""

from __future__ import annotations

from typing import Literal

from ham.errors import unknown_choice

Better = Literal["higher", "lower"]

# Chance levels, thresholds and the distance of two providers have a unit too, but no better side.
NEUTRAL_STARTS = ("chance_", "unigram_", "threshold", "target_")
NEUTRAL_ENDS = ("difference_nats",)
SHARES = ("accuracy", "accuracy_norm", "precision")
RATES = ("_per_second", "_per_s")
LOWER_ENDS = (
    "_ms",
    "_seconds",
    "_nats",
    "_bytes",
    "_bytes_allocated",
    "_bytes_used",
    "_flops",
    "bits_per_byte",
    "perplexity",
    "_error",
    "_flipped",
)
UNITS = {
    "bits_per_byte": "bits per byte",
    "perplexity": "perplexity",
    "_flops": "FLOPs",
    "_bytes": "bytes",
    "_bytes_allocated": "bytes",
    "_bytes_used": "bytes",
    "_nats": "nats",
    "_seconds": "s",
    "_ms": "ms",
    **dict.fromkeys(RATES, "per s"),
    **dict.fromkeys(SHARES, "share"),
}

CLAIMABLE = (
    "accuracy",
    "accuracy_norm",
    "routed_precision",
    "bits_per_byte",
    "byte_perplexity",
    "word_perplexity",
    "perplexity",
    "loss_nats",
    "answer_loss_nats",
    "final_loss_nats",
    "training_flops",
    "tokens_per_second",
    "tokens_per_s",
    "wall_seconds",
    "median_ms",
    "decode_ms",
    "prefill_ms",
    "training_step_ms",
    "train_step_ms",
    "forward_ms",
    "forward_saving_ms",
    "forward_backward_ms",
    "cache_bytes_allocated",
    "cache_bytes_used",
    "kv_bytes",
    "state_bytes",
    "peak_bytes",
    "peak_memory_bytes",
)
"""Metrics that a claim may be about: those of the rows of which more, or less, is better."""


def better_direction(metric: str) -> Better | None:
    """Which direction of a metric is the better one, None where neither is."""
    if metric.startswith(NEUTRAL_STARTS) or metric.endswith(NEUTRAL_ENDS):
        return None
    if metric.endswith((*SHARES, *RATES)):
        return "higher"
    return "lower" if metric.endswith(LOWER_ENDS) else None


def unit(metric: str) -> str:
    """The unit of a metric that a claim may be about.

    Raises:
        ConfigError: For any other; names the legal ones.
    """
    if metric not in CLAIMABLE:
        raise unknown_choice("metric", metric, CLAIMABLE)
    return next(name for ending, name in UNITS.items() if metric.endswith(ending))
