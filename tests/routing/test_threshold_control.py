"""Control of thresholds: fixed, shared by all layers, over several processes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as multiprocessing
import two_ranks

from ham.errors import RoutingError
from ham.model.calibration import calibrate, realised_fractions, thresholds
from ham.routing import ThresholdController, follow, raise_on_bad_scores
from ham.routing.threshold import closest_threshold


def random_tokens(batch: int, length: int, seed: int) -> torch.Tensor:
    return torch.randint(0, 257, (batch, length), generator=torch.Generator().manual_seed(seed))


def test_a_fixed_threshold_never_moves() -> None:
    controller = ThresholdController(0.25, control="fixed", threshold=0.7).train()
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        score = torch.rand(2, 64, generator=generator)
        assert torch.equal(controller.route(score), score >= 0.7)
        controller.end_step()
    assert float(controller.threshold) == pytest.approx(0.7)


def test_calibration_leaves_fixed_thresholds_unless_it_is_told_a_fraction(tiny_model) -> None:
    model = tiny_model("ham", control="fixed", threshold=0.5)
    tokens_BT = random_tokens(4, 128, 2)
    shares = calibrate(model, [tokens_BT])
    assert thresholds(model) == [0.5, 0.5]
    assert shares == list(realised_fractions(model, [tokens_BT]).values())
    assert calibrate(model, [tokens_BT], 0.125) == [0.125, 0.125]


def test_the_closest_threshold_leaves_ties_out_where_that_is_nearer() -> None:
    scores = torch.tensor([0.0] * 6 + [1.0] * 3 + [2.0])
    assert float(closest_threshold(scores, 0.1)) == 2.0
    assert float(closest_threshold(scores, 0.2)) == 2.0  # 1 of 10 is nearer than 4 of 10
    assert float(closest_threshold(scores, 0.3)) == 1.0
    assert float(closest_threshold(torch.zeros(10), 0.2)) > 0  # none is nearer than all


def test_global_controllers_share_one_threshold_that_holds_the_mean() -> None:
    layers = [ThresholdController(0.25, gain=0.5, scope="global").train() for _ in range(3)]
    generator = torch.Generator().manual_seed(0)
    realised = []
    for step in range(200):
        shares = []
        for index, controller in enumerate(layers):
            score = 0.5 * index + torch.randn(2, 256, generator=generator)
            shares.append(float(controller.route(score).float().mean()))
        if step == 0:
            starts = [float(controller.threshold) for controller in layers]
        follow(layers)
        assert len({float(controller.threshold) for controller in layers}) == 1
        if step == 0:
            # Each layer met its own quantile, so the first move is from the mean of the starts.
            assert float(layers[0].threshold) == pytest.approx(sum(starts) / 3, abs=1e-3)
        realised.append(shares)
    last = torch.tensor(realised[-100:]).mean(0)
    assert abs(float(last.mean()) - 0.25) < 0.01
    assert last[0] < 0.2 < 0.3 < last[2]


def test_layers_of_one_model_can_be_controlled_apart_and_together() -> None:
    alone = ThresholdController(0.25).train()
    beside = ThresholdController(0.25).train()
    shared = [ThresholdController(0.25, scope="global").train() for _ in range(2)]
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        score = torch.randn(2, 64, generator=generator)
        for controller in (alone, beside):
            controller.route(score)
        for index, controller in enumerate(shared):
            controller.route(score + index)
        follow([shared[0], alone, shared[1]])
        beside.end_step()
    assert float(alone.threshold) == float(beside.threshold)


def test_a_tiny_spread_is_controlled_like_any_other() -> None:
    controller = ThresholdController(0.25).train()
    generator = torch.Generator().manual_seed(0)
    shares = []
    for step in range(300):
        logit = 0.8 + 1e-6 * step + 0.002 * torch.randn(4, 256, generator=generator)
        shares.append(float(controller.route(logit).float().mean()))
        controller.end_step()
    assert abs(sum(shares[-100:]) / 100 - 0.25) < 0.01


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scores_that_are_not_finite_are_refused_by_layer_and_count(value) -> None:
    good, bad = ThresholdController(0.5, name="layer 0"), ThresholdController(0.5, name="layer 7")
    score = torch.rand(2, 8)
    good.count_bad(score)
    score[0, :3] = value
    bad.count_bad(score)
    with pytest.raises(RoutingError, match="3 in layer 7"):
        raise_on_bad_scores([good, bad])
    with pytest.raises(RoutingError, match="3 in layer 7"):
        bad.calibrate(score, 0.5)


def test_data_parallel_ranks_agree_on_thresholds(tmp_path: Path) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    multiprocessing.spawn(two_ranks.train, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    assert first["thresholds"] == second["thresholds"]
    assert first["thresholds"][1] == first["thresholds"][2] != first["thresholds"][0]
    assert first["calibrated"] == second["calibrated"] == 80.0
    tokens = two_ranks.COUNTED_STEPS * 3 * 128
    share = (first["kept"] + second["kept"]) / tokens
    assert abs(float(share[0]) - 0.25) < 0.02
    assert abs(float(share[1:].mean()) - 0.25) < 0.02
