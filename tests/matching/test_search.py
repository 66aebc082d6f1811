from __future__ import annotations

import pytest

from ham.matching.search import Refusal, closest


def nearest(values, cost, wanted):
    """The answer by trying everything."""
    costs = [(abs(cost(v) - wanted), i) for i, v in enumerate(values) if cost(v) is not None]
    return min(costs)[1] if costs else None


@pytest.mark.parametrize(
    ("legal", "start"),
    [(range(1, 1001), 0), (range(1, 1001), 999), (range(1, 500), 999), (range(30, 700), 40)],
)
@pytest.mark.parametrize(
    "shape",
    [lambda v: 100 + 7 * v, lambda v: v // 64 * 64, lambda v: v * v],
    ids=["line", "stairs", "square"],
)
def test_the_closest_of_a_thousand_values_is_found(shape, legal, start):
    values = range(1, 1001)

    def cost(value):
        return shape(value) if value in legal else Refusal("no")

    for wanted in (0, 1, 353, 500, 1234, 4567, 10**7):
        found = closest(values, cost, wanted, start)
        best = nearest(values, lambda v: shape(v) if v in legal else None, wanted)
        assert abs(found.cost - wanted) == abs(shape(values[best]) - wanted)
        assert shape(values[found.index]) == found.cost


def test_a_line_over_millions_of_values_takes_few_looks():
    looks = []

    def cost(value):
        looks.append(value)
        return 1000 + 256 * value

    found = closest(range(1, 1 << 24), cost, 1000 + 256 * 1_234_567 + 100)
    assert found.index == 1_234_566
    assert len(looks) < 8


def test_few_values_need_not_grow():
    costs = {"a": 5.0, "b": 90.0, "c": 40.0}
    found = closest(list(costs), costs.get, 38)
    assert (found.index, found.cost, found.limit) == (2, 40.0, "the next one, a, gives 5")


@pytest.mark.parametrize("values", [range(10), range(1000)])
def test_what_is_beyond_the_last_value_is_said(values):
    assert closest(values, float, 5000).limit == "no value gives more"
    assert closest(values, lambda value: value + 50.0, 3).limit == "no value gives less"
    found = closest(values, lambda v: float(v) if v < 8 else Refusal("too large"), 5000)
    assert (found.cost, found.limit) == (7.0, "8 is refused: too large")


def test_nothing_but_refusals():
    found = closest(range(1000), lambda value: Refusal(f"{value} is odd"), 5, start=10)
    assert (found.index, found.cost, found.limit) == (None, None, "0 is odd")
