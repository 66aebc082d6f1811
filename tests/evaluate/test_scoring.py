"""Scores of rows: hand-worked values, and independence from the batch that a row sits in."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from stand_ins import SuccessorModel, UniformModel

from ham.errors import ConfigError
from ham.evaluate.scoring import RoutingCount, length_batches, score_rows

MIXERS = ["ham", "gated_delta_rule", "transformer", "sliding_window", "mamba2"]
HIT = math.log(math.exp(5) + 256) - 5
MISS = math.log(math.exp(5) + 256)


def random_rows(lengths: list[int], seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, size=length).tolist() for length in lengths]


def test_hand_worked_scores() -> None:
    (score,) = score_rows(SuccessorModel(), [[3, 4, 5, 9]])
    np.testing.assert_allclose(score.nats, [HIT, HIT, MISS], rtol=1e-6)
    assert score.greedy.tolist() == [True, True, False]
    assert score.span(1, 3) == (pytest.approx(-2 * HIT), True)
    assert score.span(2, 4) == (pytest.approx(-HIT - MISS), False)


def test_uniform_model_needs_log_of_the_vocabulary_per_token() -> None:
    (score,) = score_rows(UniformModel(), [[1, 2, 3, 4, 5]])
    np.testing.assert_allclose(score.nats, math.log(257), rtol=1e-6)


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_row_scores_the_same_alone_and_in_any_batch(tiny_model, mixer: str) -> None:
    model = tiny_model(mixer, dtype=torch.float64)
    rows = random_rows([7, 150, 64, 65, 31, 128, 2, 90])
    alone = [score_rows(model, [row], keep_routed=True)[0] for row in rows]
    together = score_rows(model, rows, batch_tokens=10**6, keep_routed=True)
    shuffled = score_rows(model, rows[::-1], batch_tokens=300, keep_routed=True)[::-1]
    for one, batched, other in zip(alone, together, shuffled, strict=True):
        np.testing.assert_allclose(batched.nats, one.nats, rtol=0, atol=1e-9)
        np.testing.assert_allclose(other.nats, one.nats, rtol=0, atol=1e-9)
        np.testing.assert_array_equal(batched.greedy, one.greedy)
        if mixer == "ham":
            np.testing.assert_array_equal(batched.routed, one.routed)


def test_padding_behind_a_row_is_really_there(tiny_model) -> None:
    """Guards the test above: rows of one batch do differ in length, so padding is exercised."""
    model = UniformModel()
    score_rows(model, random_rows([100, 90, 85]), batch_tokens=10**6)
    assert model.batches == [(3, 99)]


def test_routed_shares_leave_padding_out(tiny_model) -> None:
    model = tiny_model("ham", dtype=torch.float64)
    rows = random_rows([100, 90, 85, 81])
    counted = RoutingCount()
    scores = score_rows(model, rows, batch_tokens=10**6, routing=counted, keep_routed=True)
    routed = np.concatenate([score.routed for score in scores], axis=1)
    assert counted.tokens == sum(len(row) - 1 for row in rows) == routed.shape[1]
    assert counted.per_layer() == {0: routed[0].mean(), 1: routed[1].mean()}
    assert counted.fraction() == pytest.approx(routed.mean())
    assert 0 < counted.fraction() < 1


def test_hand_worked_routed_share() -> None:
    counted = RoutingCount()
    score_rows(SuccessorModel(), [[2, 4, 6, 1], [1, 3, 5]], routing=counted)
    assert counted.tokens == 5
    assert counted.per_layer() == {1: 3 / 5}


def test_a_model_that_does_not_route_has_no_share() -> None:
    counted = RoutingCount()
    score_rows(UniformModel(), [[1, 2, 3]], routing=counted)
    assert counted.fraction() is None and counted.tokens == 2


def test_batches_keep_to_the_budget_and_to_similar_lengths() -> None:
    lengths = [10, 100, 95, 12, 99, 11, 40]
    batches = list(length_batches(lengths, batch_tokens=200))
    assert sorted(index for batch in batches for index in batch) == list(range(7))
    for batch in batches:
        longest = max(lengths[index] for index in batch)
        assert len(batch) * longest <= 200
        assert min(lengths[index] for index in batch) * 1.25 >= longest
    assert [1] not in batches, "100 and 99 fit the budget together"


def test_a_row_longer_than_the_budget_is_read_alone() -> None:
    assert list(length_batches([500, 3], batch_tokens=200)) == [[0], [1]]


def test_progress_counts_every_row() -> None:
    seen: list[tuple[int, int]] = []
    score_rows(UniformModel(), random_rows([5, 50, 500]), on_batch=lambda *done: seen.append(done))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_training_mode_is_restored(tiny_model) -> None:
    model = tiny_model("transformer").train()
    score_rows(model, [[1, 2, 3]])
    assert model.training


def test_too_long_and_too_short_rows(tiny_model) -> None:
    model = tiny_model("gated_delta_rule")
    with pytest.raises(ConfigError, match=r"1100 tokens .* max_positions 1024"):
        score_rows(model, random_rows([1101]))
    with pytest.raises(ValueError, match="at least two tokens"):
        score_rows(model, [[1]])
