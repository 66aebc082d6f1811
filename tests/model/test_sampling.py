"""The choice of the next token, against probabilities worked by hand."""

from __future__ import annotations

import random

import pytest
import torch

from ham.errors import ConfigError
from ham.model.sampling import Sampling

# Not in order of size, and adding up to 1.
PROBABILITIES = torch.tensor([0.05, 0.5, 0.15, 0.3], dtype=torch.float64)


class Fixed(random.Random):
    """A source that gives one number."""

    def __init__(self, value: float):
        self.value = value

    def random(self) -> float:
        return self.value


def counts(sampling: Sampling, draws: int = 1000) -> list[int]:
    """How often each token is chosen over evenly spaced random numbers."""
    sources = [Fixed((number + 0.5) / draws) for number in range(draws)]
    logits_BV = (PROBABILITIES.log() + 3).expand(draws, -1)
    return torch.bincount(sampling.choose(logits_BV, sources), minlength=4).tolist()


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ({"temperature": 1.0}, [50, 500, 150, 300]),
        ({"temperature": 0.0}, [0, 1000, 0, 0]),
        ({"temperature": 1e-300}, [0, 1000, 0, 0]),
        # Squares of the probabilities: 0.0025, 0.25, 0.0225, 0.09 of 0.365.
        ({"temperature": 0.5}, [7, 685, 61, 247]),
        ({"temperature": 1.0, "top_k": 1}, [0, 1000, 0, 0]),
        ({"temperature": 1.0, "top_k": 2}, [0, 625, 0, 375]),
        ({"temperature": 1.0, "top_k": 99}, [50, 500, 150, 300]),
        ({"temperature": 1.0, "top_p": 0.49}, [0, 1000, 0, 0]),
        ({"temperature": 1.0, "top_p": 0.6}, [0, 625, 0, 375]),
        ({"temperature": 1.0, "top_p": 1.0}, [50, 500, 150, 300]),
        # Of the three likely tokens, 0.8 / 0.95 of the probability is in two.
        ({"temperature": 1.0, "top_k": 3, "top_p": 0.84}, [0, 625, 0, 375]),
        ({"temperature": 1.0, "top_k": 3, "top_p": 0.85}, [0, 526, 158, 316]),
    ],
    ids=str,
)
def test_frequencies_are_the_probabilities(rules, expected) -> None:
    found = counts(Sampling(**rules))
    assert all(abs(a - b) <= 1 for a, b in zip(found, expected, strict=True)), found
    assert [n == 0 for n in found] == [n == 0 for n in expected]


@pytest.mark.parametrize("value", [0.0, 1 - 2**-53])
def test_extreme_random_numbers_choose_legal_tokens(value) -> None:
    logits_BV = torch.linspace(0, -40, 5000)[None].float()
    (token,) = Sampling(1.0, top_k=7).choose(logits_BV, [Fixed(value)]).tolist()
    assert token == (0 if value == 0 else 6)


def test_extreme_logits_give_no_nan() -> None:
    logits_BV = torch.tensor([[3e38, -3e38, 3e38], [-3e38, -3e38, 0.0]])
    tokens = Sampling(0.7).choose(logits_BV, [Fixed(0.6), Fixed(0.99)]).tolist()
    assert tokens == [2, 2]


def test_random_numbers_depend_on_seed_and_prompt() -> None:
    firsts = {
        Sampling(1.0, seed=seed).random_numbers(prompt).random()
        for seed in (-1, 0, 1, 2**70)
        for prompt in range(50)
    }
    assert len(firsts) == 200
    again = Sampling(1.0, seed=1).random_numbers(3).random()
    assert again == Sampling(0.5, seed=1).random_numbers(3).random()


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"temperature": -0.1}, r"temperature -0\.1; legal: a finite number >= 0"),
        ({"temperature": float("nan")}, "temperature nan; legal"),
        ({"temperature": float("inf")}, "temperature inf; legal"),
        ({"top_k": 0}, "top_k 0; legal: an integer >= 1"),
        ({"top_p": 0.0}, r"top_p 0\.0; legal: 0 < top_p <= 1"),
        ({"top_p": 1.5}, r"top_p 1\.5; legal"),
        ({"top_p": float("nan")}, "top_p nan; legal"),
    ],
    ids=str,
)
def test_values_outside_their_set_are_refused(rules, message) -> None:
    with pytest.raises(ConfigError, match=message):
        Sampling(**rules)
