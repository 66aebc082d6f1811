"""Classes of words: hand-worked windows, counts of the training text, rows that add up."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest
from stand_ins import SuccessorModel, UniformModel, write_shard

from ham.evaluate.language_modelling import cells, draw_segments, measure_context, training_words
from ham.evaluate.word_classes import Spelling, WordCounts, classify, count_words
from ham.train.shards import TokenShard
from ham.train.tokenizer import ByteTokenizer, train_bpe

COUNTS = {b"the": 50, b"a": 30, b"cat": 12, b"sat": 5, b"dog": 2, b"emu": 1}


def spans(mask: np.ndarray, text: bytes) -> list[tuple[int, str]]:
    """Where the stretches that a mask over the bytes of a text chooses begin, and what they say."""
    shown = bytes(byte if chosen else ord(" ") for byte, chosen in zip(text, mask, strict=True))
    return [(match.start(), match.group().decode()) for match in re.finditer(rb"\S+", shown)]


def test_rare_words_make_up_at_most_the_declared_share() -> None:
    """100 words. Up to a count of 1, 2, 5, 12, 30 they are 1, 3, 8, 20 and 50 of them."""
    for share, below in ((0.0, 1), (0.01, 2), (0.029, 2), (0.03, 3), (0.2, 13), (0.499, 13)):
        assert WordCounts.of(COUNTS, share).rare_below == below
    assert [WordCounts.of(COUNTS, share).rare_below for share in (0.5, 1.0)] == [31, 51]
    words = WordCounts.of(COUNTS, 0.08)
    assert [word for word in COUNTS if words.rare(word)] == [b"sat", b"dog", b"emu"]
    assert words.rare(b"never counted")
    assert WordCounts.of({b"x": 3, b"y": 3}, 0.9).rare_below == 1, "equal counts stay together"


def test_a_window_by_hand() -> None:
    """The second `the cat` recalls its `cat`, `sat on the` its last two words; the ends are cut."""
    text = b"ut the cat sat on the cat emu sat on the emu do"
    classes = classify([bytes([byte]) for byte in text], WordCounts.of(COUNTS, 0.08))
    found = {name: spans(mask, text) for name, mask in classes.items()}
    recalled = [(22, "cat"), (34, "on"), (37, "the")]
    others = [(3, "the"), (7, "cat"), (11, "sat"), (15, "on"), (18, "the")]
    others += [(26, "emu"), (30, "sat"), (41, "emu")]
    rare = [(11, "sat"), (15, "on"), (26, "emu"), (30, "sat"), (34, "on"), (41, "emu")]
    assert found["recall"] == recalled and found["other"] == others
    assert found["rare"] == rare and found["recall_rare"] == [(34, "on")]
    assert found["frequent"] == sorted(set(recalled + others) - set(rare))


def test_a_token_belongs_to_the_word_of_its_last_letter() -> None:
    spelled = [b"x", b" the", b" ca", b"t", b"  ", b"\n", b"dog sat ", b"", b"on", b" "]
    classes = classify(spelled, WordCounts.of(COUNTS, 0.08))
    assert classes["frequent"].tolist() == [False, True, True, True, *[False] * 6]
    assert classes["rare"].tolist() == [*[False] * 6, True, False, True, False]


def test_windows_without_words() -> None:
    for spelled in ([], [b" "], [b"abc"], [b"", b""], [b" ", b"cut"]):
        classes = classify(spelled, WordCounts.of(COUNTS, 0.5))
        assert all(mask.shape == (len(spelled),) and not mask.any() for mask in classes.values())


def test_spellings_are_the_bytes_of_the_text() -> None:
    text = "the whale and the sea café and 北 the whale"
    assert b"".join(Spelling(ByteTokenizer())([*text.encode(), 256])) == text.encode()
    tokenizer = train_bpe(["the whale and the sea and the whale. " * 20], vocabulary_size=280)
    ids = tokenizer.encode(text)
    parts = Spelling(tokenizer)([*ids, tokenizer.end_of_text])
    assert [len(part) for part in parts] == [tokenizer.count_bytes([token]) for token in ids] + [0]
    found, known = b"".join(parts), text.encode()
    assert all(a in (b, 255) for a, b in zip(found, known, strict=True)), "or parts of a character"
    assert found[:25] == known[:25] and len(ids) < len(known) - 10


def test_words_of_a_shard(tmp_path: Path) -> None:
    documents = [list(b"a cat sat"), list(b"a dog a"), list(b"cat")]
    write_shard(tmp_path / "train.tokens", documents)
    shard = TokenShard.open(tmp_path / "train.tokens")
    counted = count_words(shard, Spelling(ByteTokenizer()))
    assert counted == {b"a": 3, b"cat": 2, b"sat": 1, b"dog": 1}, "documents end words"


def test_stretches_of_a_long_shard_hold_whole_words(tmp_path: Path) -> None:
    write_shard(tmp_path / "train.tokens", [list(b"whale of the sea " * 4000)])
    shard = TokenShard.open(tmp_path / "train.tokens")
    counted = count_words(shard, Spelling(ByteTokenizer()), limit=64 * 170)
    assert set(counted) == {b"whale", b"of", b"the", b"sea"}
    assert sum(counted.values()) == pytest.approx(64 * 38, abs=64), "40 words each, two are cut"


def test_rows_of_classes_by_hand(make_subject, tmp_path: Path) -> None:
    """`y ab ab ab ab z`: the model expects b after a. The third and fourth `ab` are recalled.

    `y` and `z` are cut. Each `ab` costs a miss (a) and a hit (b).
    """
    hit, miss = ((math.log(math.exp(5) + 256) - d) / math.log(2) for d in (5, 0))
    write_shard(tmp_path / "test.tokens", [list(b"y ab ab ab ab z")])
    write_shard(tmp_path / "train.tokens", [list(b"ab " * 9 + b"z z q")])
    subject = make_subject(SuccessorModel(), {}, folder=tmp_path)
    words = training_words(subject, 0.3)
    segments = draw_segments(subject.test.documents(), 14, 14)
    rows = measure_context(subject, segments, 14, 1, words)
    by_class: dict[str, dict] = {"class_bytes": {}, "class_bits_per_byte": {}}
    for row in rows:
        if row["metric"] in by_class:
            by_class[row["metric"]][row["labels"]["token_class"]] = row
    sizes = {name: row["value"] for name, row in by_class["class_bytes"].items()}
    assert sizes == {"recall": 4, "other": 4, "recall_rare": 0, "rare": 0, "frequent": 8}
    bits = by_class["class_bits_per_byte"]
    assert set(bits) == {"recall", "other", "frequent"}, "nothing is asked of an empty class"
    for row in bits.values():
        assert row["value"] == pytest.approx((hit + miss) / 2) and row["x_value"] == 14
    kept = {line["token_class"]: line for line in subject.documents}
    assert kept["recall"]["bytes"] == 4 and kept["all"]["bytes"] == 14
    assert kept["recall"]["bits"] == pytest.approx(2 * (hit + miss))


def test_classes_and_positions_add_up(make_subject) -> None:
    settings = {"tokens": 6400, "contexts": [128, 32], "position_bins": 5}
    subject = make_subject(UniformModel(), {"language_modelling": settings})
    for cell, context in zip(cells(subject), (128, 32), strict=False):
        rows: dict[str, list[dict]] = {}
        for row in cell.run():
            rows.setdefault(row["metric"], []).append(row)
        size = {row["labels"]["token_class"]: row["value"] for row in rows["class_bytes"]}
        assert size["recall"] + size["other"] == size["rare"] + size["frequent"] > 0
        assert size["recall_rare"] <= min(size["recall"], size["rare"])
        for row in rows["class_bits_per_byte"] + rows["position_bits_per_byte"]:
            assert row["value"] == pytest.approx(math.log2(257))
        lines = [line for line in subject.documents if line["context"] == context]
        whole = [line for line in lines if line["token_class"] == "all"]
        assert sum(line["bytes"] for line in whole) == 6400 - 6400 % 128
        assert len({line["document"] for line in whole}) == len(whole) == 10


def test_classes_can_be_left_out(make_subject) -> None:
    settings = {"tokens": 640, "contexts": [64], "rare_share": None}
    rows = cells(make_subject(UniformModel(), {"language_modelling": settings}))[0].run()
    assert not any("class" in row["metric"] for row in rows)
