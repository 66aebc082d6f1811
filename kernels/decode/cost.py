"""FLOPs and bytes of one decode step, whatever computes it; letters as in `ham.model.mixer`.

Parameters that all sequences share (convolution weights, gains, rotary tables) are left out: they
stay in the second-level cache.
"""

from __future__ import annotations

import torch

from ham.kernels.registry import Cost

FLOAT_BYTES = 4
ADDRESS_BYTES = 8
INT_BYTES = 4
DELTA_RULE_FLOPS = 7
"""Per element of the state; see `ham.kernels.gated_delta_rule.cost`."""


def recurrent_cost(
    *, batch: int, heads: int, key_size: int, value_size: int, conv_size: int, dtype: torch.dtype
) -> Cost:
    """Convolution and gated delta rule of one token.

    Bytes: q, k, v, decay and write projections read, read-outs written in `dtype`; the W - 1 inputs
    of the convolution read and written; the state read and written in float32.
    """
    channels = heads * (2 * key_size + value_size)
    state = heads * key_size * value_size
    numbers = channels * (1 + 2 * (conv_size - 1)) + heads * (2 + value_size)
    return Cost(
        flops=batch * (DELTA_RULE_FLOPS * state + 2 * conv_size * channels),
        bytes=batch * (numbers * dtype.itemsize + 2 * state * FLOAT_BYTES),
    )


def attention_cost(
    *,
    counts: int,
    heads: int,
    key_size: int,
    value_size: int,
    page_tokens: int,
    dtype: torch.dtype,
) -> Cost:
    """One query per head over `counts` cached tokens, summed over the sequences.

    Bytes: keys and values of those tokens in `dtype`, and an address for every page of them.
    """
    pairs = counts * heads * (key_size + value_size)
    pages = -(-counts // page_tokens)
    return Cost(flops=2 * pairs, bytes=pairs * dtype.itemsize + pages * ADDRESS_BYTES)


def mixer_cost(
    *,
    batch: int,
    counts: int,
    heads: int,
    key_size: int,
    value_size: int,
    conv_size: int,
    page_tokens: int,
    dtype: torch.dtype,
    routed: int | None = None,
) -> Cost:
    """One step of the HAM layer between its projections.

    Bytes: those of the recurrence and of the attention; key, value and position of the `routed`
    tokens written (default: all, as the kernel writes them before it knows); branch gates read and
    the output written. What goes from launch to launch is left out.
    """
    recurrent = recurrent_cost(
        batch=batch,
        heads=heads,
        key_size=key_size,
        value_size=value_size,
        conv_size=conv_size,
        dtype=dtype,
    )
    attention = attention_cost(
        counts=counts,
        heads=heads,
        key_size=key_size,
        value_size=value_size,
        page_tokens=page_tokens,
        dtype=dtype,
    )
    written = batch if routed is None else routed
    appended = written * (heads * (key_size + value_size) * dtype.itemsize + INT_BYTES)
    # The recurrence counts its read-out as written; here the combined output takes its place.
    gates = batch * 2 * heads * dtype.itemsize
    return Cost(
        flops=recurrent.flops + attention.flops,
        bytes=recurrent.bytes + attention.bytes + appended + gates,
    )
