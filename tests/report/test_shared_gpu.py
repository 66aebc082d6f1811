"""Runs whose processes shared a GPU: their training speeds are marked, other times left out."""

from __future__ import annotations

import pytest

from ham.report.aggregate import SHARED_TIMES, Results
from ham.report.plots_base import Look
from ham.report.plots_dial import dial_page
from ham.report.tables_quality import dial, training
from ham.train.loop import shared_gpu_labels


@pytest.fixture
def results(make_rows):
    """By whether the GPU was shared."""
    rows = make_rows(models=["transformer", "ham-cosine"])
    timed = [
        row.model_copy(update={"metric": "decode_ms", "value": 3.0})
        for row in rows
        if (row.experiment, row.metric) == ("dial", "bits_per_byte")
    ]
    marked = [
        row.model_copy(update={"labels": {**row.labels, "gpu_processes": 6}})
        if (row.experiment, row.metric) == ("train", "tokens_per_second")
        else row
        for row in rows
    ]
    return {False: Results([*rows, *timed]), True: Results([*marked, *timed])}


@pytest.mark.parametrize("shared", [False, True])
def test_what_evaluation_timed_is_shown_only_where_it_had_the_gpu_alone(results, shared: bool):
    table = dial(results[shared])
    assert ("decode_ms" in {column.key for column in table.columns}) != shared
    assert (SHARED_TIMES in table.note) == shared
    drawing = dial_page(results[shared], Look.of(results[shared]))
    assert drawing is not None and (SHARED_TIMES in drawing.shown) == shared


@pytest.mark.parametrize("shared", [False, True])
def test_training_speeds_say_that_they_were_shared(results, shared: bool):
    assert results[shared].shared_gpu() == ([6] if shared else [])
    assert ("6 processes at a time on one GPU" in training(results[shared]).note) == shared


def test_rows_of_training_are_marked_by_the_lease(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("HAM_GPU_PROCESSES", raising=False)
    assert shared_gpu_labels() == {}
    monkeypatch.setenv("HAM_GPU_PROCESSES", "6")
    assert shared_gpu_labels() == {"gpu_processes": 6}


def test_numbers_of_seeds_are_counted_by_model(make_rows):
    rows = make_rows(seeds=(0, 1), models=["transformer"])
    rows += make_rows(seeds=(0, 1, 2), models=["mamba2"])
    tried = next(row for row in rows if row.experiment == "train")
    rows.append(tried.model_copy(update={"experiment": "tuning", "model": "tried", "seed": 9}))
    assert Results(rows).seed_counts() == [2, 3]
    assert Results(rows).seeds("transformer") == [0, 1]
