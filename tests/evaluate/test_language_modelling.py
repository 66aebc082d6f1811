"""Bits per byte: hand-worked totals, disjoint targets, the unigram model, loss by position."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from stand_ins import SuccessorModel, UniformModel, write_shard

from ham.errors import ConfigError, CorruptFileError, MissingDataError
from ham.evaluate.language_modelling import (
    Segment,
    cells,
    draw_segments,
    losses_by_position,
    measure_context,
    ratio_fields,
    unigram_log_probabilities,
)
from ham.evaluate.scoring import RowScore, score_rows

HIT = math.log(math.exp(5) + 256) - 5
MISS = math.log(math.exp(5) + 256)


def settings(**values) -> dict:
    return {"language_modelling": {"tokens": 2000, "contexts": [64], "position_bins": 4, **values}}


def test_segments_predict_every_drawn_token_once_and_stay_in_their_document() -> None:
    documents = [np.arange(100), np.arange(1000, 1041), np.arange(2000, 2035)]
    segments = draw_segments(documents, context=10, tokens=10**6)
    targets = [token for segment in segments for token in segment.tokens[1:].tolist()]
    assert len(targets) == len(set(targets)) == 160
    for segment in segments:
        assert segment.tokens.tolist() == list(range(segment.tokens[0], segment.tokens[0] + 11))
        assert segment.tokens[0] // 1000 == segment.document


def test_the_same_segments_are_drawn_again() -> None:
    documents = [np.arange(5000)]
    first, again = (draw_segments(documents, 100, 1000) for _ in range(2))
    assert [s.tokens[0] for s in first] == [s.tokens[0] for s in again] and len(first) == 10


def test_all_contexts_score_the_same_targets() -> None:
    segment = Segment(0, np.arange(101))
    for context in (100, 50, 30, 7):
        windows = segment.windows(context)
        assert np.concatenate([window[1:] for window in windows]).tolist() == list(range(1, 101))
        assert max(len(window) for window in windows) == context + 1


def test_a_context_longer_than_every_document_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"65 tokens; the longest has 64"):
        draw_segments([np.arange(64), np.arange(9)], context=64, tokens=100)


def test_bits_per_byte_of_a_uniform_model(make_subject) -> None:
    subject = make_subject(UniformModel(), settings(contexts=[64, 16], tokens=6400))
    for cell in cells(subject)[:2]:
        (bits, *others) = [row for row in cell.run() if "class" not in row["metric"]]
        assert bits["value"] == pytest.approx(math.log2(257), rel=1e-6)
        assert bits["low"] == pytest.approx(bits["high"]) and bits["interval"] == "bootstrap95"
        assert bits["n"] == 10, "documents"
        metrics = [row["metric"] for row in others]
        assert metrics == ["loss_nats"] * 4 + ["position_bits_per_byte"] * 4


def test_hand_worked_bits_per_byte_and_routed_share(make_subject, tmp_path: Path) -> None:
    """Tokens 10, 11, 13, 14, 16: of four targets two are hits; 10, 14 are routed, 11, 13 not."""
    write_shard(tmp_path / "test.tokens", [[10, 11, 13, 14, 16]])
    subject = make_subject(SuccessorModel(), settings(contexts=[4]), folder=tmp_path)
    rows = measure_context(subject, draw_segments(subject.test.documents(), 4, 4), 4, 2)
    bits, first, second, early, late, kv = rows
    assert bits["value"] == pytest.approx((2 * HIT + 2 * MISS) / math.log(2) / 4)
    assert bits["n"] == 1 and "interval" not in bits and bits["kv_fraction"] == 0.5
    assert (first["x_value"], second["x_value"]) == (0.5, 2.5)
    assert first["value"] == second["value"] == pytest.approx((HIT + MISS) / 2)
    assert first["labels"] == {"context": 4}
    assert early["value"] == late["value"] == pytest.approx((HIT + MISS) / 2 / math.log(2))
    assert early["labels"] == {"context": 4} and early["n"] == 1
    assert kv["metric"] == "kv_fraction" and kv["value"] == 0.5 and kv["labels"] == {"layer": 1}


def test_end_of_text_counts_no_bytes_and_is_never_scored(make_subject, tmp_path: Path) -> None:
    write_shard(tmp_path / "test.tokens", [list(range(20)), list(range(50, 70))])
    subject = make_subject(SuccessorModel(), settings(), folder=tmp_path)
    for segment in draw_segments(subject.test.documents(), 19, 100):
        assert 256 not in segment.tokens
    bits = measure_context(subject, draw_segments(subject.test.documents(), 19, 100), 19, 1)[0]
    assert bits["value"] == pytest.approx(HIT / math.log(2))


def test_ratio_resamples_documents_else_windows_else_nothing() -> None:
    bits, sizes = np.arange(1.0, 21.0), np.full(20, 4.0)
    value = bits.sum() / sizes.sum()
    by_document = ratio_fields(bits, sizes, np.repeat(np.arange(10), 2))
    assert by_document["n"] == 10 and by_document["value"] == value
    by_window = ratio_fields(bits, sizes, np.repeat(np.arange(2), 10))
    assert by_window["n"] == 20 and by_window["low"] < value < by_window["high"]
    assert ratio_fields(bits[:5], sizes[:5], np.zeros(5)) == {"value": 15 / 20, "n": 5}


def test_loss_bins_cover_every_position() -> None:
    scores = [RowScore(np.arange(10.0), np.zeros(10, bool)), RowScore(np.arange(3.0), None)]
    rows = losses_by_position(scores, context=10, bins=3)
    assert [centre for centre, _, _ in rows] == [1.0, 4.5, 8.0]
    assert [count for _, _, count in rows] == [2, 1, 1]
    assert [mean for _, mean, _ in rows] == [1.0, 4.5, 8.0]


def test_unigram_model_by_hand() -> None:
    logs = unigram_log_probabilities(np.array([0, 0, 0, 2], dtype=np.uint16), 4)
    np.testing.assert_allclose(np.exp(logs), [4 / 8, 1 / 8, 2 / 8, 1 / 8])


def test_unigram_row_scores_the_same_tokens(make_subject, data_folder: Path) -> None:
    subject = make_subject(UniformModel(), settings())
    (row,) = cells(subject)[-1].run()
    train = np.bincount(subject.shard("train").tokens, minlength=257) + 1
    logs = np.log2(train / train.sum())
    segments = draw_segments(subject.test.documents(), 64, 2000)
    targets = np.concatenate([segment.tokens[1:] for segment in segments])
    assert row["value"] == pytest.approx(-logs[targets].mean())
    assert row["metric"] == "unigram_bits_per_byte" and "x_name" not in row


def test_declared_share_of_models_that_do_not_route(make_subject, tiny_model) -> None:
    for mixer, expected in (("transformer", 1.0), ("gated_delta_rule", None)):
        bits = cells(make_subject(tiny_model(mixer), settings()))[0].run()[0]
        assert bits["kv_fraction"] == expected


def test_rows_of_a_routing_model(make_subject, tiny_model) -> None:
    model = tiny_model("ham")
    subject = make_subject(model, settings())
    rows = cells(subject)[0].run()
    kept = [row for row in rows if row["metric"] == "kv_fraction"]
    assert [row["labels"]["layer"] for row in kept] == [0, 1]
    assert rows[0]["kv_fraction"] == pytest.approx(np.mean([row["value"] for row in kept]))
    segments = draw_segments(subject.test.documents(), 64, 2000)
    nats = sum(s.nats.sum() for s in score_rows(model, [s.tokens for s in segments]))
    assert rows[0]["value"] == pytest.approx(nats / math.log(2) / (64 * len(segments)))


def test_missing_truncated_and_foreign_shards(make_subject, tmp_path: Path) -> None:
    subject = make_subject(UniformModel(), settings(), folder=tmp_path)
    with pytest.raises(MissingDataError):
        subject.shard("test")
    write_shard(tmp_path / "test.tokens", [[1, 2, 3]])
    subject.tokenizer.name = "bpe-4096"
    with pytest.raises(ConfigError, match=r"made with tokenizer 'byte' .* has 'bpe-4096'"):
        subject.shard("test")
    subject.tokenizer.name = "byte"
    (tmp_path / "test.tokens").write_bytes(b"\x01")
    with pytest.raises(CorruptFileError, match="truncated"):
        subject.shard("test")
