"""Stores of long measurements: published rows are found again, and cells are replaced whole."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from ham.errors import ConfigError
from ham.kernels.speed.ceilings import RATES
from ham.kernels.speed.store import SpeedStore
from ham.measure.sweep.store import SweepStore
from ham.report.manifest import collect_manifest, manifest_path, read_manifest
from ham.report.publish import RESULTS
from ham.report.row_store import DEVICE, RowStore
from ham.report.rows import Row, read_rows

REPOSITORY = Path(__file__).resolve().parents[2]
COMMON = {"device": "CPU", "code_fingerprint": "code", "manifest_id": "first"}


class TaskStore(RowStore):
    """One cell a task."""

    def key_of(self, row: Row) -> str:
        return str(row.task)


def rows_of(store: RowStore, task: str, *values: float | None) -> list[Row]:
    return [
        store.make(
            "x",
            f"{index}_ms",
            value,
            model="m",
            mixer="m",
            task=task,
            error=None if value is not None else "broken",
        )
        for index, value in enumerate(values)
    ]


@pytest.mark.parametrize(
    ("store_class", "file"),
    [
        (SweepStore, "2026-11-25-h100-decode/sweep.rows.jsonl"),
        (SpeedStore, "2026-11-25-h100-comparison/kernel_speed.rows.jsonl"),
        (SpeedStore, "2026-11-25-h100-kernels/kernel_speed.rows.jsonl"),
    ],
)
def test_published_rows_are_continued(
    store_class: type[RowStore], file: str, tmp_path: Path
) -> None:
    path = tmp_path / Path(file).name
    shutil.copy(REPOSITORY / RESULTS / file, path)
    shutil.copy(manifest_path(REPOSITORY / RESULTS / file), manifest_path(path))
    before, recorded = read_rows(path), read_manifest(manifest_path(path))
    now = {**collect_manifest({"device": "cuda"}, ["ham"]), "device": recorded["device"]}
    store = store_class.of_run(path, now, before[0].code_fingerprint, ["ham", "again"])
    assert store.resumed and store.all_rows() == before
    assert all(store.has(store.key_of(row)) for row in before)
    assert set(store.rates()) == set(RATES)
    store.put(store.cells[store.key_of(before[-1])])
    assert read_rows(path) == before
    store.finish(1.0)
    after = read_manifest(manifest_path(path))
    assert after["measured"].pop("commands")[-1] == ["ham", "again"]
    recorded["measured"].pop("commands")
    assert after.pop("wall_seconds") == pytest.approx((recorded.pop("wall_seconds") or 0) + 1)
    expected = {"tiles": {}, **recorded.pop("measured"), "ceilings": store.rates()}
    assert after.pop("measured") == expected
    assert after == recorded


def test_a_cell_is_replaced_whole_and_keeps_its_place(tmp_path: Path) -> None:
    path = tmp_path / "x.rows.jsonl"
    store = TaskStore(path, COMMON)
    store.put(rows_of(store, "a", 1.0, 2.0))
    store.put([*rows_of(store, "b", None), *rows_of(store, "c", 3.0)])
    store.put(rows_of(store, "a", 4.0))
    found = [(row.task, row.value) for row in read_rows(path)]
    assert found == [("a", 4.0), ("b", None), ("c", 3.0)]
    later = TaskStore(path, {**COMMON, "manifest_id": "later"}, retry_errors=True)
    assert [later.has(key) for key in "abcd"] == [True, False, True, False]
    assert TaskStore(path, COMMON).has("b")
    assert rows_of(later, "d", 1.0)[0].manifest_id == "first"
    assert not TaskStore(path, COMMON, overwrite=True).all_rows()


@pytest.mark.parametrize("field", ["code_fingerprint", "device"])
def test_rows_of_something_else_are_refused(field: str, tmp_path: Path) -> None:
    path = tmp_path / "x.rows.jsonl"
    store = TaskStore(path, COMMON)
    store.put(rows_of(store, "a", 1.0))
    with pytest.raises(ConfigError, match=f"{field} .*, now 'other'; use --overwrite"):
        TaskStore(path, {**COMMON, field: "other"})


def test_without_a_file_nothing_is_written() -> None:
    store = TaskStore.of_run(None, collect_manifest({}, ["ham"]), "code", ["ham"])
    store.put([store.make("x", "copy_gb_per_second", 7.0, model=DEVICE, mixer=DEVICE)])
    store.finish(1.0)
    assert store.rates() == store.manifest["measured"]["ceilings"] == {"copy_gb_per_second": 7.0}
