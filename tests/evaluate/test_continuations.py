"""Continuations: hand-worked scores, cut contexts, and contexts that options share."""

from __future__ import annotations

import math

import numpy as np
import pytest
from stand_ins import SuccessorModel

from ham.evaluate.continuations import overflows, score_continuations
from ham.evaluate.scoring import RoutingCount
from ham.model.registry import registered_mixers

HIT = math.log(math.exp(5) + 256) - 5
MISS = math.log(math.exp(5) + 256)


def test_continuations_of_several_lengths() -> None:
    pairs = [([1, 2], [3, 4, 5]), ([7], [8]), ([9, 9, 9], [10, 12])]
    results = score_continuations(SuccessorModel(), pairs, batch_size=2)
    assert [greedy for _, greedy in results] == [True, True, False]
    expected = [-3 * HIT, -HIT, -HIT - MISS]
    np.testing.assert_allclose([value for value, _ in results], expected, rtol=1e-6)


def test_overflow_keeps_the_last_tokens() -> None:
    model = SuccessorModel(context=4)
    context, continuation = [50, 60, 70, 1, 2], [3, 4]
    assert overflows(context, continuation, 4)
    assert not overflows(context[2:], continuation, 4)
    ((value, greedy),) = score_continuations(model, [(context, continuation)], batch_size=1)
    assert model.batches == [(1, 4)]
    assert greedy and value == pytest.approx(-2 * HIT)


def test_a_continuation_longer_than_the_context_scores_what_fits() -> None:
    ((value, greedy),) = score_continuations(
        SuccessorModel(context=3), [([1], [2, 3, 4, 5, 6, 7])], batch_size=1
    )
    assert greedy and value == pytest.approx(-3 * HIT)


def questions(seed: int = 0) -> list[tuple[list[int], list[int]]]:
    """Twelve questions of 2 to 5 options, contexts of 3 to 90 tokens, and rows that share none."""
    rng = np.random.default_rng(seed)

    def draw(length: int) -> list[int]:
        return rng.integers(0, 256, size=length).tolist()

    pairs = [(draw(30), draw(5)), (draw(31), draw(1))]
    for question in range(12):
        context = draw(int(rng.integers(3, 90)))
        pairs += [(context, draw(int(rng.integers(1, 20)))) for _ in range(2 + question % 4)]
    return [pairs[index] for index in rng.permutation(len(pairs))]


@pytest.mark.parametrize("mixer", sorted(registered_mixers()))
def test_shared_contexts_score_as_rows_read_whole(tiny_model, mixer: str) -> None:
    model, pairs = tiny_model(mixer), questions()
    shared_count, count = RoutingCount(), RoutingCount()
    shared = score_continuations(model, pairs, 4, 128, shared_count)
    whole = score_continuations(model, pairs, 4, 128, count, share_contexts=False)
    np.testing.assert_allclose([v for v, _ in shared], [v for v, _ in whole], rtol=0, atol=1e-4)
    assert [greedy for _, greedy in shared] == [greedy for _, greedy in whole]
    assert shared_count.tokens == count.tokens
    assert shared_count.per_layer() == pytest.approx(count.per_layer(), abs=2e-3)


@pytest.mark.parametrize("mixer", sorted(registered_mixers()))
def test_the_batch_size_changes_nothing(tiny_model, mixer: str) -> None:
    model, pairs = tiny_model(mixer), questions(seed=1)
    one, three, sixteen = (
        [value for value, _ in score_continuations(model, pairs, size, 128)] for size in (1, 3, 16)
    )
    np.testing.assert_allclose(three, one, rtol=0, atol=1e-4)
    np.testing.assert_allclose(sixteen, one, rtol=0, atol=1e-4)


def test_a_shared_context_is_read_once() -> None:
    model = SuccessorModel()
    context = list(range(40))
    pairs = [(context, [40, 41]), (context, [40]), (context, [99, 100, 101])]
    answers = score_continuations(model, pairs, 8, 128)
    expected = [(-2 * HIT, True), (-HIT, True), (-2 * HIT - MISS, False)]
    for (value, greedy), (known, known_greedy) in zip(answers, expected, strict=True):
        assert value == pytest.approx(known, rel=1e-6) and greedy == known_greedy
    assert model.batches == [(1, 39), (3, 42)], "the context but its last token; then the options"


def test_contexts_that_are_cut_are_not_shared() -> None:
    model = SuccessorModel(context=16)
    context = list(range(20))
    answers = score_continuations(model, [(context, [20]), (context, [7, 8])], 8)
    assert [value for value, _ in answers] == pytest.approx([-HIT, -MISS - HIT], rel=1e-6)
    assert model.batches == [(2, 16)]


def test_progress_counts_shared_and_lone_rows() -> None:
    seen: list[tuple[int, int]] = []
    pairs = questions()
    score_continuations(SuccessorModel(), pairs, 4, on_batch=lambda *done: seen.append(done))
    assert seen[-1] == (len(pairs), len(pairs))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
