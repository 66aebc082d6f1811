"""FLOPs and bytes against numbers worked out by hand."""

from __future__ import annotations

import torch

from ham.kernels import gated_delta_rule, routed_attention, ssd
from ham.kernels.decode import cost as decode_cost
from ham.kernels.registry import Cost


def test_gated_delta_rule() -> None:
    """B2 T3 H4 K5 V7: 24 token-heads × 35 state elements × 7 FLOPs."""
    sizes = {"batch": 2, "time": 3, "heads": 4, "key_size": 5, "value_size": 7}
    # bfloat16: (5 + 5 + 7 + 7) × 2 = 48 bytes, plus (1 + 1 + 7) × 4 = 36, for each of 24
    # token-heads; one state of 2 × 4 × 35 × 4 = 1120 bytes written.
    cost = gated_delta_rule.cost(**sizes, dtype=torch.bfloat16)
    assert cost == Cost(flops=5880, bytes=24 * 84 + 1120)
    # float64 with an initial state: 24 × (24 + 9) × 8 and two states of 2240 bytes.
    cost = gated_delta_rule.cost(**sizes, dtype=torch.float64, initial_state=True)
    assert cost == Cost(flops=5880, bytes=24 * 33 * 8 + 4480)
    # One row of 6 tokens with 3 sequences, 2 key heads: q and k of 12 token-heads, 3 states.
    sizes = {**sizes, "batch": 1, "time": 6, "key_heads": 2, "sequences": 3}
    cost = gated_delta_rule.cost(**sizes, dtype=torch.bfloat16)
    assert cost == Cost(flops=5880, bytes=12 * 20 + 24 * (28 + 36) + 3 * 4 * 35 * 4)


def test_gated_delta_rule_in_chunks() -> None:
    """T = 5 in chunks of 3 is 2 chunks for each of 2 sequences and 4 heads, K5 V7.

    Per chunk: K K^T and Q K^T 2 × 90, inverse 9, A [V, K] 216, state: residual 210, update 210,
    read-out 210, within the chunk 126.
    """
    flops = gated_delta_rule.chunked_flops(
        batch=2, time=5, heads=4, key_size=5, value_size=7, chunk_size=3
    )
    assert flops == 16 * (180 + 9 + 216 + 630 + 126)


def test_ssd() -> None:
    """B2 T3 H4 P5 S7: 24 token-heads × 35 state elements × 5 FLOPs."""
    sizes = {"batch": 2, "time": 3, "heads": 4, "head_size": 5, "state_size": 7}
    # float32: 6 tokens × (20 + 20 + 7 + 7) × 4; dt of 24, a and D of 4 each, × 4; one state.
    cost = ssd.cost(**sizes, dtype=torch.float32)
    assert cost == Cost(flops=4200, bytes=6 * 54 * 4 + 32 * 4 + 1120)
    # Two groups of heads: 14 more numbers of b and c a token.
    grouped = ssd.cost(**sizes, dtype=torch.float32, groups=2)
    assert grouped == Cost(flops=4200, bytes=6 * 68 * 4 + 32 * 4 + 1120)


def test_ssd_in_chunks() -> None:
    """T = 5 in chunks of 3 is 2 chunks for each of 2 sequences; P5 S7, 4 heads.

    Per chunk: C B^T 126 once; a head 90 within the chunk, 420 for the state, 70 to pass it on.
    """
    flops = ssd.chunked_flops(batch=2, time=5, heads=4, head_size=5, state_size=7, chunk_size=3)
    assert flops == 4 * (126 + 4 * 580)
    flops = ssd.chunked_flops(
        batch=2, time=5, heads=4, head_size=5, state_size=7, chunk_size=3, groups=2
    )
    assert flops == 4 * (2 * 126 + 4 * 580)


def test_routed_attention() -> None:
    """B2 T4 H3 K5 V7, half routed: 2 × 0.5 × 10 pairs × 3 heads × 24 FLOPs."""
    sizes = {"batch": 2, "time": 4, "heads": 3, "key_size": 5, "value_size": 7}
    # bfloat16: 8 tokens × 36 numbers of q and o, half as many of k and v; 8 bytes of mask.
    cost = routed_attention.cost(**sizes, dtype=torch.bfloat16, routed_fraction=0.5)
    assert cost == Cost(flops=720, bytes=8 * 36 * 2 + 4 * 36 * 2 + 8)
    whole = routed_attention.cost(**sizes, dtype=torch.bfloat16)
    assert whole == Cost(flops=1440, bytes=2 * 8 * 36 * 2 + 8)


def test_routed_attention_with_a_window_and_grouped_heads() -> None:
    """T4, window 2: 1 + 2 + 2 + 2 recent pairs, half of the 1 + 2 outside; B2 H4 G2 K5 V7."""
    cost = routed_attention.cost(
        batch=2, time=4, heads=4, key_size=5, value_size=7, dtype=torch.bfloat16,
        routed_fraction=0.5, key_heads=2, window=2,
    )  # fmt: skip
    # 8 tokens: q and o of four heads, k and v of two heads, all read, and a byte of mask.
    assert cost == Cost(flops=2 * 4 * 12 * 17, bytes=8 * 12 * (4 + 2) * 2 + 8)


def test_pairs_are_counted_exactly() -> None:
    """Queries 0..3 see 0, 1, 1 and 2 keys in the first sequence, none in the second."""
    routed = torch.tensor([[False, True, False, True], [False] * 4])
    assert routed_attention.count_pairs(routed) == 4
    # With a window of 2: 7 recent pairs a sequence, and query 3 sees token 1 as a routed one.
    assert routed_attention.count_pairs(routed, window=2) == 15
    assert routed_attention.count_pairs(routed, window=9) == 20


def test_cached_attention() -> None:
    """2 sequences, 1 query, 10 keys, 3 heads, K5 V7 in float32."""
    cost = routed_attention.cached_cost(
        batch=2, queries=1, keys=10, heads=3, key_size=5, value_size=7, dtype=torch.float32
    )
    # Eleven rows of 36 numbers and a position a sequence, and a count.
    assert cost == Cost(flops=2 * 10 * 3 * 24, bytes=2 * (11 * (36 * 4 + 8) + 8))


def test_decode_step() -> None:
    """B2 H4 K5 V7, W = 4, bfloat16, 33 cached tokens on pages of 16."""
    sizes = {"heads": 4, "key_size": 5, "value_size": 7, "dtype": torch.bfloat16}
    # 68 channels: 1 new and 6 old numbers each; 8 of decay and write, 28 of o; state of 140 floats
    # read and written. Convolution 2 × 4 FLOPs a channel.
    recurrent = decode_cost.recurrent_cost(batch=2, conv_size=4, **sizes)
    assert recurrent == Cost(
        flops=2 * (7 * 140 + 8 * 68), bytes=2 * ((68 * 7 + 8 + 28) * 2 + 2 * 140 * 4)
    )
    # 33 × 4 heads × 12 numbers, 3 pages.
    attention = decode_cost.attention_cost(counts=33, page_tokens=16, **sizes)
    assert attention == Cost(flops=2 * 1584, bytes=2 * 1584 + 24)
    # One of two tokens appended: 48 numbers and a position; 8 gates a sequence.
    mixer = decode_cost.mixer_cost(
        batch=2, counts=33, conv_size=4, page_tokens=16, routed=1, **sizes
    )
    assert mixer == Cost(
        flops=recurrent.flops + attention.flops,
        bytes=recurrent.bytes + attention.bytes + 48 * 2 + 4 + 2 * 8 * 2,
    )
