"""What the metrics of result rows mean for a comparison: which way is better, and the unit."""

from __future__ import annotations

from typing import Literal

from ham.errors import unknown_choice

Better = Literal["higher", "lower"]

RATES = ("per_second", "per_s")
# Longest first: the first ending that fits decides.
UNITS = {
    "bits_per_byte": "bits per byte",
    "perplexity": "perplexity",
    "flops": "FLOPs",
    "bytes": "bytes",
    "nats": "nats",
    "seconds": "s",
    "ms": "ms",
}
SHARES = ("accuracy", "accuracy_norm", "routed_precision", "pairs_kept_fraction")

COMPARABLE = (
    *SHARES,
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
"""Metrics of which more, or less, is better. Routed shares and thresholds are neither."""


def better(metric: str) -> Better:
    """Whether higher or lower values of a metric are better.

    Raises:
        ConfigError: For a metric that is not comparable; names those that are.
    """
    _check(metric)
    return "higher" if metric in SHARES or metric.endswith(RATES) else "lower"


def unit(metric: str) -> str:
    """The unit of a metric, as its name gives it.

    Raises:
        ConfigError: For a metric that is not comparable; names those that are.
    """
    _check(metric)
    if metric in SHARES:
        return "share"
    if metric.endswith(RATES):
        return "tokens per s"
    plain = metric.removesuffix("_allocated").removesuffix("_used")
    return next(name for ending, name in UNITS.items() if plain.endswith(ending))


def _check(metric: str) -> None:
    if metric not in COMPARABLE:
        raise unknown_choice("metric", metric, COMPARABLE)
