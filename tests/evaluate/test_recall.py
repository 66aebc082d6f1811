"""Pairs: a model that copies answers every query, one that guesses none."""

from __future__ import annotations

import pytest
from stand_ins import InductionModel, UniformModel

from ham.errors import ConfigError
from ham.evaluate.recall import cells

# None of these documents has the key P or A, with which the lines "Pairs" and "Asked" begin: there
# the longest copy may be the heading.
SETTINGS = {"recall": {"pairs": [4, 6], "samples": 5}}


@pytest.mark.parametrize(("model", "accuracy"), [(InductionModel, 1.0), (UniformModel, 0.0)])
def test_accuracy(make_subject, model, accuracy: float) -> None:
    rows = [cell.run() for cell in cells(make_subject(model(), SETTINGS))]
    for pairs, (row,) in zip((4, 6), rows, strict=True):
        assert row["value"] == accuracy and row["x_value"] == pairs
        assert row["n"] == 5 * pairs and row["interval"] == "wilson95"
        # All right or all wrong: nothing but the five documents speaks for a narrower interval.
        assert row["effective_n"] == pytest.approx(5)


def test_rows_match_what_a_failure_would_report(make_subject, tiny_model) -> None:
    for cell in cells(make_subject(tiny_model("ham"), SETTINGS)):
        (row,) = cell.run()
        assert cell.expected[0].items() <= row.items()
        assert 0 < row["kv_fraction"] < 1


def test_more_pairs_than_positions_are_refused(make_subject) -> None:
    model = UniformModel(max_positions=40)
    with pytest.raises(ConfigError, match=r"pairs holds 6, .* max_positions is 40"):
        cells(make_subject(model, {"recall": {"pairs": [2, 6], "samples": 1}}))
