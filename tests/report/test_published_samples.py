"""Answers behind lm-eval's scores: without texts, small, the same bytes, checked against rows."""

from __future__ import annotations

import json
import lzma
from pathlib import Path

import pytest

from ham.errors import ConfigError, CorruptFileError
from ham.report import samples
from ham.report.rows import Row
from ham.report.samples import (
    answers_of_job,
    pack_samples,
    read_samples,
    sample_faults,
    without_texts,
)

ROWS = "results/runs/x/models/ham/seed{}/evaluate.rows.jsonl"
RECORD = {
    "task": "piqa",
    "doc_id": 3,
    "doc": {"goal": "a licensed text"},
    "doc_hash": "d0c",
    "target": "licensed too",
    "prompt_hash": "p",
    "target_hash": "t",
    "resps": [[[-13.429788053035736, False]], [["a text", 2]]],
    "acc": 1,
}
KEPT = {
    "task": "piqa",
    "doc_id": 3,
    "doc_hash": "d0c",
    "resps": [[[-13.42979, False]], [["a text", 2]]],
    "acc": 1,
}


def lines(*records: dict) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def test_texts_stay_behind_and_numbers_are_rounded() -> None:
    (line,) = without_texts(lines(RECORD)).decode().splitlines()
    assert json.loads(line) == KEPT
    assert without_texts(b"") == b""


def test_answers_come_from_samples_or_from_another_machine(tmp_path: Path) -> None:
    rows = ROWS.format(0)
    folder = (tmp_path / rows).parent
    folder.mkdir(parents=True)
    assert answers_of_job(tmp_path, rows) == {}
    (folder / "evaluate.answers.jsonl").write_bytes(b"sent\n")
    path = ROWS.format(0).replace(".rows.", ".answers.")
    assert answers_of_job(tmp_path, rows) == {path: b"sent\n"}
    (folder / "evaluate.samples.jsonl").write_bytes(lines(RECORD))
    assert answers_of_job(tmp_path, rows) == {path: without_texts(lines(RECORD))}
    (folder / "evaluate.samples.jsonl").write_bytes(b"")
    assert answers_of_job(tmp_path, rows) == {}


def test_one_file_has_all_models_and_seeds(tmp_path: Path) -> None:
    answers = {
        ROWS.format(seed).replace(".rows.", ".answers."): lines({**KEPT, "acc": seed})
        for seed in (1, 0)
    }
    packed = pack_samples(answers)
    assert packed == pack_samples(dict(reversed(answers.items())))
    (tmp_path / "samples.jsonl.xz").write_bytes(packed)
    assert read_samples(tmp_path / "samples.jsonl.xz") == [
        {**KEPT, "acc": seed, "model": "ham", "seed": seed} for seed in (0, 1)
    ]
    assert pack_samples({}) is None


def test_too_many_answers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "MOST_BYTES", 50)
    with pytest.raises(ConfigError, match="at most 50 are published; --no-samples publishes"):
        pack_samples({ROWS.format(0): lines(KEPT)})


@pytest.mark.parametrize("content", [b"no xz", lzma.compress(b"{no json")])
def test_a_damaged_file_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "samples.jsonl.xz").write_bytes(content)
    with pytest.raises(CorruptFileError, match=r"samples\.jsonl\.xz holds no samples"):
        read_samples(tmp_path / "samples.jsonl.xz")


def test_accuracies_must_be_those_of_the_samples() -> None:
    records = [
        {"model": "ham", "seed": 0, "task": "piqa", "acc": hit, "acc_norm": 1} for hit in (0, 1, 1)
    ]

    def row(metric: str, value: float, n: int = 3, **changes: object) -> Row:
        common = {"experiment": "lm_eval", "model": "ham", "mixer": "ham", "seed": 0}
        values = {**common, "task": "piqa", "device": "CPU", **changes}
        return Row(metric=metric, value=value, n=n, **values)

    good = [
        row("accuracy", 2 / 3),
        row("accuracy_norm", 1.0),
        # Samples say nothing of these.
        row("chance_accuracy", 0.5),
        row("accuracy", 0.5, experiment="needle"),
    ]
    assert sample_faults(records, good) == []
    (value, count) = sample_faults(records, [row("accuracy", 0.5), row("accuracy_norm", 1.0, 4)])
    assert value == "ham, seed 0, piqa: accuracy is 0.5 of 3, its samples give 0.666667 of 3"
    assert count == "ham, seed 0, piqa: accuracy_norm is 1 of 4, its samples give 1 of 3"
    lost = [row("accuracy", 0.5, task="boolq"), row("accuracy", 0.5, seed=1)]
    assert sample_faults(records, lost) == [
        "ham, seed 0, boolq: accuracy has no samples",
        "ham, seed 1, piqa: accuracy has no samples",
    ]
