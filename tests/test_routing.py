"""Routing scores and the threshold's control."""

from __future__ import annotations

import math

import pytest
import torch

from ham.routing import ThresholdController, head_scores, reduce_heads, upper_quantile


def test_scores_by_hand() -> None:
    # v = (3, 4), |v| = 5; p = (4, 3), |p| = 5, <p, v> = 24; e = (-1, 1), |e| = sqrt(2).
    v = torch.tensor([3.0, 4.0]).view(1, 1, 1, 2)
    p = torch.tensor([4.0, 3.0]).view(1, 1, 1, 2)
    beta = torch.tensor([[[0.5]]])
    assert float(head_scores("cosine", p, v, beta)) == pytest.approx(1 - 24 / 25)
    assert float(head_scores("committed", p, v, beta)) == pytest.approx(0.5 * math.sqrt(2))
    assert float(head_scores("l2", p, v, beta)) == pytest.approx(math.sqrt(2) / 5, rel=1e-5)


@pytest.mark.parametrize("score", ["cosine", "committed", "l2"])
def test_extreme_inputs_give_finite_scores(score) -> None:
    v = torch.tensor([[0.0, 0.0], [1e-30, 0.0], [1e18, -1e18], [1.0, 0.0]]).view(1, 4, 1, 2)
    p = torch.tensor([[0.0, 0.0], [0.0, 1e-30], [-1e18, 1e18], [0.0, 0.0]]).view(1, 4, 1, 2)
    found = head_scores(score, p, v, torch.ones(1, 4, 1))
    assert torch.isfinite(found).all()


def test_an_empty_state_has_cosine_error_one() -> None:
    v = torch.randn(1, 5, 2, 8, generator=torch.Generator().manual_seed(0))
    found = head_scores("cosine", torch.zeros_like(v), v, torch.ones(1, 5, 2))
    assert torch.equal(found, torch.ones(1, 5, 2))


def test_cosine_ignores_the_scale_of_the_prediction() -> None:
    generator = torch.Generator().manual_seed(0)
    v, p = (torch.randn(1, 9, 2, 8, generator=generator) for _ in range(2))
    beta = torch.ones(1, 9, 2)
    full, decayed = (head_scores("cosine", scale * p, v, beta) for scale in (1.0, 0.1))
    torch.testing.assert_close(full, decayed, rtol=0, atol=1e-6)


def test_scores_carry_no_gradient() -> None:
    v = torch.ones(1, 1, 1, 2, requires_grad=True)
    assert not head_scores("cosine", v * 2, v, torch.ones(1, 1, 1)).requires_grad


def test_head_reductions() -> None:
    score = torch.tensor([[[0.1, 0.4, 1.0]]])
    assert float(reduce_heads(score, "min")) == pytest.approx(0.1)
    assert float(reduce_heads(score, "mean")) == pytest.approx(0.5)
    assert float(reduce_heads(score, "max")) == pytest.approx(1.0)


def test_upper_quantile_by_hand() -> None:
    scores = torch.arange(8.0)
    assert float(upper_quantile(scores, 0.25)) == 6.0  # 6 and 7 reach it: 2 of 8
    assert float(upper_quantile(scores, 0.999)) == 0.0
    assert float(upper_quantile(scores, 0.001)) == 7.0


@pytest.mark.parametrize("scale", [1e-3, 1.0, 50.0])
@pytest.mark.parametrize("target", [0.0625, 0.25, 0.5, 0.9])
def test_the_loop_holds_its_target_while_scores_drift(scale, target) -> None:
    controller = ThresholdController(target).train()
    generator = torch.Generator().manual_seed(0)
    fractions = []
    for step in range(400):
        drift = scale * (1 + step / 1000)
        score = drift + scale * torch.randn(4, 256, generator=generator)
        with torch.enable_grad():
            fractions.append(float(controller.route(score).float().mean()))
        controller.end_step()
    # A drift of d standard deviations a step leaves a constant error of d / gain = 0.01; the
    # mean of 50 batches of 1,024 tokens adds a standard error below 0.003.
    assert abs(sum(fractions[-50:]) / 50 - target) < 0.01 + 3 * 0.003


@pytest.mark.parametrize("target", [0.0625, 0.25, 0.5, 0.9])
def test_the_loop_is_exact_on_stationary_scores(target) -> None:
    controller = ThresholdController(target).train()
    generator = torch.Generator().manual_seed(0)
    fractions = []
    for _ in range(300):
        score = torch.randn(4, 256, generator=generator)
        fractions.append(float(controller.route(score).float().mean()))
        controller.end_step()
    assert abs(sum(fractions[-100:]) / 100 - target) < 0.01


def test_cold_start_takes_the_quantile_of_the_first_scores() -> None:
    controller = ThresholdController(0.25).train()
    routed = controller.route(torch.arange(100.0)[None])
    assert int(routed.sum()) == 25


def test_ends_of_the_dial_have_infinite_thresholds() -> None:
    score = torch.tensor([[0.0, 1e30, -1e30]])
    assert not ThresholdController(0.0).route(score).any()
    assert ThresholdController(1.0).route(score).all()


def test_evaluation_never_moves_the_threshold() -> None:
    controller = ThresholdController(0.5).train()
    controller.route(torch.randn(2, 64, generator=torch.Generator().manual_seed(0)))
    controller.end_step()
    before = float(controller.threshold)
    controller.eval()
    controller.route(torch.full((2, 64), 1e3))
    controller.end_step()
    assert float(controller.threshold) == before


def test_a_frozen_threshold_stays_in_training() -> None:
    controller = ThresholdController(0.5).train()
    controller.calibrate(torch.arange(100.0), 0.1)
    for _ in range(5):
        controller.route(torch.zeros(1, 10))
        controller.end_step()
    assert float(controller.threshold) == 90.0


def test_controller_resumes_exactly_from_its_state() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = [torch.randn(2, 64, generator=generator) for _ in range(20)]

    def follow(controller: ThresholdController, part: list[torch.Tensor]) -> float:
        for score in part:
            controller.route(score)
            controller.end_step()
        return float(controller.threshold)

    whole = ThresholdController(0.3).train()
    expected = follow(whole, scores)
    first = ThresholdController(0.3).train()
    follow(first, scores[:7])
    resumed = ThresholdController(0.3).train()
    resumed.load_state_dict(first.state_dict())
    assert follow(resumed, scores[7:]) == expected
