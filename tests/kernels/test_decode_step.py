"""Decode steps against the reference: scores, decisions, cache content, long runs, faults."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from decode_checks import (
    DEVICE,
    LIMIT,
    Layer,
    SideBySide,
    interpreter,
    needs_gpu,
    on_gpu,
    random_numbers,
    relative_error,
)

from ham.errors import ConfigError
from ham.kernels.decode import reference
from ham.kernels.decode.arguments import NAN_SCORES, NO_SLOT, AttentionTile, Routing

__all__ = ["interpreter", "needs_gpu"]

LONG_RUN = Layer(batch=1, threshold=0.8, tile=AttentionTile(16, 2, 1, fused=True))
SWITCHES = [
    Layer(
        batch=1, heads=3, key_size=24, value_size=40, score="l2", reduction="mean", threshold=1.0175
    ),
    Layer(batch=1, score="committed", reduction="max", rope=False, conv_size=1, threshold=1.0),
    Layer(batch=1, score="post_update", reduction="per_head", threshold=1.5, page_tokens=8),
    Layer(batch=3, heads=1, score="given", threshold=0.1, conv_size=2),
    Layer(batch=1, score="given", reduction="per_head", threshold=0.1),
    Layer(batch=1, heads=3, dtype=torch.float16, key_size=32, threshold=0.6),
    Layer(batch=1, cache_dtype=torch.float16, reduction="mean"),
]
GPU_LAYERS = [
    Layer(batch=3, heads=5, key_size=key_size, value_size=value_size, **options)
    for key_size, value_size, options in (
        (16, 16, {"page_tokens": 16}),
        (32, 32, {"page_tokens": 32, "tile": AttentionTile(32, 4, 4)}),
        (64, 64, {"page_tokens": 32, "tile": AttentionTile(64, 4, 4), "score": "l2"}),
        (64, 64, {"page_tokens": 64, "tile": AttentionTile(32, 4, 4, fused=True)}),
        (64, 128, {"page_tokens": 32, "tile": AttentionTile(32, 3, 4), "warps": 4}),
        (72, 40, {"page_tokens": 16, "tile": AttentionTile(64, 5, 2), "warps": 2}),
        (96, 96, {"page_tokens": 32, "tile": AttentionTile(32, 4, 4), "reduction": "mean"}),
        (128, 128, {"page_tokens": 32, "tile": AttentionTile(32, 16, 4, fused=True)}),
        (128, 128, {"page_tokens": 64, "tile": AttentionTile(64, 8, 8), "warps": 8}),
        (128, 128, {"page_tokens": 32, "reduction": "per_head", "score": "committed"}),
    )
]


def run(layer: Layer, steps: int, compare_every: int = 1) -> SideBySide:
    """Decode some tokens, comparing everything; returns both sides."""
    sides = SideBySide(layer)
    for token in range(steps):
        errors = sides.step(token, output=token % compare_every == 0)
        assert max(errors.values()) < LIMIT[layer.dtype], (token, errors)
    errors = sides.cached_errors()
    assert max(errors.values()) < LIMIT[layer.dtype], errors
    assert sides.scratch.faults_2.tolist() == [0, 0]
    assert not sides.scratch.arrivals_B.any()
    assert not sides.scratch.arrivals_BH.any()
    return sides


def test_fifty_tokens() -> None:
    """States, decisions and pages stay those of the reference; no score is near the threshold."""
    sides = run(LONG_RUN, 50, compare_every=7)
    assert sides.nearest > 1e-4
    assert sides.decided == 50
    assert 16 < sides.pages.counts_R.item() < 45


@pytest.mark.parametrize("layer", SWITCHES, ids=str)
def test_switches(layer: Layer) -> None:
    sides = run(layer, 4, compare_every=3)
    stored = sides.pages.counts_R.sum().item()
    assert 0 < stored < 4 * layer.rows


@pytest.mark.gpu
@pytest.mark.usefixtures("needs_gpu")
@pytest.mark.parametrize("layer", on_gpu([LONG_RUN, *GPU_LAYERS, *SWITCHES], 2), ids=str)
def test_gpu(layer: Layer) -> None:
    sides = run(layer, 60)
    assert sides.decided > 0


@pytest.mark.gpu
@pytest.mark.usefixtures("needs_gpu")
@pytest.mark.parametrize("fused", [False, True])
def test_a_replayed_graph_equals_launches(fused: bool) -> None:
    """Many programs at once, bit by bit: counters return to 0, and every size is read anew."""
    tile = AttentionTile(32, 8, 4, fused=fused)
    layer = Layer(32, 16, 64, 64, 32, dtype=torch.bfloat16, threshold=0.7, tile=tile)
    launched, replayed = SideBySide(layer), SideBySide(layer)
    static = tuple(torch.empty_like(each) for each in replayed.inputs(0))
    warm_up = SideBySide(layer)
    warm_up.launch(warm_up.inputs(0))
    graph = torch.cuda.CUDAGraph()
    y_BHV = torch.empty_like(replayed.scratch.o_BHV)
    with torch.cuda.graph(graph):
        replayed.launch(static, y_BHV)
    for token in range(100):
        for held, given in zip(static, launched.inputs(token), strict=True):
            held.copy_(given)
        expected_BHV = launched.launch(launched.inputs(token))
        graph.replay()
        assert torch.equal(y_BHV, expected_BHV)
        launched.positions_B += 1
        replayed.positions_B += 1
    assert torch.equal(replayed.pages.counts_R, launched.pages.counts_R)
    assert 0 < launched.pages.counts_R.sum() < 100 * layer.batch
    assert not replayed.scratch.arrivals_B.any()


def test_scores_that_are_nan_route_nothing_and_are_counted() -> None:
    """One head's NaN is the sequence's; the other sequence goes on."""
    sides = SideBySide(Layer(threshold=-10.0))
    sides.recurrence.state_BHKV[1, 0, 3, 5] = torch.nan
    sides.launch_step(sides.inputs(0))
    assert sides.scratch.routed_R.tolist() == [1, 0]
    assert sides.scratch.score_R.isnan().tolist() == [False, True]
    assert sides.pages.counts_R.tolist() == [1, 0]
    assert sides.scratch.faults_2[NAN_SCORES] == 1
    assert sides.scratch.faults_2[NO_SLOT] == 0


@pytest.mark.parametrize("reduction", ["min", "per_head"])
def test_routed_without_a_page(reduction: str) -> None:
    """Nothing is written, nothing counted as stored, and the loss is reported."""
    sides = SideBySide(Layer(batch=1, threshold=-10.0, reduction=reduction), pages_per_row=1)
    sides.pages.counts_R[0] = 16
    before = sides.pool.bytes_NX.clone()
    sides.launch_step(sides.inputs(0))
    assert sides.pages.counts_R[0] == 16
    assert sides.scratch.routed_R[0] == 0
    assert sides.scratch.faults_2.tolist() == [0, 1]
    sides.pages.page_table_RP[:] = 0
    sides.pages.counts_R[:] = 0
    if reduction == "min":
        assert torch.equal(sides.pool.bytes_NX, before)
        sides.launch_step(sides.inputs(0))
        assert torch.equal(sides.pool.bytes_NX, before)
        assert sides.scratch.faults_2.tolist() == [0, 2]


def test_idle_sequences_are_left_alone() -> None:
    sides = SideBySide(Layer(threshold=-10.0, heads=1))
    state_BHKV = sides.recurrence.state_BHKV.clone()
    history_BWC = sides.recurrence.history_BWC.clone()
    active_B = torch.tensor([1, 0], dtype=torch.int8, device=DEVICE)
    sides.launch_step(sides.inputs(0), active_B=active_B)
    assert torch.equal(sides.recurrence.state_BHKV[1], state_BHKV[1])
    assert torch.equal(sides.recurrence.history_BWC[1], history_BWC[1])
    assert not torch.equal(sides.recurrence.state_BHKV[0], state_BHKV[0])
    assert sides.pages.counts_R.tolist() == [1, 0]


def check_recurrent_step(layer: Layer, steps: int) -> None:
    """The layer without a cache, against the reference."""
    from ham.kernels.decode.launch import recurrent_step

    sides = SideBySide(layer)
    parts, wide = sides.recurrence, torch.float32 if layer.exact != torch.float64 else torch.float64
    history_BWC, state_BHKV = sides.history_BWC, sides.state_BHKV.to(wide)
    o_BHV = torch.full_like(sides.scratch.o_BHV, torch.nan)
    for token in range(steps):
        qkv_BC, raw_B2H, _ = sides.inputs(token)
        recurrent_step(qkv_BC, raw_B2H, parts, o_BHV, warps=layer.warps)
        mixed_BC, history_BWC = reference.convolve(
            qkv_BC.to(layer.exact), parts.conv_weight_WC.to(wide), history_BWC
        )
        projected = reference.project(
            mixed_BC,
            raw_B2H.to(layer.exact),
            parts.log_rate_H.to(wide),
            parts.step_bias_H.to(wide),
            layer.key_size,
        )
        truth_BHV, state_BHKV, _ = reference.recur(projected, state_BHKV)
        assert relative_error(o_BHV, truth_BHV) < LIMIT[layer.dtype]
    assert relative_error(parts.state_BHKV, state_BHKV) < LIMIT[layer.dtype]
    assert relative_error(parts.history_BWC, history_BWC) < LIMIT[layer.dtype]


@pytest.mark.parametrize("layer", [Layer(key_size=24, value_size=48)], ids=str)
def test_recurrent_step(layer: Layer) -> None:
    check_recurrent_step(layer, 3)


@pytest.mark.gpu
@pytest.mark.usefixtures("needs_gpu")
@pytest.mark.parametrize(
    "layer",
    on_gpu([each for each in GPU_LAYERS if not each.per_head], 1),
    ids=str,
)
def test_recurrent_step_on_the_gpu(layer: Layer) -> None:
    check_recurrent_step(layer, 60)


@pytest.mark.parametrize("raw", [-30.0, -9.0, -1e-4, 0.0, 3.0, 40.0])
def test_decay_is_exact_where_it_is_close_to_one(raw: float) -> None:
    """The state decays by exp(-rate softplus(raw + bias)); a softplus of 1e-13 must not be 0."""
    from ham.kernels.decode.launch import recurrent_step

    sides = SideBySide(Layer(batch=1, heads=1, conv_size=1))
    parts = replace(
        sides.recurrence,
        log_rate_H=torch.full((1,), 20.0, device=DEVICE),
        step_bias_H=torch.zeros(1, device=DEVICE),
        state_BHKV=torch.ones(1, 1, 16, 16, device=DEVICE),
    )
    raw_B2H = torch.tensor([[raw, -80.0]], device=DEVICE)
    qkv_BC = random_numbers(1, 1, 48)
    recurrent_step(qkv_BC, raw_B2H, parts, torch.empty(1, 1, 16, device=DEVICE))
    softplus = torch.nn.functional.softplus(torch.tensor(raw, dtype=torch.float64))
    decay = torch.exp(-torch.tensor(20.0, dtype=torch.float64).exp() * softplus)
    # The exponent is a float32, so the decay knows at best |log a| units in the last place.
    limit = 1e-6 * max(1.0, -decay.log().item()) if decay > 0 else 1e-12
    assert (parts.state_BHKV.cpu() - decay).abs().max() < limit


def bad_call(**changes: Any) -> None:
    sides = SideBySide(Layer(batch=1, heads=1))
    for name, value in changes.items():
        owner, _, field = name.rpartition("__")
        if owner:
            setattr(sides, owner, replace(getattr(sides, owner), **{field: value}))
        else:
            setattr(sides, name, value)
    sides.launch_step(sides.inputs(0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"positions_B": torch.zeros(1)}, "positions_B has dtype torch.float32"),
        ({"recurrence__state_BHKV": torch.zeros(1, 1, 256, 16)}, "head sizes are 256 and 16"),
        ({"recurrence__log_rate_H": torch.zeros(2)}, r"log_rate_H has shape \(2,\)"),
        ({"pages__page_table_RP": torch.zeros(1, 4).int()}, "page_table_RP has dtype torch.int32"),
        ({"pages__counts_R": torch.zeros(3).int()}, r"counts_R has shape \(3,\)"),
        ({"threshold_1": torch.zeros(())}, r"threshold_1 has shape \(\)"),
        ({"recurrence__history_BWC": torch.zeros(1, 48, 3).mT}, "must be contiguous"),
    ],
)
def test_bad_arguments(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        bad_call(**changes)


def test_bad_settings() -> None:
    threshold_1 = torch.zeros(1)
    with pytest.raises(ConfigError, match="unknown score 'learned'; known: committed, cosine"):
        Routing("learned", "min", threshold_1)
    with pytest.raises(ConfigError, match="unknown reduction 'median'"):
        Routing("l2", "median", threshold_1)
    with pytest.raises(ConfigError, match="'given' came with none in given_R"):
        Routing("given", "min", threshold_1)
    with pytest.raises(ConfigError, match="tokens of a tile is 48"):
        AttentionTile(tokens=48)
    with pytest.raises(ConfigError, match="page_tokens is 24"):
        SideBySide(Layer(page_tokens=24))
