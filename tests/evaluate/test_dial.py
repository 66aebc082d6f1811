"""The dial: thresholds follow the target, scores come from them, and the trained ones return."""

from __future__ import annotations

import pytest
import torch

from ham.evaluate import dial
from ham.evaluate.language_modelling import draw_segments, ratio_fields
from ham.evaluate.scoring import score_rows
from ham.model.calibration import calibrate, thresholds

SETTINGS = {"dial": {"fractions": [0.0, 0.25, 0.75, 1.0], "tokens": 2560}}
TRAIN = {"train": {"calibration_batches": 2, "batch_size": 4}}


def test_realised_fraction_follows_the_target(make_subject, tiny_model) -> None:
    rows = [
        cell.run()[0] for cell in dial.cells(make_subject(tiny_model("ham"), SETTINGS, **TRAIN))
    ]
    realised = [row["kv_fraction"] for row in rows]
    assert realised[0] == 0.0 and realised[-1] == 1.0
    assert realised[1:3] == pytest.approx([0.25, 0.75], abs=0.06)
    assert [row["x_value"] for row in rows] == SETTINGS["dial"]["fractions"]
    assert all(row["value"] > 0 and row["interval"] == "bootstrap95" for row in rows)


def test_a_cache_of_a_fixed_size_has_no_dial(make_subject, tiny_model) -> None:
    model = tiny_model("ham", budget="bounded", slots=16, score="recency")
    assert dial.cells(make_subject(model, SETTINGS, **TRAIN)) == []


@pytest.mark.parametrize(
    "options",
    [
        {"score": "periodic"},
        {"score": "learned"},
        {"reduction": "per_head"},
        {"scope": "global"},
        {"control": "fixed", "threshold": 0.5},
    ],
    ids=str,
)
def test_every_kind_of_threshold_can_be_dialled(make_subject, tiny_model, options) -> None:
    model = tiny_model("ham", **options)
    before = thresholds(model)
    subject = make_subject(model, {"dial": {"fractions": [0.25, 0.75], "tokens": 1280}}, **TRAIN)
    realised = [cell.run()[0]["kv_fraction"] for cell in dial.cells(subject)]
    assert realised == pytest.approx([0.25, 0.75], abs=0.08)
    assert thresholds(model) == before


def test_scores_are_those_of_the_calibrated_model(make_subject, tiny_model) -> None:
    model = tiny_model("ham")
    subject = make_subject(model, SETTINGS, **TRAIN)
    row = dial.cells(subject)[1].run()[0]
    calibrate(model, dial.calibration_batches(subject), 0.25)
    segments = draw_segments(subject.test.documents(), 128, 2560)
    scores = score_rows(model, [segment.tokens for segment in segments])
    nats = sum(score.nats.sum() for score in scores)
    assert row["value"] == pytest.approx(nats / torch.log(torch.tensor(2.0)).item() / 2560)
    assert row["n"] == ratio_fields(*_parts(scores, segments))["n"]


def _parts(scores, segments):
    import numpy as np

    bits = np.array([score.nats.sum() for score in scores])
    return bits, np.full(len(bits), 128), np.array([segment.document for segment in segments])


def test_the_trained_thresholds_come_back(make_subject, tiny_model) -> None:
    model = tiny_model("ham")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for cell in dial.cells(make_subject(model, SETTINGS, **TRAIN)):
        cell.run()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0, equal_nan=True)


def test_they_come_back_after_a_failure_too(tiny_model) -> None:
    model = tiny_model("ham")
    before = thresholds(model)
    with pytest.raises(RuntimeError, match="in between"), dial.thresholds_restored(model):
        calibrate(model, [torch.zeros(1, 8, dtype=torch.int64)], 0.9)
        assert thresholds(model) != before
        raise RuntimeError("in between")
    assert thresholds(model) == before


def test_models_that_do_not_route_have_no_dial(make_subject, tiny_model) -> None:
    assert dial.cells(make_subject(tiny_model("transformer"), SETTINGS, **TRAIN)) == []


def test_calibration_reads_the_calibration_split(make_subject, tiny_model) -> None:
    subject = make_subject(tiny_model("ham"), SETTINGS, **TRAIN)
    batches = dial.calibration_batches(subject)
    assert [tuple(batch.shape) for batch in batches] == [(4, 128), (4, 128)]
    text = bytes(subject.shard("calibration").tokens.astype("uint8"))
    assert all(bytes(row.tolist()) in text for batch in batches for row in batch)
