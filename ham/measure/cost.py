"""Operation counts that the mixers' cost methods are built from.

A multiply-add counts as two FLOPs. Element-wise maps (norms, activations, gates) are left out:
they are below one per cent of a layer at the widths used here.
"""

from __future__ import annotations

TRAINING_PASSES = 3.0
"""Forward passes that a training step costs: backward = 2 forward (Kaplan et al. 2020, 2.1)."""


def linear_flops(tokens: int, inputs: int, outputs: int) -> float:
    """A dense projection of `tokens` vectors."""
    return 2.0 * tokens * inputs * outputs


def conv_flops(tokens: int, channels: int, size: int) -> float:
    """A depthwise causal convolution."""
    return 2.0 * tokens * channels * size


def causal_pairs(tokens: int, window: int | None = None) -> float:
    """Query-key pairs of causal attention over `tokens`, each query seeing itself and the past.

    With `window`, a query sees at most that many tokens, itself included.
    """
    if window is None or window >= tokens:
        return tokens * (tokens + 1) / 2
    return window * (window + 1) / 2 + (tokens - window) * window


def attention_flops(pairs: float, heads: int, head_dim: int, value_dim: int) -> float:
    """Scores and weighted sum over that many query-key pairs."""
    return 2.0 * pairs * heads * (head_dim + value_dim)


def delta_rule_flops(tokens: int, heads: int, key_dim: int, value_dim: int) -> float:
    """Gated delta rule in its recurrent form: decay (1), predict, write and read (2 each) per cell.

    The chunked form does more arithmetic in exchange for matrix multiplications; the recurrent
    count is the algorithm's own cost and is what the comparison uses.
    """
    return 7.0 * tokens * heads * key_dim * value_dim


def ssd_flops(tokens: int, heads: int, head_dim: int, state_size: int) -> float:
    """Mamba-2's recurrence: decay (1), write and read (2 each) per state cell, and the D skip."""
    return tokens * heads * (5.0 * head_dim * state_size + 2.0 * head_dim)
