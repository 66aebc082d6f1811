"""The dial: thresholds follow the target, scores come from them, and the trained ones return."""

from __future__ import annotations

import pytest
import torch

from ham.evaluate import dial, recall
from ham.evaluate.language_modelling import draw_segments, ratio_fields
from ham.evaluate.scoring import score_rows
from ham.evaluate.threshold_dial import calibration_batches, dialled, thresholds_restored
from ham.measure.dial import measure_dial
from ham.model.calibration import calibrate, thresholds
from ham.report.rows import RowWriter

SETTINGS = {"dial": {"fractions": [0.0, 0.25, 0.75, 1.0], "tokens": 2560, "samples": 0}}
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
    calibrate(model, calibration_batches(subject), 0.25)
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
    with pytest.raises(RuntimeError, match="in between"), thresholds_restored(model):
        calibrate(model, [torch.zeros(1, 8, dtype=torch.int64)], 0.9)
        assert thresholds(model) != before
        raise RuntimeError("in between")
    assert thresholds(model) == before


def test_models_that_do_not_route_have_no_dial(make_subject, tiny_model) -> None:
    assert dial.cells(make_subject(tiny_model("transformer"), SETTINGS, **TRAIN)) == []


def test_calibration_reads_the_calibration_split(make_subject, tiny_model) -> None:
    subject = make_subject(tiny_model("ham"), SETTINGS, **TRAIN)
    batches = calibration_batches(subject)
    assert [tuple(batch.shape) for batch in batches] == [(4, 128), (4, 128)]
    text = bytes(subject.shard("calibration").tokens.astype("uint8"))
    assert all(bytes(row.tolist()) in text for batch in batches for row in batch)


def test_needles_and_recall_are_asked_at_each_fraction(make_subject, tiny_model) -> None:
    """The accuracy is that of the recall part under the same thresholds, with fewer samples."""
    model = tiny_model("ham")
    settings = {
        "dial": {"fractions": [0.25, 1.0], "tokens": 1280, "samples": 2},
        "recall": {"pairs": [2, 4], "samples": 50},
        "needle": {"tasks": ["niah_single_1"], "lengths": [512], "depths": [0.5], "samples": 9},
    }
    subject = make_subject(model, settings, **TRAIN)
    first, _ = dial.cells(subject)
    metrics = [row["metric"] for row in first.expected]
    assert metrics == ["bits_per_byte", "needle_accuracy", "recall_accuracy"]
    rows = {row["metric"]: row for row in first.run()}
    assert set(rows) == set(metrics)
    assert rows["needle_accuracy"]["n"] == 2 and rows["recall_accuracy"]["n"] == 2 * 2 + 2 * 4
    assert all(row["x_value"] == 0.25 and 0 < row["kv_fraction"] < 1 for row in rows.values())
    with dialled(model, calibration_batches(subject), 0.25):
        own = [recall.measure_pairs(subject, pairs, 2) for pairs in (2, 4)]
    hits = sum(row["value"] * row["n"] for row in own)
    assert rows["recall_accuracy"]["value"] == pytest.approx(hits / 12)


def test_pooled_accuracies_by_hand() -> None:
    rows = [
        {"value": 0.5, "n": 4, "kv_fraction": 0.2},
        {"value": 1.0, "n": 12, "kv_fraction": 0.4},
        {"value": None, "error": "too long"},
    ]
    pooled = dial.pooled_accuracy(rows)
    assert pooled["value"] == 14 / 16 and pooled["n"] == 16 and pooled["interval"] == "wilson95"
    assert pooled["kv_fraction"] == pytest.approx(0.35)
    assert dial.pooled_accuracy(rows[2:]) == {"value": None, "error": "too long"}


def test_bytes_and_times_along_the_dial(make_subject, tiny_model) -> None:
    measure = {"contexts": [64, 256], "decode_tokens": 3, "repeats": 1, "warmup": 1}
    model = tiny_model("ham")
    before = thresholds(model)
    writer = RowWriter(model="ham", mixer="ham", device="cpu")
    measure_dial(make_subject(model, SETTINGS, measure=measure, **TRAIN), writer)
    by_metric: dict[str, list] = {}
    for row in writer.rows:
        assert row.experiment == "dial" and row.labels == {"context": 256}
        by_metric.setdefault(row.metric, []).append(row)
    assert set(by_metric) == {"decode_ms", "kv_bytes", "cache_bytes_allocated"}
    for rows in by_metric.values():
        assert [row.x_value for row in rows] == [0.0, 0.25, 0.75, 1.0]
        realised = [row.kv_fraction for row in rows]
        assert realised[0] == 0 and realised[-1] == 1 and sorted(realised) == realised
    kept = [row.value for row in by_metric["kv_bytes"]]
    assert sorted(kept) == kept and kept[0] < kept[-1]
    assert all(row.n == 3 and row.value > 0 for row in by_metric["decode_ms"])
    assert thresholds(model) == before


def test_models_without_a_dial_have_no_bytes_along_it(make_subject, tiny_model) -> None:
    writer = RowWriter(model="a", mixer="a", device="cpu")
    measure_dial(make_subject(tiny_model("transformer"), SETTINGS, **TRAIN), writer)
    without = make_subject(tiny_model("ham"), SETTINGS, **TRAIN)
    without.config = without.config.model_copy(update={"measure": None})
    measure_dial(without, writer)
    assert writer.rows == []
