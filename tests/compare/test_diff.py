"""`ham diff` as a user calls it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ham.cli import main
from ham.compare.manifests import flatten
from ham.files import write_json, write_jsonl
from ham.report.manifest import collect_manifest, manifest_id, manifest_path, write_manifest
from ham.report.rows import RowWriter

MODELS = ("transformer", "ham")


def run_folder(folder: Path, change: float = 1.0, **manifest: object) -> Path:
    """A run of two models and three seeds; `change` multiplies the loss of one of them."""
    made = collect_manifest({"arms": [{"name": "ham", "options": {"target": 0.25}}]}, ["ham"])
    made.update(manifest)
    made["manifest_id"] = manifest_id(made)
    for model in MODELS:
        writer = RowWriter(
            model=model, mixer=model, device=str(made["device"]), manifest_id=made["manifest_id"]
        )
        for seed in range(3):
            loss = (2.0 + 0.1 * seed) * (change if model == "ham" else 1.0)
            writer.add("language_modelling", "loss_nats", loss, seed=seed)
        writer.add("memory", "kv_bytes", 1024, x_name="context", x_value=64, seed=0)
        writer.add("throughput", "tokens_per_second", 100 * change, seed=0)
        path = folder / model / "all.rows.jsonl"
        writer.write(path)
        write_manifest(manifest_path(path), made)
    return folder


def rewrite(path: Path, **changes: object) -> None:
    """Change fields of every row of a file, with no check."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    write_jsonl(path, ({**record, **changes} for record in records))


def diff(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, dict]:
    status = main(["diff", *map(str, arguments), "--json"])
    printed = capsys.readouterr()
    return status, json.loads(printed.out) if printed.out else {"error": printed.err}


def test_a_run_equals_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = run_folder(tmp_path / "a"), run_folder(tmp_path / "b")
    status, found = diff(capsys, one, other)
    assert status == 0 and found["differs"] is False
    assert found["counts"] == {"same": 6} and found["manifests"] == []


def test_what_made_the_runs_and_what_changed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu = {"name": "H100", "driver": "580", "sm_clock_mhz": 1980.0}
    one = run_folder(tmp_path / "a", gpus=[gpu], commit="abc", dirty_hash=None)
    newer = {**gpu, "driver": "590", "sm_clock_mhz": 1200.0}
    config = {"arms": [{"name": "ham", "options": {"target": 0.5}}]}
    other = run_folder(
        tmp_path / "b", 1.1, gpus=[newer], commit="def", dirty_hash="123", config=config
    )
    status, found = diff(capsys, one, other)
    assert status == 1
    assert {fact["name"]: (fact["a"], fact["b"]) for fact in found["manifests"]} == {
        "commit": (["abc"], ["def"]),
        "dirty hash": (["–"], ["123"]),
        "GPU driver": (["580"], ["590"]),
        "config arms.ham.options.target": (["0.25"], ["0.5"]),
    }
    assert found["manifests"][0]["name"] == "commit"
    worse = [d for d in found["differences"] if d["verdict"] == "worse"]
    assert [(d["model"], d["metric"]) for d in worse] == [("ham", "loss_nats")]
    assert worse[0]["relative"] == pytest.approx(0.1) and worse[0]["a"]["n"] == 3
    assert found["counts"] == {"same": 3, "unjudged": 2, "worse": 1}
    assert main(["diff", str(one), str(other), "--threshold", "0.2"]) == 0
    assert main(["diff", str(one), str(other), "--model", "transformer"]) == 0
    assert main(["diff", str(one), str(other), "--model", "transformer", "--strict"]) == 1


def test_a_terminal_and_markdown_show_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = run_folder(tmp_path / "a", commit="abc")
    other = run_folder(tmp_path / "b", 1.1, commit="def")
    assert main(["diff", str(one), str(other)]) == 1
    table = capsys.readouterr().out
    assert main(["diff", str(one), str(other), "--format", "markdown", "--limit", "1"]) == 1
    text = capsys.readouterr().out
    assert "| ham | language_modelling: loss_nats | 2.10 [1.85, 2.35] (n=3) | 2.31" in text
    assert "+10.0 % | paired t, 3 seeds |" in text and "1 more." in text
    for words in ("What made them differs", "Worse", "+10.0 %", "paired t, 3 seeds"):
        assert words in table and words in text
    assert table.index("What made them differs") < table.index("Worse")
    assert "6 numbers compared, threshold 2.0 %: 1 worse" in table.replace("\n", " ")


def test_failed_and_missing_cells(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = run_folder(tmp_path / "a"), run_folder(tmp_path / "b")
    (other / "transformer" / "all.rows.jsonl").unlink()
    status, found = diff(capsys, one, other)
    assert status == 1 and {key["model"] for key in found["only_in_a"]} == {"transformer"}
    assert len(found["only_in_a"]) == 3 and found["only_in_b"] == []
    assert diff(capsys, one, other, "--ignore-missing")[0] == 0
    rewrite(other / "ham" / "all.rows.jsonl", value=None, error="out of memory")
    status, found = diff(capsys, one, other, "--ignore-missing")
    assert status == 1 and len(found["failed"]) == 3 and found["differences"] == []
    assert {(tuple(f["a"]), f["b"][0]) for f in found["failed"]} == {((), "out of memory")}
    rewrite(one / "ham" / "all.rows.jsonl", value=None, error="out of memory")
    assert diff(capsys, one, other, "--ignore-missing")[0] == 0, "failed on both sides"
    assert main(["diff", str(one), str(other)]) == 1
    assert "No number has a value on both sides" in capsys.readouterr().out


def test_bytes_that_a_sweep_carries_as_labels_are_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, size in (("a", 1000), ("b", 2000)):
        writer = RowWriter(model="ham", mixer="ham", device="CPU")
        labels = {"batch": 1, "kv_bytes": size}
        writer.add("model_decode", "median_ms", 1.0, labels=labels, x_name="context", x_value=64)
        writer.write(tmp_path / f"{name}.jsonl")
    status, found = diff(capsys, tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    verdicts = {d["metric"]: (d["verdict"], d["labels"]) for d in found["differences"]}
    assert verdicts == {"kv_bytes": ("worse", {"batch": 1}), "median_ms": ("same", {"batch": 1})}
    assert status == 1 and found["manifests_missing"] == [1, 1]


def test_bad_input_is_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, other = run_folder(tmp_path / "good"), run_folder(tmp_path / "other")
    empty, bare = tmp_path / "empty", tmp_path / "bare"
    write_jsonl(empty / "x.rows.jsonl", [])
    bare.mkdir()
    write_json(tmp_path / "strange.jsonl", {"not": "a row"})
    old = run_folder(tmp_path / "old")
    for path in old.glob("*/*.jsonl"):
        rewrite(path, schema_version=0)
    apart = run_folder(tmp_path / "apart")
    for path in apart.glob("*/*.jsonl"):
        rewrite(path, experiment="something_else")
    for arguments, words in (
        ((good, tmp_path / "nowhere"), "nowhere does not exist"),
        ((good, bare), "bare holds no *.rows.jsonl"),
        ((good, empty), "empty holds no rows: the run is empty"),
        ((good, old), "old has version 0; this ham-bench reads version 1"),
        ((old, old), "old has version 0; this ham-bench reads version 1"),
        ((good, tmp_path / "strange.jsonl"), "is not valid JSON"),
        ((good, apart), "has something_else (e.g. "),
        ((good, other, "--metric", "los_nats"), "unknown metric 'los_nats'; known: kv_bytes, loss"),
        ((good, other, "--model", "gpt"), "unknown model 'gpt'; known: ham, transformer"),
        ((good, other, "--threshold", "-1"), "threshold must be at least 0, received -1"),
        ((good, other, "--limit", "-1"), "--limit must be at least 0, received -1"),
    ):
        status, found = diff(capsys, *arguments)
        assert status == 2 and words in found["error"], arguments
        assert found["error"].count("ham: error:") == 1


def test_maps_in_lists_go_by_their_name() -> None:
    nested = {"arms": [{"name": "a", "x": 1}, {"name": "b", "x": [1, 2]}], "empty": {}, "n": None}
    assert dict(flatten(nested)) == {"arms.a.x": 1, "arms.b.x": [1, 2], "empty": {}, "n": None}
