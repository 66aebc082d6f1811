"""Needles: a model that copies finds them all, one that guesses none; routed shares by hand."""

from __future__ import annotations

import numpy as np
import pytest
from stand_ins import InductionModel, SuccessorModel, UniformModel

from ham.errors import ConfigError
from ham.evaluate.needle import cells, needle_documents
from ham.train.recall_documents import needle_minimum_length
from ham.train.tokenizer import ByteTokenizer

SETTINGS = {"needle": {"lengths": [200, 260], "depths": [0.0, 0.5, 1.0], "samples": 4}}


def values(rows: list[dict], metric: str) -> list[float]:
    return [row["value"] for row in rows if row["metric"] == metric]


def test_a_copying_model_finds_every_needle(make_subject) -> None:
    for cell in cells(make_subject(InductionModel(), SETTINGS)):
        rows = cell.run()
        assert values(rows, "accuracy") == [1.0, 1.0, 1.0]
        assert max(values(rows, "answer_loss_nats")) < 0.1


def test_a_uniform_model_finds_none(make_subject) -> None:
    rows = cells(make_subject(UniformModel(), SETTINGS))[0].run()
    assert values(rows, "accuracy") == [0.0, 0.0, 0.0]
    assert values(rows, "answer_loss_nats") == pytest.approx([np.log(257)] * 3)
    assert values(rows, "kept_fraction") == []
    first = rows[0]
    assert (first["n"], first["interval"], first["low"]) == (4, "wilson95", 0.0)


def test_rows_carry_their_coordinates(make_subject) -> None:
    for length, cell in zip((200, 260), cells(make_subject(UniformModel(), SETTINGS)), strict=True):
        rows = cell.run()
        assert {row["x_value"] for row in rows} == {length}
        assert [row["labels"] for row in rows if row["metric"] == "accuracy"] == [
            {"depth": 0.0},
            {"depth": 0.5},
            {"depth": 1.0},
        ]
        expected = {(fields["metric"], fields["labels"]["depth"]) for fields in cell.expected}
        assert expected == {(row["metric"], row["labels"]["depth"]) for row in rows}


def test_kept_share_is_that_of_the_needles_own_tokens(make_subject) -> None:
    """This model routes tokens with even ids, in layer 1 only."""
    subject = make_subject(SuccessorModel(), SETTINGS)
    rows = cells(subject)[0].run()
    for depth in (0.0, 0.5, 1.0):
        documents = needle_documents(subject.tokenizer, subject.test.tokens, 200, depth, 4)
        shares = [
            np.mean(np.array(document.tokens[slice(*document.needle)]) % 2 == 0)
            for document in documents
        ]
        mean, layer = (
            row
            for row in rows
            if row["metric"].startswith("kept") and row["labels"]["depth"] == depth
        )
        assert mean["value"] == pytest.approx(np.mean(shares)) == layer["value"]
        assert mean["labels"] == {"depth": depth}
        assert layer["labels"] == {"depth": depth, "layer": 1}
        assert layer["metric"] == "kept_fraction_layer"


def test_all_models_get_the_same_documents(make_subject) -> None:
    haystack = make_subject(UniformModel(), SETTINGS).test.tokens
    arguments = (ByteTokenizer(), haystack, 200, 0.5)
    longer, shorter = needle_documents(*arguments, 5), needle_documents(*arguments, 3)
    assert longer[:3] == shorter
    assert len({tuple(document.tokens) for document in longer}) == 5


def test_routing_models_report_every_layer(make_subject, tiny_model) -> None:
    rows = cells(make_subject(tiny_model("ham"), SETTINGS))[0].run()
    layers = [row for row in rows if row["metric"] == "kept_fraction_layer"]
    assert [row["labels"]["layer"] for row in layers] == [0, 1] * 3
    assert all(0 < row["kv_fraction"] < 1 for row in rows)


def test_a_length_below_the_minimum_is_refused_before_anything_runs(make_subject) -> None:
    minimum = needle_minimum_length(ByteTokenizer())
    settings = {"needle": {**SETTINGS["needle"], "lengths": [300, minimum - 1]}}
    with pytest.raises(ConfigError, match=rf"holds {minimum - 1}.* at least {minimum} tokens"):
        cells(make_subject(UniformModel(), settings))
